"""What the server holds of the machine: memory, files, threads, tasks; for operators."""

import asyncio
import contextlib
import os
import sys
import threading
import traceback
from pathlib import Path

from halfbyte.processes import family_of

# Names of threads that belong to pools.
_POOLS = ("asyncio_", "AnyIO worker", "long-texts", "grammar", "masks")


def figures() -> dict[str, int]:
    """Resident bytes, open files, threads, and tasks of the running event loop.

    Bytes are those of this process and of all that it has started, the engine's among them; pages
    that processes share count for each. The rest is of this process alone.
    pool_threads are the workers of bounded pools, which come with the first calls and stay.
    Resident bytes and open files on Linux only; elsewhere they are left out.
    """
    names = [thread.name for thread in threading.enumerate()]
    num_pooled = sum(name.startswith(_POOLS) for name in names)
    found = {
        "threads": len(names) - num_pooled,
        "pool_threads": num_pooled,
        "tasks": len(asyncio.all_tasks()),
    }
    files = Path("/proc/self/fd")
    num_pages = 0
    for pid in family_of(os.getpid()):
        with contextlib.suppress(OSError):
            num_pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    if num_pages:
        found["resident_bytes"] = num_pages * os.sysconf("SC_PAGE_SIZE")
    if files.exists():
        found["open_files"] = len(os.listdir(files))
    return found


def stacks() -> str:
    """Where every thread and every task is, for a server that does not do what it should."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        lines = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, ident)}\n{lines}")
    for task in asyncio.all_tasks():
        at = "".join(
            "".join(traceback.format_stack(frame, limit=1)) for frame in task.get_stack(limit=8)
        )
        parts.append(f"task {task.get_name()}\n{at}")
    return "\n".join(parts)
