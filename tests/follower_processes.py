"""Finds the processes of tensor-parallel ranks and tells whether they still run."""

import time
from pathlib import Path

from halfbyte.processes import family_of


def _parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(status[1])


def followers_of(parent: int) -> list[int]:
    """Processes that run a follower for `parent`, or for an engine that is its child."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"halfbyte.engine.follower" in command:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                starter = int(status[1])
                if status[0] != "Z" and parent in (starter, _parent_of(starter)):
                    found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def engines_of(server: int) -> list[int]:
    """Processes that run the engine of a server."""
    return [
        pid
        for pid in family_of(server)
        if b"engine_child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until_gone(pids: list[int], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.02)
    return False
