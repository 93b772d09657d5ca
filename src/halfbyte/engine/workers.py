"""Tensor-parallel processes and their one message pipe, as rank 0 sees them (decision 0010).

Rank 0 is the process of the engine: it schedules, samples and talks to clients. `Workers` starts
the other ranks, gives all of them the same messages in the same order and notices when one is gone.
What such a process does stands in `follower`; tensors travel through `model.parallel`.

A rank that dies or falls silent ends the engine with a WorkerError, never with a wait without end:
the pipe of a dead process closes, a collective call waits `collective_timeout_s` at most, and so
does a message that nobody takes. No rank outlives rank 0: it sees its end of the pipe close.
"""

import os
import pickle
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from halfbyte import processes
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.plan.step import PlannedStep
from halfbyte.errors import CapacityError, HalfbyteError, UsageError, WorkerError
from halfbyte.log import logger
from halfbyte.model.parallel import ProcessGroup

# How long a process may take to end once it was asked to, or to be known as dead.
_GRACE_S = 3.0
# How often the watching thread looks whether rank 0 waits too long.
_WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class Join:
    """Become rank `rank`: load your part of the checkpoint."""

    directory: Path
    config: EngineConfig
    rank: int
    meeting_place: Path
    num_threads: int
    uses_kernels: bool


@dataclass(frozen=True, slots=True)
class Connect:
    """A message to a rank: all ranks have loaded, so meet the others."""


@dataclass(frozen=True, slots=True)
class MakeCache:
    """Make the KV cache that the resolved configuration asks for."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class RunStep:
    """A message to a rank: compute one step."""

    step: PlannedStep


@dataclass(frozen=True, slots=True)
class RankStop:
    """A message to a rank: end the process."""


Message = Join | Connect | MakeCache | RunStep | RankStop


@dataclass(frozen=True, slots=True)
class RankLoaded:
    """A message of a rank: its weights are in memory."""

    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The rank has met the others; `free_bytes` is what its KV cache may take."""

    free_bytes: int


@dataclass(frozen=True, slots=True)
class RankFailed:
    """The rank ends: of `error`, or of something unforeseen that `text` describes."""

    text: str
    error: HalfbyteError | None = None


RankReport = RankLoaded | Connected | RankFailed


def packed(message: Message | RankReport) -> bytes:
    """The bytes of a message for the pipe; `Connection.send` would share tensors' memory."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


SomeReport = TypeVar("SomeReport", RankLoaded, Connected)


@dataclass(frozen=True, slots=True)
class _Rank:
    """One process and our end of its pipe."""

    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: "Connection[Any, Any]"

    def send(self, message: bytes) -> None:
        """OSError if the process is gone or takes nothing for the collective timeout."""
        self.pipe.send_bytes(message)

    def receive(self) -> RankReport:
        """The next report, waiting for it; the end of the process is a RankFailed one."""
        try:
            report: RankReport = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return RankFailed(processes.how_it_ended(self.process, _GRACE_S))
        return report


def _start(rank: int, send_timeout_s: float) -> _Rank:
    """A process with one end of a socket; it runs `follower.main`."""
    ours, theirs = socket.socketpair()
    timeout = struct.pack("ll", int(send_timeout_s), int(send_timeout_s % 1 * 1e6))
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    with theirs:
        process = processes.start("halfbyte.engine.follower", [theirs.fileno()])
    return _Rank(rank, process, Connection(ours.detach()))


class _Fate:
    """What is known of the ranks' health; shared by rank 0 and the thread that watches them."""

    def __init__(self) -> None:
        self.failure: WorkerError | None = None
        # Since when rank 0 waits for its device, monotonic.
        self.waiting_since: float | None = None
        self.is_decided = threading.Event()

    def decide(self, failure: WorkerError) -> None:
        self.failure = failure
        self.is_decided.set()


def _watch(ranks: list[_Rank], fate: _Fate, communicator: ProcessGroup, timeout_s: float) -> None:
    """Wait for the first rank that ends. Those who merely miss it report a WorkerError."""
    left = {one.pipe: one for one in ranks}
    while left and not fate.is_decided.is_set():
        speaking = wait(list(left), _WATCH_S)
        since = fate.waiting_since
        if not speaking and since is not None and time.monotonic() - since > timeout_s:
            fate.decide(
                WorkerError(f"a tensor-parallel rank has not answered within {timeout_s:g} s")
            )
            communicator.abort()
            return
        for one in [rank for pipe, rank in left.items() if pipe in speaking]:
            del left[one.pipe]
            report = one.receive()
            assert isinstance(report, RankFailed), f"rank {one.rank} says {report}"
            if isinstance(report.error, WorkerError):
                continue
            fate.decide(WorkerError(f"tensor-parallel rank {one.rank}: {report.text}"))
            communicator.abort()
            return


def _end(ranks: list[_Rank], fate: _Fate, scratch: Path, communicators: list[ProcessGroup]) -> None:
    """Let the ranks end, or make them, and leave nothing behind."""
    for one in ranks:
        if fate.failure is not None:
            one.process.kill()
        with suppress(OSError):
            one.send(packed(RankStop()))
        # A rank that waits in a collective call sees this; the watching thread sees the rest.
        with suppress(OSError):
            _shut_down(one.pipe)
    for one in ranks:
        processes.end(one.process, _GRACE_S)
    for communicator in communicators:
        communicator.close()
    shutil.rmtree(scratch, ignore_errors=True)


def _shut_down(pipe: "Connection[Any, Any]") -> None:
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        end.shutdown(socket.SHUT_WR)


class Workers:
    """Ranks 1 to size - 1 of one engine."""

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        """Start the processes. Then in this order: `join`, `connect`, `make_caches`, `running`."""
        self._directory = directory
        self._config = config
        self._scratch = Path(tempfile.mkdtemp(prefix="halfbyte-ranks-"))
        self._fate = _Fate()
        self._weight_bytes = 0
        self._ranks: list[_Rank] = []
        self._communicators: list[ProcessGroup] = []
        # Runs at the latest when this process ends, whether or not somebody calls `close`.
        self._finalizer = weakref.finalize(
            self, _end, self._ranks, self._fate, self._scratch, self._communicators
        )
        for rank in range(1, config.tensor_parallel_size):
            self._ranks.append(_start(rank, config.collective_timeout_s))

    def join(self, *, uses_kernels: bool) -> ProcessGroup:
        """Let the other ranks load their parts; this one's communicator, not connected yet."""
        size, timeout_s = self._config.tensor_parallel_size, self._config.collective_timeout_s
        place = self._scratch / "meeting"
        device = torch.device(config_of(self._config, 0).device)
        num_threads = torch.get_num_threads()
        if device.type == "cpu":
            num_threads = max(1, num_threads // size)
            torch.set_num_threads(num_threads)
        for one in self._ranks:
            config = config_of(self._config, one.rank)
            join = Join(self._directory, config, one.rank, place, num_threads, uses_kernels)
            one.send(packed(join))
        self._communicators.append(ProcessGroup(0, size, place, device, timeout_s))
        return self._communicators[0]

    def connect(self) -> None:
        """Meet the others as soon as all have loaded.

        To be called when this rank has loaded, too. Raises what a rank failed of.
        """
        self._weight_bytes = sum(self._expect(one, RankLoaded).weight_bytes for one in self._ranks)
        for one in self._ranks:
            one.send(packed(Connect()))
        self._communicators[0].connect()
        if self._communicators[0].meets_in_file_only:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def free_bytes(self) -> int:
        """What the KV cache may take on the other rank that has least room."""
        return min(self._expect(one, Connected).free_bytes for one in self._ranks)

    @property
    def failure(self) -> str | None:
        """What a rank died of; None while all of them live."""
        return None if self._fate.failure is None else str(self._fate.failure)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, summed over these ranks."""
        return self._weight_bytes

    def make_caches(self, config: EngineConfig) -> None:
        """Let all ranks make the KV cache of a resolved configuration; watch them from now on."""
        for one in self._ranks:
            one.send(packed(MakeCache(config_of(config, one.rank))))
        timeout_s = self._config.collective_timeout_s
        arguments = (list(self._ranks), self._fate, self._communicators[0], timeout_s)
        threading.Thread(target=_watch, args=arguments, name="halfbyte-ranks", daemon=True).start()

    @contextmanager
    def running(self, step: PlannedStep) -> Iterator[None]:
        """Let all ranks compute a step; the body computes this one's part.

        Raises WorkerError, saying what is known, if a rank has died or does not answer.
        """
        message = packed(RunStep(step))
        try:
            for one in self._ranks:
                one.send(message)
            yield
        except (OSError, WorkerError) as error:
            # The news of a death may come a moment later than its effect.
            self._fate.is_decided.wait(_GRACE_S)
            if self._fate.failure is None:
                self._fate.decide(
                    WorkerError(
                        f"a tensor-parallel rank has not answered within "
                        f"{self._config.collective_timeout_s:g} s ({error})"
                    )
                )
            assert self._fate.failure is not None
            raise self._fate.failure from error
        # NCCL lets a step end whose sums are missing.
        if self._fate.failure is not None:
            raise self._fate.failure

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """Context manager around a wait for the device, which may hang in a collective call.

        After the timeout the group is aborted. Raises WorkerError if a rank was lost meanwhile.
        """
        self._fate.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._fate.waiting_since = None
        if self._fate.failure is not None:
            raise self._fate.failure

    def _expect(self, one: _Rank, kind: type[SomeReport]) -> SomeReport:
        report = one.receive()
        if isinstance(report, RankFailed):
            raise report.error or WorkerError(f"tensor-parallel rank {one.rank}: {report.text}")
        assert isinstance(report, kind), f"rank {one.rank} says {report}, not {kind.__name__}"
        return report

    def close(self) -> None:
        """End all ranks and wait for them; can be called again."""
        self._finalizer()


def config_of(config: EngineConfig, rank: int) -> EngineConfig:
    """The configuration as rank `rank` follows it: on its own GPU."""
    return replace(config, device=f"cuda:{rank}") if config.device == "cuda" else config


def found_device(config: EngineConfig) -> EngineConfig:
    """The configuration with a GPU if there is one, where the device is to be found."""
    if config.device != "auto":
        return config
    return replace(config, device="cuda" if torch.cuda.is_available() else "cpu")


def check_device(config: EngineConfig) -> None:
    """Raise UsageError for what is no device, CapacityError for a GPU that is not here."""
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise UsageError(f"device {config.device!r}: cpu, cuda or cuda:1 was expected") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {config.device!r}: cpu, cuda or cuda:1 was expected")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CapacityError(
            f"device {config.device}: no such GPU here ({torch.cuda.device_count()} visible); use "
            "--device cpu"
        )


def check_devices(config: EngineConfig) -> None:
    """Raise UsageError or CapacityError if there is no device for every rank."""
    size, device = config.tensor_parallel_size, torch.device(config.device)
    if device.index is not None and device.type == "cuda":
        raise UsageError(
            f"device {config.device} is one GPU; {size} tensor-parallel ranks use the first {size} "
            'that are visible: say "cuda", and choose them by CUDA_VISIBLE_DEVICES'
        )
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise CapacityError(
            f"tensor-parallel size {size} needs as many GPUs; {torch.cuda.device_count()} visible"
        )
    if device.type == "cpu":
        logger.info("%d tensor-parallel ranks share this machine's processors", size)
