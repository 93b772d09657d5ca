"""Thirty hostile programs, each with the ending it must have, and harmless ones beside them."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.evals import sandbox, sandbox_init
from halfbyte.evals.sandbox import Outcome, SandboxLimits, interpreter, isolation, run_program

try:
    isolation()
except UnsupportedError as _reason:
    pytest.skip(f"no sandbox on this machine: {_reason}", allow_module_level=True)

SMALL = SandboxLimits(
    wall_s=2.0,
    cpu_s=1,
    memory_bytes=512 << 20,
    disk_bytes=4 << 20,
    processes=16,
    open_files=64,
    output_bytes=100_000,
)
# On a busy machine a second of processor time may take many on the clock.
PATIENT = replace(SMALL, wall_s=20.0)
PYTHON = interpreter(sys.executable)


def run(program: str, limits: SandboxLimits = PATIENT) -> Outcome:
    return run_program(PYTHON, program, limits=limits)


# name -> (program, endings it may have, text that must be in its error output)
HOSTILE: dict[str, tuple[str, str, str]] = {
    "endless loop": ("while True: pass", "cpu", ""),
    "endless sleep": ("import time\nwhile True: time.sleep(9)", "wall", ""),
    "loop deaf to its signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "signal",
        "",
    ),
    "fork bomb": ("import os\nwhile True: os.fork()", "exited cpu wall", ""),
    "thread bomb": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "exited",
        "can't start new thread",
    ),
    "child that outlives its parent": (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(600)",
        "exited",
        "",
    ),
    "memory hog": ("x = bytearray(1 << 40)", "exited", "MemoryError"),
    "slow memory hog": (
        "x = []\nwhile True: x.append(bytearray(1 << 27))",
        "exited",
        "MemoryError",
    ),
    "memory hog in many processes": (
        "import os, time\n"
        "for _ in range(8):\n"
        " if os.fork() == 0:\n"
        "  x = bytearray(os.urandom(1 << 20)) * 200\n"
        "  time.sleep(60)\n"
        "time.sleep(60)",
        "memory",
        "",
    ),
    "disk filler": (
        "f = open('x', 'wb')\nwhile True: f.write(b'0' * 100_000)",
        "exited signal",
        "",
    ),
    "many files": ("for i in range(10**6): open(str(i), 'w').close()", "exited", "No space left"),
    "file descriptors": (
        "import os\nwhile True: os.open('/dev/null', 0)",
        "exited",
        "Too many open",
    ),
    "huge output": ("while True: print('x' * 10_000)", "output", ""),
    "huge error output": (
        "import sys\nwhile True: sys.stderr.write('x' * 10_000)",
        "output",
        "",
    ),
    "network": (
        "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)",
        "exited",
        "PermissionError",
    ),
    "network by name": (
        "import urllib.request\nurllib.request.urlopen('http://example.org', timeout=1)",
        "exited",
        "Error",
    ),
    "server": (
        "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 8000))",
        "exited",
        "PermissionError",
    ),
    "environment of the harness": (
        "import os\nassert os.environ['SECRET_OF_THE_TEST']",
        "exited",
        "KeyError",
    ),
    "environment of the parent": (
        "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
        "exited",
        "FileNotFoundError",
    ),
    "killing the parent": (
        "import os\n"
        "for pid in (os.getppid(), 1):\n"
        " try: os.kill(pid, 9)\n"
        " except PermissionError: pass\n"
        "raise SystemExit('parent survived')",
        "exited",
        "parent survived",
    ),
    "killing everyone": (
        "import os\nos.kill(-1, 9)\nraise SystemExit('still here')",
        "exited signal",
        "",
    ),
    "stopping the parent": (
        "import os, signal\n"
        "try: os.kill(os.getppid(), signal.SIGSTOP)\n"
        "except PermissionError: pass\n"
        "raise SystemExit('went on')",
        "exited",
        "went on",
    ),
    "reading the passwords": ("print(open('/etc/shadow').read())", "exited", "FileNotFoundError"),
    "reading the repository": (
        f"print(open({str(Path(__file__))!r}).read())",
        "exited",
        "FileNotFoundError",
    ),
    "writing to the system": (
        "open('/usr/lib/x', 'w').write('x')",
        "exited",
        "Read-only file system",
    ),
    "deleting its own world": (
        "import shutil\nshutil.rmtree('/usr')",
        "exited",
        "Read-only file system",
    ),
    "new namespaces": (
        "import ctypes, os\n"
        "assert ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0, os.strerror("
        "ctypes.get_errno())",
        "exited",
        "Operation not permitted",
    ),
    "mounting": (
        "import ctypes, os\n"
        "assert ctypes.CDLL(None, use_errno=True).mount(b'x', b'/box', b'tmpfs', 0, b'') == 0",
        "exited",
        "AssertionError",
    ),
    "becoming root": ("import os\nos.setuid(0)", "exited", "PermissionError"),
    "raising its own limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))",
        "exited",
        "ValueError",
    ),
    "tracing a process": (
        "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
        "exited",
        "AssertionError",
    ),
    "crash of the interpreter": ("import ctypes\nctypes.string_at(0)", "signal", ""),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        "signal exited cpu memory",
        "",
    ),
    "endless symlinks": (
        "import os\nos.symlink('a', 'b')\nos.symlink('b', 'a')\nopen('a')",
        "exited",
        "Too many levels",
    ),
}


def test_there_are_at_least_thirty() -> None:
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_ends_as_it_must(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "1")
    program, endings, message = HOSTILE[name]
    limits = SMALL if "wall" in endings else PATIENT
    if "memory" in name:  # filling it may take more than a second on a busy machine
        limits = replace(limits, cpu_s=10)
    started = time.monotonic()
    outcome = run(program, limits)
    assert time.monotonic() - started < limits.wall_s + 5
    assert outcome.ending in endings.split(), outcome
    assert message in outcome.stderr, outcome
    # None of them may look like success, save the one whose child tries to outlive it.
    succeeded = outcome.ending == "exited" and outcome.exit_code == 0
    assert succeeded == (name == "child that outlives its parent"), outcome
    assert len(outcome.stdout) + len(outcome.stderr) < 300_000


def test_nothing_is_left_running() -> None:
    marker = f"{os.getpid()}.{time.monotonic_ns()}"
    program = (
        f"import os, sys\nos.fork()\nos.execv(sys.executable, ['{marker}', '-c', 'while 1: 0'])"
    )
    run(program, SMALL)
    for process in Path("/proc").iterdir():
        try:
            assert marker.encode() not in (process / "cmdline").read_bytes()
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            continue


def test_harmless_program_sees_its_files_and_what_was_made_visible(tmp_path: Path) -> None:
    shown = tmp_path / "shown.txt"
    shown.write_text("seven")
    outcome = run_program(
        PYTHON,
        f"print(open({str(shown)!r}).read(), open('beside.txt').read())\nopen('new', 'w')",
        limits=SMALL,
        visible=[shown],
        files={"beside.txt": "eight"},
    )
    assert outcome.stdout == "seven eight\n", outcome
    assert outcome.exit_code == 0
    denied = run_program(PYTHON, f"open({str(shown)!r}, 'w')", limits=SMALL, visible=[shown])
    assert "Read-only" in denied.stderr or "PermissionError" in denied.stderr
    assert shown.read_text() == "seven"


def test_absent_file_is_an_error_of_ours_not_of_the_program() -> None:
    with pytest.raises(FileNotFoundError):
        run_program(PYTHON, "pass", limits=SMALL, visible=[Path("/no/such/file")])


def test_interpreter_may_be_reached_over_a_link(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(Path(sys.prefix))
    python = interpreter(str(tmp_path / "linked" / "bin" / Path(sys.executable).name))
    outcome = run_program(python, "import numpy\nprint(numpy.__name__)", limits=SMALL)
    assert outcome.stdout == "numpy\n", outcome


def test_exit_code_and_streams_come_back() -> None:
    outcome = run("import sys\nprint('out')\nsys.stderr.write('err')\nsys.exit(7)")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (7, "out\n", "err")
    assert {"network", "pid", "mount", "seccomp"} <= set(outcome.isolation)


def test_without_namespaces_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    denied = 'raise OSError(1, "unshare: denied")'
    broken = tmp_path / "init.py"
    source = Path(str(sandbox_init.__file__)).read_text()
    assert source.count('_call("unshare"') == 2
    lines = [
        line.partition("_call")[0] + denied if '_call("unshare"' in line else line
        for line in source.splitlines()
    ]
    broken.write_text("\n".join(lines))
    monkeypatch.setattr(sandbox_init, "__file__", str(broken))
    with pytest.raises(UnsupportedError, match="not run"):
        run("print('ran')")


def test_too_little_isolation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "REQUIRED", ("network", "hypervisor"))
    isolation.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match="no hypervisor"):
            isolation()
    finally:
        isolation.cache_clear()


def test_seconds_of_a_program_are_its_own() -> None:
    outcome = run("import time\ntime.sleep(0.3)")
    assert 0.3 <= outcome.wall_s < PATIENT.wall_s


def test_no_process_is_left_after_a_program_that_ended_or_was_ended() -> None:
    for program, limits in (("pass", PATIENT), ("while True: pass", replace(SMALL, wall_s=0.5))):
        children = [started[0] for started in _children_of(os.getpid())]
        run(program, limits)
        assert [started[0] for started in _children_of(os.getpid())] == children


def _children_of(parent: int) -> list[tuple[int, str]]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(rest.split()[1]) == parent:
            found.append((int(stat.parent.name), name))
    return found


def test_what_is_no_interpreter_is_refused_with_its_words(tmp_path: Path) -> None:
    for text, said in (
        ("#!/bin/sh\necho no such thing >&2\nexit 3\n", "does not run: no such thing"),
        ("#!/bin/sh\necho hello\n", "is not a Python for generated code"),
    ):
        program = tmp_path / f"python-{len(text)}"
        program.write_text(text)
        program.chmod(0o755)
        with pytest.raises(UsageError, match=said):
            interpreter(str(program))
    with pytest.raises(UsageError):
        interpreter(str(tmp_path / "none"))
