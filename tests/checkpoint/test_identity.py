"""One checkpoint, one identity; another weight, another one."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.errors import CheckpointError
from halfbyte.model.tiny import write_tiny_checkpoint


def test_every_weight_counts_and_no_name(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "a", layers=2)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    write_tiny_checkpoint(tmp_path / "b", layers=2, seed=5)  # the same headers, other values
    first = checkpoint_identity(tmp_path / "a")
    assert first == checkpoint_identity(tmp_path / "moved") and len(first) == len("tensors:") + 64
    assert first != checkpoint_identity(tmp_path / "b")
    for folder in ("a", "b"):
        for path in tmp_path.glob(f"{folder}/*manifest.json"):
            path.unlink()
    first = checkpoint_identity(tmp_path / "a")
    assert first.startswith("sampled:") and first != checkpoint_identity(tmp_path / "b")
    (shard,) = (tmp_path / "a").glob("*.safetensors")
    tensors = load_file(shard)
    tensors[sorted(tensors)[0]] += 1
    save_file(tensors, shard)
    assert first != checkpoint_identity(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 3}', "\udcff"])
def test_a_manifest_that_is_none_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "halfbyte-manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        checkpoint_identity(tmp_path)


def test_the_order_of_a_manifest_does_not_count(tmp_path: Path) -> None:
    found = []
    for tensors in ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}):
        (tmp_path / "halfbyte-manifest.json").write_text(json.dumps({"tensors": tensors}))
        found.append(checkpoint_identity(tmp_path))
    assert found[0] == found[1]
