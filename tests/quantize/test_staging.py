"""Shards of known layout: any order of writing, other readers, a disk that is too small."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import CapacityError, UsageError
from halfbyte.quantize.staging import Staging, locked, plan_shards, work_directory

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.scale": torch.tensor(2.5),
    "c.codes": torch.arange(40, dtype=torch.int32).to(torch.uint8).view(8, 5),
    "d.block": torch.ones(4, 2).to(torch.float8_e4m3fn),
}
SHAPES = {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


def staged(tmp_path: Path, max_shard_bytes: int = 60) -> Staging:
    work = work_directory(tmp_path / "out")
    work.mkdir()
    return Staging(work, tmp_path / "out", plan_shards(SHAPES, max_shard_bytes))


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
    again = Staging(staging.directory, tmp_path / "out", plan_shards(SHAPES, 60))
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
