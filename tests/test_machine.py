"""What the system says about memory, read from made-up trees and from the real one."""

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.machine import age_s, available_bytes, held, use_huge_pages

MIB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def available(root: Path, cgroup: str, files: dict[str, str], free_mib: int = 900) -> int | None:
    proc = {
        "meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {free_mib << 10} kB\n",
        "self/cgroup": cgroup,
    }
    return available_bytes(tree(root / "proc", proc), tree(root / "cgroups", files))


def v2(limit: str, used_mib: int, cache_mib: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used_mib * MIB}\n",
        "memory.stat": f"anon 5\nactive_file 77\ninactive_file {cache_mib * MIB}\nslab 9\n",
    }


def within(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_without_limits_the_machine_decides(tmp_path: Path) -> None:
    assert available(tmp_path, "0::/\n", {}) == 900 * MIB


def test_a_limit_of_the_own_group_counts_and_its_cached_files_can_be_given_up(
    tmp_path: Path,
) -> None:
    files = within("a/b", v2(str(600 * MIB), used_mib=250, cache_mib=50))
    assert available(tmp_path, "0::/a/b\n", files) == 400 * MIB


def test_a_tighter_limit_around_the_own_group_counts(tmp_path: Path) -> None:
    files = {
        **within("a/b", v2("max", used_mib=100)),
        **within("a", v2(str(300 * MIB), used_mib=100)),
    }
    assert available(tmp_path, "0::/a/b\n", files) == 200 * MIB


def test_the_machine_decides_where_a_limit_leaves_more(tmp_path: Path) -> None:
    files = within("a", v2(str(5000 * MIB), used_mib=1))
    assert available(tmp_path, "0::/a\n", files) == 900 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert available(tmp_path, "0::/a\n", within("a", v2(str(10 * MIB), used_mib=11))) == 0


@pytest.mark.parametrize("path", ["/docker/4f2a", "/../../outside"])
def test_in_a_container_the_root_of_what_is_visible_counts(tmp_path: Path, path: str) -> None:
    assert available(tmp_path, f"0::{path}\n", v2(str(64 * MIB), used_mib=4)) == 60 * MIB


def v1(limit_bytes: int, used_mib: int, cache_mib: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit_bytes}\n",
        "memory.usage_in_bytes": f"{used_mib * MIB}\n",
        "memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {cache_mib * MIB}\n",
    }


def test_the_first_version_of_cgroups_is_read_too(tmp_path: Path) -> None:
    files = {
        **within("memory/jobs/7", v1(1 << 63 - 12, used_mib=100)),
        **within("memory/jobs", v1(500 * MIB, used_mib=300, cache_mib=20)),
    }
    cgroup = "9:cpu,cpuacct:/elsewhere\n4:hugetlb,memory:/jobs/7\n0::/\n"
    assert available(tmp_path, cgroup, files) == 220 * MIB


def test_a_system_that_does_not_say_gets_none(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None
    assert held(tmp_path) is None
    tree(tmp_path, {"self/status": "Name:\tpython\nVmRSS:\t7 kB\n"})
    assert held(tmp_path) is None


def test_what_this_process_takes_is_seen() -> None:
    # What earlier tests left in cycles must not be given back meanwhile.
    gc.collect()
    before = held()
    if before is None:
        pytest.skip("this system does not say")
    # From the system: the heap may have as much left of earlier tests.
    taken = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(64):
        taken.write(bytes(range(256)) * (MIB // 256))
    now = held()
    assert now is not None
    for name in ("resident", "anonymous", "data"):
        grown = getattr(now, name) - getattr(before, name)
        assert 60 * MIB < grown < 80 * MIB, name
    # The system counts per processor and adds up now and then.
    assert now.peak + MIB > now.resident > now.anonymous > len(taken)
    taken.close()
    after = held()
    assert after is not None and after.resident < now.resident - 60 * MIB
    assert after.peak + MIB > now.peak


# In a process of its own: the heap of one that has run thousands of tests takes seconds to collect.
_SETTLED = """
import gc, weakref
from halfbyte.machine import settle_heap
class Engine:
    def __init__(self):
        self.itself = self
engine = Engine()
gone = weakref.ref(engine)
settle_heap()
assert gc.get_freeze_count() > 1000
del engine
gc.collect()
assert gone() is not None
settle_heap()
assert gone() is None
"""


def test_a_settled_heap_is_passed_over_until_it_is_settled_again() -> None:
    subprocess.run([sys.executable, "-c", _SETTLED], check=True, timeout=30)


def test_the_age_of_a_process_counts_from_its_start(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "self").mkdir()
    (tmp_path / "uptime").write_text("100.50 7.0\n")
    fields = ["S", *["0"] * 18, str(98 * ticks), "0"]
    (tmp_path / "self" / "stat").write_text("7 (a ) name) " + " ".join(fields))
    assert age_s(tmp_path) == pytest.approx(2.5)
    assert age_s(tmp_path / "nowhere") is None
    here = age_s()
    assert here is None or 0 < here < 86_400


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    """Bytes of this process on huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


@pytest.mark.skipif(
    not _HUGE_PAGES.exists()
    or "[never]" in _HUGE_PAGES.read_text()
    or tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1),
    reason="needs Linux 6.1 with transparent huge pages",
)
def test_memory_in_use_moves_to_huge_pages_and_keeps_its_content_and_size() -> None:
    filled = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pattern = os.urandom(MIB)
    for _ in range(64):
        filled.write(pattern)
    untouched = mmap.mmap(-1, 256 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = held()
    assert use_huge_pages(limit_s=60) >= 48 * MIB
    after = held()
    assert before is not None and after is not None
    assert huge_bytes() >= 48 * MIB
    assert after.resident - before.resident < 64 * MIB, "what nobody touched takes nothing"
    assert all(filled[n * MIB : (n + 1) * MIB] == pattern for n in range(64))
    untouched.close()
    filled.close()


def test_moving_to_huge_pages_ends_in_time_and_fails_silently(tmp_path: Path) -> None:
    assert use_huge_pages(limit_s=-1) == 0
    assert use_huge_pages(limit_s=60, proc=tmp_path) == 0
    # Nothing lies there: the system refuses, and nobody hears of it.
    lines = "10000000-20000000 rw-p 00000000 00:00 0\n"
    assert use_huge_pages(limit_s=60, proc=tree(tmp_path, {"self/maps": lines})) == 0
