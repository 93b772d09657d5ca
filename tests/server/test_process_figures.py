"""What a process says of itself."""

import os
import sys
import threading

import pytest

from halfbyte.server.ops import process_figures as subject


async def test_figures_count_what_there_is() -> None:
    before = subject.figures()
    assert before["tasks"] == 1
    ready, done = threading.Barrier(3), threading.Event()

    def wait() -> None:
        ready.wait()
        done.wait()

    threads = [threading.Thread(target=wait, name=name) for name in ("own", "masks_0")]
    for thread in threads:
        thread.start()
    ready.wait()
    after = subject.figures()
    assert "in wait" in subject.stacks() and "thread masks_0" in subject.stacks()
    done.set()
    for thread in threads:
        thread.join()
    assert after["threads"] == before["threads"] + 1
    assert after["pool_threads"] == before["pool_threads"] + 1


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
async def test_memory_and_files_are_the_processes_own() -> None:
    before = subject.figures()
    read, write = os.pipe()
    assert subject.figures()["open_files"] == before["open_files"] + 2
    os.close(read)
    os.close(write)
    assert 2**20 < before["resident_bytes"] < 2**40
