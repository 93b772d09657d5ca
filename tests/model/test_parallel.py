"""Shard rules, what a rank reads, and that the ranks' sum is the model."""

import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tolerances
from bounded import relative
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import TextConfig
from halfbyte.errors import UsageError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.linear import Mode
from halfbyte.model.load import load_decoder
from halfbyte.model.parallel import (
    Communicator,
    ProcessGroup,
    Shard,
    Solo,
    check_size,
    embedding_rows,
    shard_of,
    split,
)
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from mixed_checkpoint import write_mixed
from parallel_ranks import on_ranks

IDS = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(0))


def text(**changes: Any) -> TextConfig:
    return replace(tiny_config().text, **changes)


MEDIUM = text(num_heads=96, num_kv_heads=8, head_dim=128, width=12288, mlp_width=28672)


@pytest.mark.parametrize(
    "count, size, unit", [(304, 2, 16), (512, 3, 1), (28672, 8, 16), (5, 7, 1)]
)
def test_shares_cover_everything_once_in_order(count: int, size: int, unit: int) -> None:
    shares = [split(count, rank, size, unit) for rank in range(size)]
    assert list(itertools.chain(*shares)) == list(range(count))
    assert all(share.start % unit == 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= unit
    assert [len(share) for share in shares] == sorted(map(len, shares), reverse=True)


@pytest.mark.parametrize("config, size", [(text(), 2), (text(), 6), (MEDIUM, 8), (MEDIUM, 16)])
def test_every_query_head_finds_its_own_key_head_on_its_rank(config: TextConfig, size: int) -> None:
    group = config.num_heads // config.num_kv_heads
    for rank in range(size):
        shard = shard_of(config, rank, size)
        local_group = len(shard.heads) // len(shard.kv_heads)
        for index, head in enumerate(shard.heads):
            assert shard.kv_heads[index // local_group] == head // group


def test_the_example_of_the_docstring() -> None:
    assert shard_of(text(), 1, 2) == Shard(
        1, 2, range(3, 6), range(1, 2), range(160, 304), range(256, 512)
    )


@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_all_ranks_add_up_to_the_embedding(size: int) -> None:
    """Ids from 512 on are images: rank 0 has their rows behind its zero row."""
    table = torch.arange(1.0, 515.0)[:, None]
    ids = torch.tensor([0, 170, 171, 255, 256, 341, 511, 512, 513])
    total = torch.zeros(len(ids), 1)
    for rank in range(size):
        vocab = split(512, rank, size)
        parts = [table[vocab], torch.zeros(1, 1), *([table[512:]] if rank == 0 else [])]
        total += torch.cat(parts)[embedding_rows(ids, vocab, 512, has_spare=rank == 0)]
    assert torch.equal(total, table[ids])


def test_sizes_that_cut_heads_are_refused_with_those_that_work() -> None:
    smol = text(num_heads=9, num_kv_heads=3, head_dim=64, mlp_width=1536)
    with pytest.raises(
        UsageError, match=r"9 heads with 3 key/value heads.*sizes that work: 1, 3, 9"
    ):
        check_size(smol, 2)
    with pytest.raises(UsageError, match="sizes that work: 1, 2, 6"):
        check_size(text(), 4)
    with pytest.raises(UsageError, match="tensor-parallel size 0"):
        check_size(text(), 0)
    for size in (1, 2, 4, 8, 16):
        check_size(MEDIUM, size)


@dataclass(frozen=True)
class Place(Solo):
    """A rank that loads and never speaks."""

    rank: int
    size: int


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read so far."""
    counts: list[int] = []
    read = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(read(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def test_each_rank_reads_its_slices_and_nothing_else(tmp_path: Path, bytes_read: list[int]) -> None:
    """Rows of `o` and `down` are long enough here that skipping half of one skips a page."""
    config = tiny_config(layers=2)
    heads = replace(config.text, num_heads=64, num_kv_heads=2, head_dim=64, mlp_width=8192)
    write_tiny_checkpoint(tmp_path / "wide", config=replace(config, text=heads))
    checkpoint = Checkpoint.open(tmp_path / "wide")
    split_bytes = sum(
        checkpoint.num_bytes(name) for name in checkpoint.names() if "norm" not in name
    )
    norm_bytes = sum(checkpoint.num_bytes(name) for name in checkpoint.names() if "norm" in name)
    for rank in range(4):
        bytes_read.clear()
        decoder = load_decoder(checkpoint, communicator=Place(rank, 4))
        key_bytes = sum(
            checkpoint.num_bytes(f"decoder.{layer}.attention.{short}.weight")
            for layer in range(2)
            for short in "kv"
        )
        whole = split_bytes - key_bytes
        # Two ranks hold each of the two key/value heads.
        assert sum(bytes_read) == whole // 4 + key_bytes // 2 + norm_bytes
        assert decoder.config.num_kv_heads == 1


def logits_of(decoder: Decoder, step: Step) -> Tensor:
    logits: Tensor = decoder(step)
    return logits


@pytest.mark.parametrize("size", [2, 3, 6])
@pytest.mark.parametrize("tied_head", [False, True])
def test_ranks_together_are_the_model(tmp_path: Path, size: int, tied_head: bool) -> None:
    """In f32 nothing but the order of sums differs. 2: a key head each; 6: three share one."""
    config = tiny_config(layers=2, tied_head=tied_head)
    if size == 3:
        config = replace(config, text=replace(config.text, num_kv_heads=3))
    write_tiny_checkpoint(tmp_path / "model", config=config)
    checkpoint = Checkpoint.open(tmp_path / "model")
    step = Step(IDS, torch.arange(40), DenseAttend([0, 40]))
    alone = logits_of(load_decoder(checkpoint, dtype=torch.float32), step)

    def rank(communicator: Communicator) -> Tensor:
        decoder = load_decoder(checkpoint, dtype=torch.float32, communicator=communicator)
        return logits_of(decoder, step)

    first, *others = on_ranks(size, rank)
    assert relative(first, alone) <= tolerances.GOLDEN_FP32
    assert all(
        other.shape == (0, 512 // size + (512 % size > r + 1)) for r, other in enumerate(others)
    )


@pytest.mark.parametrize("mode", ["weight_only", "declared"])
def test_two_ranks_of_a_mixed_checkpoint_are_as_exact_as_one(tmp_path: Path, mode: Mode) -> None:
    """FP8 attention, NVFP4 MLP cut between 16-blocks (10 and 9); each rounds activations alone."""
    write_mixed(tmp_path / "model", tiny_config(layers=2))
    checkpoint = Checkpoint.open(tmp_path / "model")
    step = Step(IDS, torch.arange(40), DenseAttend([0, 40]))
    exact = logits_of(load_decoder(checkpoint, dtype=torch.float32), step)
    alone = logits_of(load_decoder(checkpoint, mode=mode), step)

    def rank(communicator: Communicator) -> Tensor:
        return logits_of(load_decoder(checkpoint, mode=mode, communicator=communicator), step)

    both, _ = on_ranks(2, rank)
    bound = tolerances.TIMES_PLAIN * relative(alone, exact) + tolerances.HALF_STEP["bfloat16"]
    assert relative(both, exact) <= bound
    assert mode == "declared" or relative(both, alone) <= tolerances.SPLIT_SUMS


def test_image_vectors_reach_every_rank_from_the_first(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", layers=2)
    checkpoint = Checkpoint.open(tmp_path / "model")
    vectors = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(3, 8)
    ids = IDS[:16]

    def run(decoder: Decoder, vectors_ID: Tensor | None) -> Tensor:
        attend = DenseAttend([0, 16])
        return logits_of(decoder, Step(ids, torch.arange(16), attend, None, rows, vectors_ID))

    def rank(communicator: Communicator) -> Tensor:
        decoder = load_decoder(checkpoint, dtype=torch.float32, communicator=communicator)
        return run(decoder, vectors if communicator.rank == 0 else None)

    alone = run(load_decoder(checkpoint, dtype=torch.float32), vectors)
    assert relative(on_ranks(2, rank)[0], alone) <= tolerances.GOLDEN_FP32


def test_what_refers_to_a_group_is_let_go_once_before_it_is_left(tmp_path: Path) -> None:
    group = ProcessGroup(0, 1, tmp_path / "meeting", torch.device("cpu"), 10.0)
    group.connect()
    released: list[str] = []
    group.before_close(lambda: released.append("graphs"))
    group.close()
    group.close()
    assert released == ["graphs"]
