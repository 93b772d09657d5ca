"""Heavy requests against a server process with its limits as they are: what they cost others.

Measured: memory of the server and its processes over idle while they are in work and afterwards,
the longest silence of /health/ready, the longest gap of an answer that streams beside them. Others
may work on the machine, too: right before each heavy request the same stream is watched without
one, and where that control is beyond a bound of time, the bound is what it showed.
"""

import contextlib
import dataclasses
import http.client
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

from flows.hostile import CHAT, Heavy, grain, heavy, seen
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.processes import family_of

DATA = Path(__file__).parent.parent / "data" / "chat"
PEAK_MB, KEPT_MB = 600, 100
SILENCE_S, GAP = 0.150, 5.0
ATTEMPTS = 5
# How long a control is watched, beside the moments before and after.
CONTROL_S = 0.5


@dataclasses.dataclass
class Target:
    """A server process and where it listens."""

    process: "subprocess.Popen[bytes]"
    port: int

    def processes(self) -> list[int]:
        """The server's and those that it has started, and they."""
        return family_of(self.process.pid)

    def memory_mb(self, what: str) -> float:
        """Of all of them; pages that they share count for each."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError, IndexError):
                text = Path(f"/proc/{pid}/status").read_text()
                total += int(text.partition(f"{what}:")[2].split()[0])
        return total / 1024

    def forget_peak(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def post(self, path: str, content: bytes, timeout: float = 50) -> tuple[int, bytes]:
        return post(self.port, path, content, timeout)


def post(port: int, path: str, content: bytes, timeout: float = 50) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        # A refusal may come before the body is out; it is what counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def senders() -> Iterator[Executor]:
    """A process that makes bodies and sends them, out of the way of the one that looks."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as found:
        assert found.submit(int).result() == 0
        yield found


@contextlib.contextmanager
def serving(directory: Path, *, layers: int, max_model_len: int) -> Iterator[Target]:
    """A server process over a small random model with a vision tower."""
    config = tiny_config(layers=layers, vision=True)
    text = dataclasses.replace(config.text, vocab_size=800, max_positions=max_model_len)
    write_tiny_checkpoint(directory, config=dataclasses.replace(config, text=text))
    shutil.copy(DATA / "tekken" / "tekken.json", directory)
    log = directory / "log"
    command = [sys.executable, "-m", "halfbyte", "serve", directory, "--port", "0"]
    command += ["--max-model-len", max_model_len, "--kv-cache-tokens", 4 * max_model_len]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.DEVNULL, env=environment
        )
    try:
        deadline = time.monotonic() + 50
        while "Ctrl-C" not in (said := log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        url = next(word for word in said.split() if word.endswith("/v1"))
        found = Target(process, int(url.removesuffix("/v1").rpartition(":")[2]))
        # What the first request of each kind loads is not the corpus's.
        for prompt in (b"Hello", b"Hello " * 4000):
            status, _ = found.post("/tokenize", b'{"prompt": "%s"}' % prompt)
            assert status in (200, 400)
        yield found
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("models") / "m"
    # Deep enough that a step takes as long as one of a small real model.
    with serving(directory, layers=24, max_model_len=4096) as found:
        with watched(found):
            time.sleep(1)
        yield found


@dataclasses.dataclass
class Seen:
    """Longest silence of /health/ready (s), gaps between a stream's tokens (s)."""

    silence_s: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.gaps)

    @property
    def gap_ratio(self) -> float:
        return max(self.gaps) / self.median_s

    def __str__(self) -> str:
        return (
            f"silent for {self.silence_s * 1000:.0f} ms, gap {self.gap_ratio:.1f} of "
            f"{self.median_s * 1000:.1f} ms"
        )


@contextlib.contextmanager
def watched(target: Target) -> Iterator[Seen]:
    """Look at readiness and read a stream while the body runs."""
    seen, ends = Seen(), threading.Event()

    def look() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=50)
        with contextlib.closing(connection):
            while not ends.is_set():
                started = time.perf_counter()
                connection.request("GET", "/health/ready")
                connection.getresponse().read()
                seen.silence_s = max(seen.silence_s, time.perf_counter() - started)
                time.sleep(0.005)

    def stream() -> None:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": 3000,
        }
        while not ends.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=50)
            with contextlib.closing(connection):
                content = json.dumps(body).encode()
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", content, headers)
                answer = connection.getresponse()
                last = None
                while not ends.is_set() and (line := answer.readline()):
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        seen.gaps += [] if last is None else [now - last]
                        last = now

    threads = [threading.Thread(target=one) for one in (look, stream)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.5)
        yield seen
        time.sleep(0.3)
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def made(name: str) -> tuple[Heavy, bytes]:
    """A case and its body."""
    case = next(case for case in heavy() if case.name == name)
    return case, case.content()


# The case that is sent next, in the process that sends.
_next: list[tuple[Heavy, bytes]] = []


def prepare(name: str) -> int:
    """Make the body of a case; returns its bytes."""
    _next[:] = [made(name)]
    return len(_next[0][1])


def sent(port: int) -> list[int]:
    """The statuses of as many requests as the case has, all at once; 0 where no answer came."""
    ((case, content),) = _next
    statuses: list[int] = []

    def send() -> None:
        try:
            statuses.append(post(port, case.path, content)[0])
        except (OSError, http.client.HTTPException):
            statuses.append(0)

    threads = [threading.Thread(target=send) for _ in range(case.times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def check(target: Target, senders: Executor, case: Heavy, floor_s: float) -> str | None:
    """What is wrong with a case's cost; time is measured again: others may have been in the way.

    floor_s  gaps up to this are no fault, however short a step is
    """
    num_bytes = senders.submit(prepare, case.name).result()
    base = target.memory_mb("VmRSS")
    said = ""
    for _ in range(ATTEMPTS):
        target.forget_peak()
        with watched(target) as control:
            time.sleep(CONTROL_S)
        with watched(target) as seen:
            statuses = senders.submit(sent, target.port).result()
        if target.process.poll() is not None:
            return f"{case.name}: the server died"
        # A body that was still coming may cost its sender the answer.
        known = (*case.statuses, 0) if num_bytes > 1_000_000 else case.statuses
        wrong = [status for status in statuses if status not in known]
        if wrong:
            return f"{case.name}: answered {wrong[:5]}"
        peak = target.memory_mb("VmHWM") - base
        if peak > PEAK_MB:
            return f"{case.name}: {peak:.0f} MB over idle"
        said = f"{case.name}: {seen}, {peak:.0f} MB over idle; alone: {control}"
        # Shown by `pytest -s`: what each case costs on this machine.
        print(said)
        allowed_s = max(max(GAP, control.gap_ratio) * seen.median_s, floor_s)
        is_even = max(seen.gaps) <= allowed_s
        # Where a step takes long, so does everything else.
        longest_s = max(SILENCE_S, control.silence_s, GAP * seen.median_s)
        if is_even and seen.silence_s <= longest_s:
            return None
    return said


def check_all(target: Target, senders: Executor, cases: list[Heavy], floor_s: float = 0.0) -> None:
    idle = target.memory_mb("VmRSS")
    wrong = [said for case in cases if (said := check(target, senders, case, floor_s)) is not None]
    assert not wrong, "\n".join(wrong)
    # Freed memory goes back to the system a moment later, on a busy machine some seconds.
    deadline = time.monotonic() + 20
    while (kept := target.memory_mb("VmRSS") - idle) > KEPT_MB:
        assert time.monotonic() < deadline, f"{kept:.0f} MB are kept"
        time.sleep(0.5)
    status, _ = target.post("/detokenize", b'{"tokens": [5]}')
    assert status == 200
    connection = http.client.HTTPConnection("127.0.0.1", target.port)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read())
    assert health["ready"] and health["engine_restarts"] == 0


@pytest.mark.timeout(150)
def test_brief_heavy_requests_cost_others_little(target: Target, senders: Executor) -> None:
    cases = [case for case in heavy() if case.is_brief]
    assert len(cases) >= 4
    # Beside other tests, which share the processors with it: a few slices of time of the system.
    check_all(target, senders, cases, floor_s=0.030)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_heavy_requests_cost_others_little(target: Target, senders: Executor) -> None:
    check_all(target, senders, heavy())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_many_pictures_of_full_size_wait_in_little_memory(tmp_path: Path) -> None:
    """As many as a request may have; their client leaves while the first is encoded."""
    with serving(tmp_path / "m", layers=2, max_model_len=131_072) as target:
        assert target.post(CHAT, seen(grain(28, 28)))[0] == 200
        idle = target.memory_mb("VmRSS")
        target.forget_peak()
        with pytest.raises(TimeoutError):
            target.post(CHAT, seen(*[grain(1540, 1540, is_black=True)] * 32), timeout=40)
        peak = target.memory_mb("VmHWM") - idle
        # All have been decoded: 7.1 million bytes each.
        assert 200 <= peak <= PEAK_MB, f"{peak:.0f} MB over idle"
        deadline = time.monotonic() + 60
        while (kept := target.memory_mb("VmRSS") - idle) > KEPT_MB:
            assert time.monotonic() < deadline, f"{kept:.0f} MB are kept"
            time.sleep(0.5)
