"""A source is known from as little of it as there is, and contradictions are named."""

import json
import shutil
from pathlib import Path

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.survey import survey


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("survey") / "fp8"
    write_tiny_checkpoint(directory, layers=6, dialect="mistral-fp8", vision=True)
    return directory


def _shard(directory: Path) -> Path:
    return directory / "model.safetensors"


def _names(directory: Path) -> list[str]:
    with _shard(directory).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def _config_only(whole: Path, to: Path) -> Path:
    to.mkdir()
    shutil.copy(whole / "config.json", to)
    return to


def _with_index(whole: Path, to: Path, total: int, *, without: str | None = None) -> Path:
    _config_only(whole, to)
    weight_map = {n: "model-00001-of-00002.safetensors" for n in _names(whole) if n != without}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


def test_weights_headers_index_and_config_tell_the_same(whole: Path, tmp_path: Path) -> None:
    full = survey(whole)
    assert full.checkpoint is not None and full.basis == "the weights"
    headers = _config_only(whole, tmp_path / "headers")
    data = _shard(whole).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    for end in (size, size + 1000):  # a download that stopped early
        _shard(headers).write_bytes(data[:end])
        cut = survey(headers)
        assert cut.checkpoint is None and cut.basis == "config and headers"
        assert (cut.num_bytes, cut.stated_bytes) == (full.num_bytes, full.num_bytes)
    index = survey(_with_index(whole, tmp_path / "index", full.num_bytes))
    assert index.basis == "config and index"
    alone = survey(_config_only(whole, tmp_path / "config"))
    assert alone.basis == "the config alone" and alone.stated_bytes is None
    for other in (cut, index, alone):
        assert (other.config, other.quantization) == (full.config, full.quantization)
        assert other.num_tensors == full.num_tensors
    assert index.num_bytes == full.num_bytes
    # Without tensors nobody knows whether the FP8 scalars have two bytes or four.
    scalars = 2 * 7 * full.config.text.num_layers
    assert 0 <= full.num_bytes - alone.num_bytes <= 2 * scalars


def test_shards_that_an_index_promises_are_the_weights_once_all_are_there(
    whole: Path, tmp_path: Path
) -> None:
    folder = _with_index(whole, tmp_path / "sharded", survey(whole).num_bytes)
    name = "model-00001-of-00002.safetensors"
    shutil.copy(_shard(whole), folder / name)
    found = survey(folder)
    assert found.basis == "the weights" and found.checkpoint is not None
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert survey(folder).checkpoint is None


def test_an_index_that_lies_about_its_size_is_not_believed(whole: Path, tmp_path: Path) -> None:
    found = survey(_with_index(whole, tmp_path / "index", 12345))
    assert found.stated_bytes == 12345
    assert abs(found.num_bytes - survey(whole).num_bytes) <= 2 * 2 * 7 * 6


def test_names_that_the_config_does_not_ask_for_are_refused(whole: Path, tmp_path: Path) -> None:
    gone = next(name for name in _names(whole) if name.endswith("down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight"):
        survey(_with_index(whole, tmp_path / "less", 0, without=gone))
    more = _with_index(whole, tmp_path / "more", 0)
    path = more / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.language_model.layers.99.mlp.up_proj.weight"] = "x.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layers\.99"):
        survey(more)


def test_a_header_that_is_cut_off_is_named(whole: Path, tmp_path: Path) -> None:
    cut = _config_only(whole, tmp_path / "cut")
    _shard(cut).write_bytes(_shard(whole).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"header of .* truncated"):
        survey(cut)


def test_a_folder_without_anything_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        survey(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        survey(tmp_path)
