"""`halfbyte serve` in a process of its own: start it, wait until it answers, end it.

For whoever needs a server beside itself: evaluation of a folder, the demo, benchmarks. The server
does not outlive the program that started it, however that one ends.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from halfbyte.errors import CapacityError, UnsupportedError
from halfbyte.processes import family_of

# Large checkpoints take minutes to load from a slow disk.
START_LIMIT_S = 900.0
_END_LIMIT_S = 30.0
_LOG_TAIL = 2000
_NOT_READY = 503
# Linux sends a process this signal when the thread that started it ends, however it ends; it is
# asked for between fork and exec, and outlives the latter (prctl(2), PR_SET_PDEATHSIG = 1).
_ASK_AND_RUN = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True, slots=True)
class Child:
    """A server in a process of its own, which answers by now.

    url  its address, without a path
    """

    url: str
    process: "subprocess.Popen[bytes]"

    def cpu_s(self) -> float:
        """Processor seconds that the server and its processes have used (Linux)."""
        ticks = 0
        for pid in family_of(self.process.pid):
            # One of them may have ended by now.
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text()
                fields = stat.rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """End the server, gently and then not; returns its exit status. May be called again."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


@contextlib.contextmanager
def served(
    directory: Path,
    *flags: object,
    log: Path,
    environment: Mapping[str, str] | None = None,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[Child]:
    """Run `halfbyte serve DIRECTORY` on a free port while the body runs.

    flags        more words of its command line
    log          where its output goes; the folder is made
    environment  variables beside our own

    Raises UnsupportedError with the end of the log if the server ends before it answers,
    CapacityError if it does not answer within the limit.
    """
    port = free_port()
    words = [sys.executable, "-m", "halfbyte", "serve", directory, "--port", port, *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ending_with_us([str(word) for word in words]),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    child = Child(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_ready(child, log, start_limit_s)
        yield child
    finally:
        child.end()


def ending_with_us(command: list[str]) -> list[str]:
    """The same command, told to end when its parent does; unchanged where that is not to be had."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-c", _ASK_AND_RUN, *command]


def free_port() -> int:
    """A TCP port of this machine that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(child: Child, log: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    # Making a client reads all certificates: asking with a new one each time took half a core from
    # the server that starts.
    with httpx.Client(timeout=5) as client:
        while time.monotonic() < deadline:
            if child.process.poll() is not None:
                tail = log.read_text(errors="replace")[-_LOG_TAIL:]
                raise UnsupportedError(
                    f"`halfbyte serve` did not start; its log ({log}) ends:\n{tail}"
                )
            try:
                # With an admin listener the route is there, and 404 here says that the server
                # listens.
                if client.get(f"{child.url}/health/ready").status_code != _NOT_READY:
                    return
            except httpx.HTTPError:
                pass  # not listening yet
            time.sleep(0.05)
    raise CapacityError(f"`halfbyte serve` was not ready after {limit_s:.0f} s; its log is {log}")
