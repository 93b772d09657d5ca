"""Ranks of a tensor-parallel group as threads of one process, for tests below the engine."""

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from halfbyte.model.parallel import Communicator, ProcessGroup

Result = TypeVar("Result")


def on_ranks(
    size: int, work: Callable[[Communicator], Result], timeout_s: float = 120.0
) -> list[Result]:
    """What `work` gives on each rank. The first failure is raised; the others are cut off."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(size) as pool:
        place = Path(scratch) / "meeting"

        def rank_work(rank: int) -> Result:
            group = ProcessGroup(rank, size, place, torch.device("cpu"), timeout_s)
            group.connect()
            try:
                return work(group)
            finally:
                barrier.wait(timeout_s)
                group.close()

        barrier = threading.Barrier(size)
        return [future.result() for future in [pool.submit(rank_work, r) for r in range(size)]]
