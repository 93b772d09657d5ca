"""Python processes of our own: started, told to leave with us, described when they end.

For what the server and the engine keep outside: ranks, the engine itself, readers of long requests,
trials of grammars. Each is a `main` of this package that gets sockets as numbers of descriptors; it
leaves when those close. Not for commands that are programs of their own: that is `child`.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# How long an orderly end may take once whoever started the process is gone.
_GRACE_S = 2.0


def start(
    module: str,
    descriptors: Sequence[int],
    *,
    setting: bytes | None = None,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[bytes]":
    """A process that runs `main()` of a module, the descriptors as its arguments.

    setting      what it can read from its standard input
    environment  variables beside our own
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {module} import main; main()", *map(str, descriptors)],
        stdin=subprocess.DEVNULL if setting is None else subprocess.PIPE,
        pass_fds=descriptors,
        env={
            **os.environ,
            # Whatever made the package importable here does so there.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **(environment or {}),
        },
    )
    if setting is not None:
        assert process.stdin is not None
        try:
            with process.stdin as pipe:
                pipe.write(setting)
        except BrokenPipeError:
            pass  # It has ended; whoever asks it will see.
    return process


def end(process: "subprocess.Popen[bytes]", grace_s: float) -> None:
    """Wait for a process that was told to leave; end it if it does not."""
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def how_it_ended(process: "subprocess.Popen[bytes]", grace_s: float) -> str:
    """What is to be said of a process that has closed its socket."""
    try:
        status = process.wait(grace_s)
    except subprocess.TimeoutExpired:
        return f"process {process.pid} closed its pipe"
    if status >= 0:
        return f"process {process.pid} ended with status {status}"
    name = signal.Signals(-status).name
    hint = "; out of memory?" if name == "SIGKILL" else ""
    return f"process {process.pid} was ended by {name}{hint}"


def family_of(pid: int) -> list[int]:
    """A process, those that it has started, those that they have started, and so on (Linux)."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            # It may have ended by now.
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def ignore_signals() -> None:
    """Leave the terminal's and the service manager's signals to whoever started this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def leave_with_starter(descriptor: int) -> None:
    """End this process soon after the other end of a socket closes, even within a call."""

    def watch() -> None:
        poller = select.poll()
        poller.register(descriptor, select.POLLRDHUP)
        poller.poll()
        time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="leave", daemon=True).start()
