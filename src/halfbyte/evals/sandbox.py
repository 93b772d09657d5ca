"""Run generated code where it can do no harm, and say how it ended.

The program sees no network, no environment, no other process, a read-only file system with the
interpreter, and one private folder that vanishes with it; its time, memory, processes, files and
output are bounded. `sandbox_init` builds that world; here is what stays outside: starting it,
watching it, and the verdict. If the machine cannot give the isolation, nothing is run.
"""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.evals import sandbox_init

Ending = Literal["exited", "signal", "wall", "cpu", "memory", "output", "stopped"]

_MEASURE_S = 0.1  # between two looks at the memory in use
_END_LIMIT_S = 10.0  # for the kernel to end a killed world; far more than it takes

# Without any of these nothing is run.
REQUIRED = ("network", "pid", "mount", "seccomp")

# All that the program finds in its environment; one thread, or libraries hit the process limit.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": sandbox_init.BOX,
    "TMPDIR": sandbox_init.BOX,
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one program may use. The wall clock is the published 1,800 s of SciCode."""

    wall_s: float = 1800.0
    cpu_s: int = 1800
    memory_bytes: int = 8 << 30
    disk_bytes: int = 64 << 20
    processes: int = 64
    open_files: int = 256
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program in the sandbox ended, and what it printed.

    ending     exited: by itself, with `exit_code`; signal: killed by `signal_number`; the others
               name the limit that it ran into, or say that it was ended with its partner
    stdout, stderr   at most `Limits.output_bytes` together
    isolation  what was active, such as ("mount", "pid", ..., "seccomp")
    """

    ending: Ending
    exit_code: int
    signal_number: int
    stdout: str
    stderr: str
    wall_s: float
    isolation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A program of ours, and generated code that it talks to but shares no world with.

    Both programs get two arguments, the descriptors to read from and to write to the other with.

    program, files  what decides; its outcome is the pair's
    other, other_files  what is untrusted; it sees nothing but the interpreter
    """

    program: str
    files: Mapping[str, str]
    other: str
    other_files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python for generated code: its path, what of the disk it needs, its versions."""

    path: str
    prefixes: tuple[str, ...]
    versions: Mapping[str, str]


@cache
def isolation() -> tuple[str, ...]:
    """What this machine can keep apart, found by running one harmless program.

    Raises UnsupportedError if any of `REQUIRED` is missing: generated code does not run then.
    """
    try:
        outcome = run_program(interpreter(sys.executable), "pass", limits=SandboxLimits(wall_s=20))
    except OSError as failure:
        raise UnsupportedError(
            f"there is no sandbox for generated code here: {failure}"
        ) from failure
    missing = [name for name in REQUIRED if name not in outcome.isolation]
    if missing or outcome.exit_code != 0:
        raise UnsupportedError(
            f"generated code would run with too little isolation: no {', '.join(missing)} "
            f"(active: {', '.join(outcome.isolation) or 'nothing'}); it was not run. "
            f"Allow user namespaces, or run as root. {outcome.stderr[-300:]}"
        )
    return outcome.isolation


def interpreter(path: str) -> Interpreter:
    """Look at a Python: where it lives and which numerical packages it has.

    path  as a user gives it: absolute, relative to here, or a name to be found in PATH
    Raises UsageError if it is not there or does not run.
    """
    # Made absolute, not resolved: a virtual environment is known by the path of its link.
    found = shutil.which(path) if os.sep not in path else path
    return _interpreter(os.path.abspath(found or path))


@cache
def _interpreter(path: str) -> Interpreter:
    question = (
        "import sys, json, importlib.metadata as m\n"
        "names = ['numpy', 'scipy', 'sympy', 'h5py', 'matplotlib']\n"
        "have = {}\n"
        "for name in names:\n"
        "    try: have[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "have['python'] = sys.version.split()[0]\n"
        "print(json.dumps([[sys.prefix, sys.base_prefix, *sys.path], have]))"
    )
    try:
        answer = subprocess.run(
            [path, "-I", "-c", question], capture_output=True, text=True, timeout=60, check=True
        )
        places, versions = json.loads(answer.stdout)
    except subprocess.CalledProcessError as failure:
        raise UsageError(f"{path} does not run: {failure.stderr.strip()[-300:]}") from failure
    except (OSError, ValueError, subprocess.TimeoutExpired) as failure:
        raise UsageError(f"{path} is not a Python for generated code: {failure}") from failure
    real = [os.path.realpath(path), *places]
    folders = {p for p in real if p and os.path.exists(p)}
    return Interpreter(path, tuple(sorted(folders)), versions)


def run_program(
    python: Interpreter,
    program: str | Pair,
    *,
    limits: SandboxLimits,
    visible: Sequence[Path] = (),
    files: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a Python program in the sandbox and wait for its end.

    visible  files or folders that it may read, at their own paths
    files    name -> text, put into its private folder beside the program
    Of a `Pair` both are for the program that decides; limits hold for each of the two. A limit that
    the other one ran into is the pair's ending.
    Raises UnsupportedError if the sandbox itself cannot be built.
    """
    for path in visible:
        if not path.exists():
            raise FileNotFoundError(path)
    if isinstance(program, str):
        return _run(python, program, limits, visible, files or {})
    return _run_pair(python, program, limits, visible, {**program.files, **(files or {})})


def _run_pair(
    python: Interpreter,
    pair: Pair,
    limits: SandboxLimits,
    visible: Sequence[Path],
    files: Mapping[str, str],
) -> Outcome:
    (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
    stop = threading.Event()
    # A little longer than the other, so that a limit is that of the code, not of waiting for it.
    patient = replace(limits, wall_s=limits.wall_s + 5)
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(
            _run, python, pair.other, limits, (), pair.other_files, (theirs_in, theirs_out), stop
        )
        try:
            ours = _run(python, pair.program, patient, visible, files, (ours_in, ours_out))
        finally:
            stop.set()
        theirs = other.result()
    stderr = "\n".join(filter(None, (theirs.stderr[-2000:].strip(), ours.stderr.strip())))
    is_passed = ours.ending == "exited" and ours.exit_code == 0
    if is_passed or theirs.ending in ("exited", "stopped"):
        return replace(ours, stderr=stderr)
    return replace(theirs, stdout=ours.stdout, stderr=stderr)


def _run(
    python: Interpreter,
    program: str,
    limits: SandboxLimits,
    visible: Sequence[Path],
    files: Mapping[str, str],
    channel: tuple[int, ...] = (),
    stop: threading.Event | None = None,
) -> Outcome:
    """Run one program. `channel`: descriptors that it inherits; they are closed here.

    stop  when set, the program is ended as one that is no longer needed
    """
    report_read, report_write = os.pipe()
    config = {
        "argv": [python.path, "-I", "-B", f"{sandbox_init.BOX}/program.py", *map(str, channel)],
        "channel": list(channel),
        "environment": _ENVIRONMENT,
        # A user of its own for every run, so that the process limit counts this run only.
        "uid": random.SystemRandom().randrange(200_000, 1_000_000),
        # At the path that was given as well as where it leads to, so that either can be opened.
        "visible": [
            *python.prefixes,
            *(str(place) for path in visible for place in (path.absolute(), path.resolve())),
        ],
        "files": {**files, "program.py": program},
        "limits": {k: v for k, v in asdict(limits).items() if k not in ("wall_s", "output_bytes")},
    }
    started = time.monotonic()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", sandbox_init.__file__, str(report_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(report_write, *channel),
            env={},
            start_new_session=True,
        )
    finally:
        for descriptor in (report_write, *channel):
            os.close(descriptor)
    watch = _Watch()
    try:
        assert child.stdin is not None
        child.stdin.write(json.dumps(config).encode())
        child.stdin.close()
        _watch(watch, child, report_read, limits, started, stop)
    finally:
        _end(child, watch.facts.get("init"))
        os.close(report_read)
    return _outcome(watch, time.monotonic() - started)


class _Watch:
    """What the supervisor has heard so far of one program."""

    def __init__(self) -> None:
        self.streams: dict[int, bytearray] = {}
        self.report = bytearray()
        self.ending: Ending | None = None
        self.facts: dict[str, Any] = {}


def _watch(
    watch: _Watch,
    child: "subprocess.Popen[bytes]",
    report: int,
    limits: SandboxLimits,
    started: float,
    stop: threading.Event | None,
) -> None:
    """Read output and reports until the program ends or a limit is passed; then kill it."""
    assert child.stdout is not None and child.stderr is not None
    streams = (child.stdout.fileno(), child.stderr.fileno())
    watch.streams = {stream: bytearray() for stream in streams}
    waiting = {*streams, report}
    measured = started
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], 0.1)
        for stream in ready:
            data = os.read(stream, 65536)
            if not data:
                waiting.discard(stream)
            elif stream == report:
                watch.report += data
            else:
                watch.streams[stream] += data
        if sum(map(len, watch.streams.values())) > limits.output_bytes:
            watch.ending = "output"
        elif time.monotonic() - started > limits.wall_s:
            watch.ending = "wall"
        elif time.monotonic() - measured > _MEASURE_S:
            # By the clock, not when nothing is printed: or a program that always prints is not
            # measured at all.
            if _resident_bytes(child.pid) > limits.memory_bytes:
                watch.ending = "memory"
            measured = time.monotonic()
        if watch.ending is None and stop is not None and stop.is_set():
            watch.ending = "stopped"
        if watch.ending is not None:
            break
        if b'"status"' in watch.report and not ready:
            break
    for line in bytes(watch.report).splitlines():
        watch.facts.update(json.loads(line))


def _outcome(watch: _Watch, wall_s: float) -> Outcome:
    facts = watch.facts
    out, err = (bytes(data).decode("utf-8", "replace") for data in watch.streams.values())
    active = (*facts.get("namespaces", ()), *(("seccomp",) if facts.get("seccomp") else ()))
    if str(facts.get("failure", "")).startswith("program:"):
        raise UnsupportedError(
            "the interpreter for generated code does not start in the sandbox: "
            f"{facts['failure']}; the code was not run. Give a virtual environment's python"
        )
    # After the program's start a fault of init is the program's doing.
    if "failure" in facts and "seccomp" not in facts:
        raise UnsupportedError(
            f"the sandbox for generated code cannot be built here: {facts['failure']}; "
            "the code was not run. Allow user namespaces, or run as root"
        )
    if watch.ending is not None:
        return Outcome(watch.ending, -1, signal.SIGKILL, out, err, wall_s, active)
    status = facts.get("status")
    if status is None:
        return Outcome("signal", -1, signal.SIGKILL, out, err, wall_s, active)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        ending: Ending = "cpu" if number == signal.SIGXCPU else "signal"
        return Outcome(ending, -1, number, out, err, wall_s, active)
    return Outcome("exited", os.WEXITSTATUS(status), 0, out, err, wall_s, active)


def _end(child: "subprocess.Popen[bytes]", init: int | None) -> None:
    """Kill what is left, and wait until all of it is gone.

    The end of init ends everything inside, and the kernel lets the launcher reap it only after
    that; so init is killed and the launcher waited for. As long as the launcher lives, init's
    number cannot have been given to another process.
    """
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()
    if child.poll() is None and init is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END_LIMIT_S)
    if child.poll() is None:
        child.kill()
    child.wait()


def _resident_bytes(root: int) -> int:
    """Resident memory of a process and all its descendants, in bytes."""
    parents: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            # pid (name) state ppid ...; the name may hold spaces and brackets.
            fields = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # gone between the listing and the look
        pid = int(entry.name)
        parents.setdefault(int(fields[1]), []).append(pid)
        resident[pid] = int(fields[21]) * page
    total, open_ends = 0, [root]
    while open_ends:
        pid = open_ends.pop()
        total += resident.get(pid, 0)
        open_ends.extend(parents.get(pid, ()))
    return total
