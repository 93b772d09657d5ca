"""Tensor parallelism: which part of the model a rank holds, and how ranks add and collect.

Every rank runs every layer on all tokens, with its share of the heads and of the MLP's features;
what `o` and `down` give are partial sums, added over the ranks. Embedding and head are split by
rows of the vocabulary (decision 0010). `load` reads a rank's slices, `engine.workers` starts the
processes.

Shapes: T tokens, R rows with logits, V vocabulary, I, O features.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.errors import UnsupportedError, UsageError, WorkerError
from halfbyte.formats.nvfp4 import BLOCK
from halfbyte.model.linear import Linear
from halfbyte.modules import WeightFormat


class Communicator(Protocol):
    """The ranks that run one model together. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process's place among the ranks, 0 to size - 1."""

    @property
    def size(self) -> int:
        """Number of ranks that share the model, this one included."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum every rank's `x` into it, the same bits on all ranks; `x` must be dense."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite every rank's `x` with that of rank 0, and return it."""

    def gather(self, x_RO: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Put the ranks' columns side by side on rank 0; the others get no rows.

        widths  columns of each rank; `x_RO` has this rank's
        """

    def before_close(self, release: Callable[[], None]) -> None:
        """Have `release` called when the ranks part, to let go of what refers to their group."""


class Solo:
    """The communicator of a single process that holds every part of the model."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x_RO: Tensor, widths: tuple[int, ...]) -> Tensor:
        del widths
        return x_RO

    def before_close(self, release: Callable[[], None]) -> None:
        del release  # there is no group to leave


class ProcessGroup:
    """Ranks in processes of one machine: gloo over the loopback device on CPUs, NCCL on GPUs.

    The group is an object of its own, not torch's global one: two engines in one process work. A
    call raises WorkerError when a rank is gone, or has not come within `timeout_s`.
    """

    def __init__(
        self, rank: int, size: int, meeting_place: Path, device: torch.device, timeout_s: float
    ) -> None:
        """`meeting_place` is a file that does not exist yet, the same for all ranks.

        The ranks meet in `connect`, so that each may load its weights before.
        """
        self.rank = rank
        self.size = size
        self._meeting_place = meeting_place
        self._device = device
        self._timeout_s = timeout_s
        # torch's classes, whose stubs differ from build to build.
        self._group: Any = None
        self._releases: list[Callable[[], None]] = []

    @property
    def meets_in_file_only(self) -> bool:
        """Whether the meeting place may go once all are connected (NCCL's watchdog reads it on)."""
        return self._device.type != "cuda"

    def connect(self) -> None:
        """Meet the others and say a first word: NCCL takes its memory then."""
        make = _nccl if self._device.type == "cuda" else _gloo
        with _collective():
            store = dist.FileStore(str(self._meeting_place), self.size)  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=self._timeout_s))
            self._group = make(store, self.rank, self.size, self._timeout_s)
        ones = self.all_reduce(torch.ones(1, device=self._device))
        assert ones.item() == self.size, f"{ones.item()} ranks instead of {self.size}"

    def all_reduce(self, x: Tensor) -> Tensor:
        with _collective():
            self._running().allreduce([x], dist.AllreduceOptions()).wait()
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with _collective():
            self._running().broadcast([x], options).wait()
        return x

    def gather(self, x_RO: Tensor, widths: tuple[int, ...]) -> Tensor:
        assert x_RO.shape[1] == widths[self.rank], f"{x_RO.shape[1]} columns, widths {widths}"
        options = dist.GatherOptions()
        options.rootRank = 0
        # All ranks send the same shape: the last columns of a narrow one mean nothing.
        padded_RO = x_RO.new_empty(x_RO.shape[0], max(widths))
        padded_RO[:, : widths[self.rank]] = x_RO
        received = [torch.empty_like(padded_RO) for _ in widths] if self.rank == 0 else []
        with _collective():
            self._running().gather([received] if received else [], [padded_RO], options).wait()
        if not received:
            return x_RO[:0]
        return torch.cat([p[:, :w] for p, w in zip(received, widths, strict=True)], dim=-1)

    def _running(self) -> Any:
        assert self._group is not None, "not connected, or closed"
        return self._group

    def abort(self) -> None:
        """Let calls fail that wait for a rank; from any thread."""
        group = self._group
        if group is not None:
            group.abort()

    def before_close(self, release: Callable[[], None]) -> None:
        self._releases.append(release)

    def close(self) -> None:
        """Leave the group; nothing else may be called then. Can be called again.

        A CUDA graph with a collective call in it keeps NCCL's communicator: until the last one is
        gone, leaving waits, a minute at most, hence `before_close`.
        """
        group, self._group = self._group, None
        releases, self._releases = self._releases, []
        for release in releases:
            release()
        if group is not None and self._device.type == "cuda":
            # Not by way of its destructor, which would wait for the other ranks.
            group.abort()


@contextmanager
def _collective() -> Iterator[None]:
    """What torch raises when ranks cannot reach each other, as ours."""
    try:
        yield
    except RuntimeError as error:
        # Without the place in torch's source, and without its advice.
        message = str(error).partition("\n")[0]
        raise WorkerError(re.sub(r"^\[[^]]*\] ", "", message).partition(". ")[0]) from error


def _gloo(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    if not dist.is_nccl_available():
        raise UnsupportedError("tensor parallelism on GPUs needs a build of torch with NCCL")
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return nccl(store, rank, size, options)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds of a decoder, as ranges of the whole.

    heads, kv_heads  attention heads; with more ranks than key/value heads, several ranks hold the
                     same one
    mlp              features of the MLP, whole 16-blocks where the width is made of them
    vocab            rows of embedding and head

    Example: 6 heads, 2 key/value heads, MLP of 304 (19 blocks), 512 tokens, rank 1 of 2:
      heads 3-5, kv_heads 1, mlp 160-303 (9 blocks), vocab 256-511.
    """

    rank: int
    size: int
    heads: range
    kv_heads: range
    mlp: range
    vocab: range

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def local(self, text: TextConfig) -> TextConfig:
        """The architecture as this rank's layers and cache see it; `vocab_size` stays whole."""
        return replace(
            text,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            mlp_width=len(self.mlp),
        )


def shard_of(text: TextConfig, rank: int, size: int) -> Shard:
    """The part of rank `rank` among `size`; UsageError, naming sizes that work, if none is fair."""
    check_size(text, size)
    heads_per_rank = text.num_heads // size
    if size <= text.num_kv_heads:
        kv_per_rank = text.num_kv_heads // size
        kv_heads = range(rank * kv_per_rank, (rank + 1) * kv_per_rank)
    else:
        kv_head = rank * text.num_kv_heads // size
        kv_heads = range(kv_head, kv_head + 1)
    unit = BLOCK if text.mlp_width % BLOCK == 0 else 1
    return Shard(
        rank,
        size,
        heads=range(rank * heads_per_rank, (rank + 1) * heads_per_rank),
        kv_heads=kv_heads,
        mlp=split(text.mlp_width, rank, size, unit),
        vocab=split(text.vocab_size, rank, size),
    )


def split(count: int, rank: int, size: int, unit: int = 1) -> range:
    """The rank's share of `count` in whole units, the first ranks having one more where it is odd.

    Example: 304 in units of 16 over 2 ranks: 0-159 and 160-303.
    """
    each, more = divmod(count // unit, size)
    start = rank * each + min(rank, more)
    return range(start * unit, (start + each + (rank < more)) * unit)


def check_size(text: TextConfig, size: int) -> None:
    """Raise UsageError if the model cannot be split over `size` ranks."""
    if _divides(text, size):
        return
    working = [n for n in range(1, text.num_heads + 1) if _divides(text, n)]
    raise UsageError(
        f"tensor-parallel size {size}: {text.num_heads} heads with {text.num_kv_heads} key/value "
        f"heads cannot be shared out evenly; sizes that work: {', '.join(map(str, working))}"
    )


def _divides(text: TextConfig, size: int) -> bool:
    """Whole heads for every rank, whose queries need no more key/value heads than the rank has."""
    if size == 1:
        return True
    if size < 1 or text.num_heads % size or size > text.mlp_width // BLOCK:
        return False
    if text.num_kv_heads % size and size % text.num_kv_heads:
        return False
    # An NVFP4 `o` is cut between heads, which must not cut a 16-block.
    return text.num_heads // size * text.head_dim % BLOCK == 0


class Slice(NamedTuple):
    """Rows (axis 0) or columns (axis 1) of a stored tensor, counted as stored."""

    axis: int
    indices: range


def slice_of(
    shard: Shard,
    head_dim: int,
    linear: str,
    role: Literal["weight", "weight_scale"],
    format: WeightFormat,
) -> Slice:
    """A rank's part of a tensor with a row for each output feature of a decoder linear or head.

    Example: `down` in NVFP4 with MLP features 160-303: columns 80-151 of the packed weight, 10-18
    of its block scales.
    """
    short = linear.rsplit(".", 1)[-1]
    if short == "head":
        return Slice(0, shard.vocab)
    if short in ("q", "k", "v"):
        heads = shard.heads if short == "q" else shard.kv_heads
        return Slice(0, range(heads.start * head_dim, heads.stop * head_dim))
    if short in ("gate", "up"):
        return Slice(0, shard.mlp)
    if format == "fp8" and role == "weight_scale":
        return Slice(1, range(1))  # one a row: ranks share columns
    inputs = shard.mlp
    if short == "o":
        inputs = range(shard.heads.start * head_dim, shard.heads.stop * head_dim)
    per_column = 1
    if format == "nvfp4":
        per_column = 2 if role == "weight" else BLOCK
    return Slice(1, range(inputs.start // per_column, inputs.stop // per_column))


def embedding_rows(ids_T: Tensor, vocab: range, vocab_size: int, *, has_spare: bool) -> Tensor:
    """Rows of a rank's embedding table: its part of the vocabulary, a zero row, spare rows.

    Ids from `vocab_size` on are spare rows (vectors of images), which rank 0 alone has. Everything
    that is not here is the zero row, so that the ranks' sum is the embedding.
    Example: rank 1 of 2 with 256-511 of 512: ids [3 256 511 514] are rows [256 0 255 256].
    """
    row_T = ids_T - vocab.start
    zero = len(vocab)
    is_here_T = (row_T >= 0) & (row_T < zero)
    elsewhere_T = torch.full_like(ids_T, zero)
    if has_spare:
        spare_T = ids_T - vocab_size
        elsewhere_T = torch.where(spare_T >= 0, spare_T + zero + 1, elsewhere_T)
    return torch.where(is_here_T, row_T, elsewhere_T)


class SummedLinear:
    """A linear whose input features are spread over the ranks: partial sums, added in f32."""

    def __init__(self, linear: Linear, communicator: Communicator) -> None:
        self._linear = linear
        self._communicator = communicator
        self.num_bytes = linear.num_bytes

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Multiply as `Linear` does, rounded once after the sum, like one process's product."""
        partial_TO = self._linear(x_TI, torch.float32)
        return self._communicator.all_reduce(partial_TO).to(out_dtype or x_TI.dtype)
