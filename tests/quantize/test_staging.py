"""Shards of known layout: any order of writing, other readers, a disk that is too small."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.checkpoint.fields import model_config
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import Quantization
from halfbyte.checkpoint.shard_plan import plan_shards
from halfbyte.checkpoint.writer import OutputInProgress, ShardWriter
from halfbyte.errors import CapacityError, UsageError
from halfbyte.quantize.export import export_name
from halfbyte.quantize.staging import locked, work_directory
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

DATA = Path(__file__).parents[1] / "data/checkpoint"
TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.scale": torch.tensor(2.5),
    "c.codes": torch.arange(40, dtype=torch.int32).to(torch.uint8).view(8, 5),
    "d.block": torch.ones(4, 2).to(torch.float8_e4m3fn),
}
SHAPES = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


def staged(tmp_path: Path, max_shard_bytes: int = 60) -> OutputInProgress:
    work = work_directory(tmp_path / "out")
    work.mkdir()
    return OutputInProgress(work, tmp_path / "out", plan_shards(SHAPES, max_shard_bytes))


@pytest.mark.parametrize("max_shard_bytes", [1, 60, 10**9])
def test_other_readers_find_every_tensor(tmp_path: Path, max_shard_bytes: int) -> None:
    staging = staged(tmp_path, max_shard_bytes)
    staging.create()
    for name in sorted(TENSORS, reverse=True):
        digest = staging.write(name, TENSORS[name])
        stored = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert digest == hashlib.sha256(stored).hexdigest()
    staging.publish()
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    expected = {1: 4, 60: 2, 10**9: 1}[max_shard_bytes]
    assert len(files) == expected
    has_index = (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert has_index == (expected > 1)
    loaded = {k: v for file in files for k, v in load_file(tmp_path / "out" / file).items()}
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(
            loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_published_before_the_end(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    staging.create()
    staging.write("a.scale", TENSORS["a.scale"])
    staging.close()
    assert not (tmp_path / "out").exists()
    again = OutputInProgress(staging.directory, tmp_path / "out", plan_shards(SHAPES, 60))
    again.reopen()
    for name in ("b.weight", "c.codes", "d.block"):
        again.write(name, TENSORS[name])
    again.publish()
    first = next((tmp_path / "out").glob("model-00001*"))
    assert float(load_file(first)["a.scale"]) == 2.5


def test_files_of_another_size_are_not_gone_on_with(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    staging.create()
    staging.close()
    path = staging.directory / "checkpoint" / "model-00001-of-00002.safetensors"
    os.truncate(path, 10)
    with pytest.raises(UsageError, match="--restart"):
        staging.reopen()
    staging.close()


def test_a_full_disk_is_said_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    staging = staged(tmp_path)
    with pytest.raises(CapacityError, match="disk full while allocating"):
        staging.create()
    staging.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_file_limit_while_writing_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = staged(tmp_path)
    staging.create()

    def refuse(handle: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(CapacityError, match=r"writing a\.scale"):
        staging.write("a.scale", TENSORS["a.scale"])
    staging.close()


def test_two_runs_do_not_share_a_work_directory(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "work"),
        pytest.raises(UsageError, match="another run"),
        locked(tmp_path / "work"),
    ):
        pass
    with locked(tmp_path / "work"):
        pass


def header_bytes(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("length", range(1, 10))
def test_data_begins_at_a_multiple_of_eight(tmp_path: Path, length: int) -> None:
    """Whoever maps the file reads numbers of eight bytes; both of our writers see to it."""
    tensors = {"n" * length: torch.arange(3.0), "m": torch.arange(5.0)}
    shapes = {name: ((t.numel(),), t.dtype) for name, t in tensors.items()}
    plan = plan_shards(shapes, 10**9)
    assert len(plan.headers[0]) % 8 == 0
    assert int.from_bytes(plan.headers[0][:8], "little") + 8 == len(plan.headers[0])
    # As short as that allows: no more padding than needed.
    assert (
        plan.headers[0].endswith(b"}") or len(plan.headers[0].rstrip()) > len(plan.headers[0]) - 8
    )
    with ShardWriter(tmp_path / "out", shapes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()
    path = tmp_path / "out" / "model.safetensors"
    assert header_bytes(path) % 8 == 0
    text = path.read_bytes()[8 : 8 + header_bytes(path)]
    assert len(text.rstrip()) > len(text) - 8
    assert load_file(path)["m"].tolist() == [0, 1, 2, 3, 4]


def test_a_shard_of_exactly_the_largest_size_is_whole() -> None:
    sizes = {"a": ((10,), torch.uint8), "b": ((20,), torch.uint8), "c": ((30,), torch.uint8)}
    for most, shards in ((60, 1), (59, 2), (30, 2), (29, 3), (1, 3)):
        assert len(plan_shards(sizes, most).headers) == shards, most


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_only_a_full_disk_is_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    staging = staged(tmp_path)
    staging.create()

    def refuse(handle: int, data: bytes, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        staging.write("a.scale", TENSORS["a.scale"])
    assert caught.value.errno == number
    staging.close()


def test_the_index_counts_as_the_reference_does() -> None:
    """Codes count, a packed byte once, scales do not: the sums of Model Optimizer's own index."""
    raw = json.loads((DATA / "modelopt-tiny" / "source-config.json").read_text())
    config = model_config(raw, has_head=True)
    plan = make_plan(load_recipe("medium-3.5"), config)
    quantization = Quantization("modelopt", plan.formats, plan.kv_cache)
    wanted = expected_tensors(config, quantization)
    shapes = {export_name(name, "hf"): (x.shape, x.dtypes[0]) for name, x in wanted.items()}
    index = plan_shards(shapes, 10**6).index()
    assert index is not None
    assert index["metadata"] == {"total_parameters": 4_163_520, "total_size": 4_844_928}
