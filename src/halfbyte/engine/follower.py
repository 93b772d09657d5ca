"""What a tensor-parallel process above rank 0 does: load its part, then follow message by message.

It knows neither requests nor tokens to come; each step arrives in host arrays (`workers.RunStep`)
and its sums leave through the communicator. Started by `workers`, on whose pipe it depends: when
that closes, the process ends, wherever it is.
"""

import os
import pickle
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from halfbyte import log, processes
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.load import load_part
from halfbyte.engine.workers import (
    Connect,
    Connected,
    Join,
    MakeCache,
    Message,
    RankFailed,
    RankLoaded,
    RunStep,
    packed,
)
from halfbyte.errors import HalfbyteError
from halfbyte.model.parallel import ProcessGroup


def main() -> None:
    """Run as the process that `workers` starts; the argument is the pipe's descriptor."""
    # Rank 0 drains, and tells us.
    processes.ignore_signals()
    pipe: Connection[Any, Any] = Connection(int(sys.argv[1]))
    processes.leave_with_starter(pipe.fileno())
    status = 1
    try:
        _follow(pipe)
        status = 0
    except (EOFError, OSError):
        status = 0  # rank 0 has gone
    except HalfbyteError as error:
        _report(pipe, RankFailed(str(error), error))
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        log.logger.error("%s", trace)
        _report(pipe, RankFailed(f"{type(error).__name__}: {error}"))
    # Not by way of destructors: those of a group whose members are gone may wait for them.
    sys.stderr.flush()
    os._exit(status)


def _report(pipe: "Connection[Any, Any]", failed: RankFailed) -> None:
    with suppress(OSError):
        pipe.send_bytes(packed(failed))


def _next(pipe: "Connection[Any, Any]") -> Message:
    message: Message = pickle.loads(pipe.recv_bytes())
    return message


def _follow(pipe: "Connection[Any, Any]") -> None:
    join = _next(pipe)
    if not isinstance(join, Join):
        return
    config = join.config
    log.configure(rank=join.rank)
    device = torch.device(config.device)
    torch.set_num_threads(join.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size, timeout_s = config.tensor_parallel_size, config.collective_timeout_s
    communicator = ProcessGroup(join.rank, size, join.meeting_place, device, timeout_s)
    checkpoint = Checkpoint.open(join.directory)
    part = load_part(checkpoint, config, communicator, uses_kernels=join.uses_kernels)
    if join.uses_kernels:
        torch.cuda.synchronize()
    _connect(pipe, communicator, part.num_weight_bytes)
    made, _ = part.build(lambda text, free_bytes, draft_bytes: _settle(pipe, free_bytes))
    while isinstance(message := _next(pipe), RunStep):
        made.follow(message.step)
    communicator.close()


def _connect(pipe: "Connection[Any, Any]", communicator: ProcessGroup, weight_bytes: int) -> None:
    pipe.send_bytes(packed(RankLoaded(weight_bytes)))
    if not isinstance(_next(pipe), Connect):
        raise EOFError("rank 0 wants no more")
    communicator.connect()


def _settle(pipe: "Connection[Any, Any]", free_bytes: int) -> EngineConfig:
    """The configuration that rank 0 resolved, knowing what room this rank has."""
    pipe.send_bytes(packed(Connected(free_bytes)))
    make = _next(pipe)
    if not isinstance(make, MakeCache):
        raise EOFError("rank 0 wants no more")
    return make.config
