"""Starting a server beside a run: it may not outlive us."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.errors import UsageError
from halfbyte.evals.endpoint import Endpoint, describe_checkpoint, describe_served
from halfbyte.model.tiny import write_tiny_checkpoint

PARENT = """
import subprocess, sys
from halfbyte.child import ending_with_us
child = subprocess.Popen(ending_with_us([sys.executable, "-c", "import time; time.sleep(100)"]))
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:3]


@pytest.mark.skipif(sys.platform != "linux", reason="parent death signals are Linux's")
def test_a_server_ends_with_a_run_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    # The child has asked for the signal once its own program runs; between two it shows nothing.
    deadline = time.monotonic() + 10
    while "import time; time.sleep(100)" not in arguments(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_knows_the_checkpoint_behind_its_address(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        write_tiny_checkpoint(tmp_path / name, layers=1, seed=seed)
    own = checkpoint_identity(tmp_path / "a")
    ours = Endpoint("http://x/v1", "m", None, {"health": {"checkpoint": own}})
    assert describe_served(ours, None) == {"identity": own}
    assert describe_served(ours, tmp_path / "a") == describe_checkpoint(tmp_path / "a")
    with pytest.raises(UsageError, match="but http://x/v1 serves"):
        describe_served(ours, tmp_path / "b")
    odd: tuple[Any, ...] = (None, [], {}, {"checkpoint": 3})
    for health in odd:
        silent = Endpoint("http://x/v1", "m", None, {"health": health})
        assert describe_served(silent, None) == {}
        assert describe_served(silent, tmp_path / "b")["identity"] != own
