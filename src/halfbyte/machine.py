"""What this machine can give and what this process holds: memory, as the system states it; how
its threads wait, and when it collects garbage.

Everything is read from /proc and from cgroups. Other systems do not say, and get None.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# v1 writes "no limit" as the largest multiple of a page that fits 63 bits.
_NO_LIMIT = 1 << 60
_M_ARENA_MAX = -8  # of glibc's malloc.h
_MADV_COLLAPSE = 25  # of Linux's mman.h, from 6.1 on
_HUGE = 1 << 21


class Held(NamedTuple):
    """Memory that this process holds, in bytes, by kind.

    resident   pages in memory now, those of files it has mapped (libraries) included
    peak       the most that was ever resident
    anonymous  the part of `resident` that belongs to no file
    data       private writable memory it has asked for, touched or not; what RLIMIT_DATA limits
    threads    how many it runs (a count)
    """

    resident: int
    peak: int
    anonymous: int
    data: int
    threads: int


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory, where it can be told to."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_one_heap() -> None:
    """Have all threads allocate from the one heap whose end `trim_heap` gives back.

    By default glibc makes heaps for threads, eight a core, and never gives back what is free at
    the end of one: tens of megabytes each after large bodies. Called before there are threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def let_threads_sleep() -> None:
    """Have torch's threads sleep once they have nothing to do, unless the user says otherwise.

    By default they spin for milliseconds behind every parallel op, in the way of the kernels' own
    threads: a step of eight answers took 15 ms instead of 10 on two cores. OpenMP asks once, when
    torch is loaded: a no-op afterwards.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def give_way() -> None:
    """Have this thread, and processes that it starts, leave processors to others that want them.

    For work beside running answers, most often the smaller part of one: on a full machine it gets a
    third of what the others get (nice 5).
    """
    with contextlib.suppress(OSError):
        os.nice(5)


def settle_heap() -> None:
    """Collect garbage now, and let later collections pass over what is left.

    A full collection looks at every object of the libraries, hundreds of thousands, and no token
    leaves meanwhile. Garbage among them, an engine that died, goes when this is called again.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def use_huge_pages(limit_s: float, proc: Path = _PROC) -> int:
    """Have what this process holds lie on pages of 2 MB; bytes that lie on some afterwards.

    Weights are read whole at every step, and pages of 4 KB hold that up: a token alone on two cores
    took a fourth longer. Only memory in use is moved, so that it takes no more of it, and what is
    asked for later comes in small pages as before, which nobody waits long for. Moving goes at a
    third of a GB/s where free memory lies scattered, else at several; it ends after `limit_s`
    seconds, and begins with the largest pieces. A no-op on systems that cannot.
    """
    ends, moved = time.monotonic() + limit_s, 0
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        num_pages = _HUGE // mmap.PAGESIZE
        is_in_use = (ctypes.c_ubyte * num_pages)()
        for start, end in sorted(_own_memory(proc), key=lambda span: span[0] - span[1]):
            for at in range(-(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE, _HUGE):
                if time.monotonic() > ends:
                    return moved
                block = ctypes.c_void_p(at), ctypes.c_size_t(_HUGE)
                if library.mincore(*block, is_in_use) or sum(is_in_use) < num_pages:
                    continue
                if not library.madvise(*block, _MADV_COLLAPSE):
                    moved += _HUGE
    return moved


def _own_memory(proc: Path) -> Iterator[tuple[int, int]]:
    """First address and end of each piece of private writable memory that is no file's."""
    for line in (proc / "self" / "maps").read_text().splitlines():
        addresses, rights, *rest = line.split()
        if rights == "rw-p" and (len(rest) < 4 or rest[3] == "[heap]"):
            first, _, end = addresses.partition("-")
            yield int(first, 16), int(end, 16)


def held(proc: Path = _PROC) -> Held | None:
    """What this process holds; None where the system does not say."""
    try:
        lines = (proc / "self" / "status").read_text().splitlines()
    except OSError:
        return None
    stated = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    try:
        resident, peak, anonymous, data = (
            int(stated[name][0]) << 10 for name in ("VmRSS", "VmHWM", "RssAnon", "VmData")
        )
        return Held(resident, peak, anonymous, data, int(stated["Threads"][0]))
    except (KeyError, ValueError, IndexError):
        return None


def age_s(proc: Path = _PROC) -> float | None:
    """Seconds since this process was started; None where the system does not say."""
    try:
        uptime = float((proc / "uptime").read_text().split()[0])
        # The name, which may hold anything, ends with the last bracket; start is field 22.
        stat = (proc / "self" / "stat").read_text().rpartition(")")[2].split()
        return max(uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return None


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Memory that could be had now without swapping; None where the system does not say.

    The least of what the machine has and what the limits of this process's cgroup (v1 or v2) and
    of those around it leave. Cached files that would be given up count as available, as they do in
    MemAvailable.
    """
    amounts = [_left(folder) for folder in _memory_cgroups(proc, cgroups)]
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) << 10)
    except OSError:
        pass
    return min((amount for amount in amounts if amount is not None), default=None)


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Folders of this process's memory cgroup and of those around it, both versions."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots = [cgroups, cgroups / "unified"]
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
        else:
            continue
        for root in roots:
            # In a container the path may be the host's, which is not visible here: the root is.
            folder = root / path.lstrip("/")
            if ".." in folder.parts or not folder.is_dir():
                folder = root
            yield folder
            while folder != root:
                folder = folder.parent
                yield folder


def _left(folder: Path) -> int | None:
    """What the limit of one cgroup leaves; None if it has none."""
    for limit_name, used_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= _NO_LIMIT:
            return None
        return max(int(limit) - used + _stated(folder / "memory.stat", cache_name), 0)
    return None


def _stated(path: Path, name: str) -> int:
    """One number of a file of `name number` lines; 0 if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
