"""Hostile and damaged files: each is refused by a message that names shard and tensor."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte.checkpoint.shards import (
    StoredTensor,
    parse_json,
    read_bytes,
    read_columns,
    read_header,
    read_rows,
    read_whole,
    scan,
)
from halfbyte.errors import CheckpointError

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(path: Path, header: object, data: bytes = b"", *, text: bytes | None = None) -> Path:
    encoded = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4).to(torch.bfloat16),
        "b": torch.tensor(0.5),
        "c": torch.randint(0, 255, (5, 2), dtype=torch.uint8),
        "d": torch.randn(2, 3, 4).to(torch.float8_e4m3fn),
        "e": torch.empty(0, 7),
        "f": torch.arange(3),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        back = read_whole(found[name])
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        assert back.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, StoredTensor]:
    path = tmp_path_factory.mktemp("matrix") / "x.safetensors"
    weight = torch.randn(17, 12).to(torch.bfloat16)
    save_file({"before": torch.zeros(3), "w": weight}, path)
    return weight, read_header(path)[0]["w"]


@given(data=st.data())
def test_rows_and_columns_are_slices(
    matrix: tuple[torch.Tensor, StoredTensor], data: st.DataObject
) -> None:
    weight, stored = matrix
    for axis, read in ((0, read_rows), (1, read_columns)):
        start = data.draw(st.integers(0, weight.shape[axis]))
        stop = data.draw(st.integers(start, weight.shape[axis]))
        wanted = weight.narrow(axis, start, stop - start)
        assert read(stored, start, stop).equal(wanted)


@given(data=st.data())
def test_bytes_are_those_of_the_file(
    matrix: tuple[torch.Tensor, StoredTensor], data: st.DataObject
) -> None:
    weight, stored = matrix
    everything = weight.view(torch.uint8).numpy().tobytes()
    start = data.draw(st.integers(0, len(everything)))
    stop = data.draw(st.integers(start, len(everything)))
    assert bytes(read_bytes(stored, start, stop)) == everything[start:stop]


def test_a_tensor_without_rows_or_columns_has_slices(tmp_path: Path) -> None:
    tensors = {"rowless": torch.empty(0, 7), "narrow": torch.empty(7, 0), "w": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")[0]
    assert read_rows(found["rowless"], 0, 0).shape == (0, 7)
    assert read_columns(found["rowless"], 2, 5).shape == (0, 3)
    assert read_rows(found["narrow"], 2, 5).shape == (3, 0)
    assert read_columns(found["narrow"], 0, 0).shape == (7, 0)


# Two rows at once, or less than one: a single row may be larger than what is read at once.
@pytest.mark.parametrize("chunk_bytes", [50, 5])
def test_columns_of_a_big_tensor_come_in_chunks(
    matrix: tuple[torch.Tensor, StoredTensor], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("halfbyte.checkpoint.shards._CHUNK_BYTES", chunk_bytes)
    weight, stored = matrix
    assert read_columns(stored, 3, 9).equal(weight[:, 3:9])
    assert read_whole(stored).equal(weight)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {**A, "dtype": "F9"}}, b"x" * 8, "a: unknown dtype 'F9'"),
        ({"a": {**A, "dtype": ["F32"]}}, b"x" * 8, "a: unknown dtype"),
        ({"a": {**A, "shape": [-2]}}, b"x" * 8, "a: bad shape"),
        ({"a": {**A, "shape": [True]}}, b"x" * 8, "a: bad shape"),
        ({"a": {**A, "shape": [2.0]}}, b"x" * 8, "a: bad shape"),
        ({"a": {**A, "shape": [1] * 9}}, b"x" * 8, "a: bad shape"),
        ({"a": {**A, "data_offsets": [0]}}, b"x" * 8, "a: bad data_offsets"),
        ({"a": {**A, "data_offsets": [-8, 0]}}, b"x" * 8, "a: bad data_offsets"),
        ({"a": {**A, "data_offsets": [8, 0]}}, b"x" * 8, "a: F32 .* needs 8 bytes"),
        ({"a": {**A, "shape": [1 << 60, 1 << 60]}}, b"x" * 8, "a: F32 .* needs"),
        ({"a": {**A, "extra": 1}}, b"x" * 8, "a: needs exactly"),
        ({"a": [1, 2]}, b"", "a: needs exactly"),
        ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, b"x" * 12, "b overlaps"),
        ({"a": A, "b": A}, b"x" * 8, "overlaps"),
        ({"a": A, "b": {**A, "data_offsets": [12, 20]}}, b"x" * 20, "b follows a hole"),
        ({"a": A}, b"x" * 7, "truncated: a ends at byte"),
        ({"a": A}, b"x" * 9, "1 bytes after the last tensor"),
        ({"__metadata__": {"format": 3}, "a": A}, b"x" * 8, "__metadata__"),
        ([A], b"x" * 8, "a JSON object was expected"),
    ],
)
def test_bad_header_is_refused_by_name(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"^model.safetensors: .*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"1234567", "7 bytes, too short"),
        (struct.pack("<Q", 1 << 63) + b"{}", "truncated, or no safetensors"),
        (struct.pack("<Q", 3) + b"{}", "truncated, or no safetensors"),
        (struct.pack("<Q", 2) + b"{\xff", "is not JSON"),
        (struct.pack("<Q", 6) + b"[" * 6, "is not JSON"),
        (b"\x80\x02]q\x00(K\x01K\x02e." + b"\x00" * 40, "truncated, or no safetensors"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "model.safetensors")


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    entry = json.dumps(A)
    text = f'{{"a": {entry}, "b": {entry}, "a": {entry}}}'.encode()
    path = raw_file(tmp_path / "model.safetensors", None, b"x" * 8, text=text)
    with pytest.raises(CheckpointError, match="'a' occurs twice"):
        read_header(path)


def test_deeply_nested_json_is_an_error_not_a_crash() -> None:
    with pytest.raises(CheckpointError, match=r"x\.json is not JSON"):
        parse_json(b"[" * 200_000, "x.json")


@given(st.binary(max_size=300))
def test_random_bytes_never_do_anything_else(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(struct.pack("<Q", min(len(content), 40)) + content)
    with pytest.raises(CheckpointError):
        read_header(path)


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    stored = read_header(path)[0]["w"]
    with path.open("rb+") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match=r"model.safetensors: ended within w"):
        read_whole(stored)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"w cannot be read"):
        read_whole(stored)


def two_shards(directory: Path) -> dict[str, str]:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, directory / names[0])
    save_file({"c": torch.zeros(2)}, directory / names[1])
    return {"a": names[0], "b": names[0], "c": names[1]}


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_index_and_shards_that_agree(tmp_path: Path) -> None:
    write_index(tmp_path, two_shards(tmp_path))
    assert set(scan(tmp_path)) == {"a", "b", "c"}


def test_a_tensor_the_index_promises_and_the_shard_lacks(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    write_index(tmp_path, {**weight_map, "d": weight_map["a"], "e": weight_map["c"]})
    with pytest.raises(CheckpointError, match=r"00001-of-00002.*lacks d .* 1 others missing"):
        scan(tmp_path)


def test_a_tensor_the_index_does_not_know(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    del weight_map["b"]
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"holds b, which .* puts nowhere"):
        scan(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    save_file({"a": torch.zeros(2), "c": torch.zeros(2)}, tmp_path / weight_map["c"])
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="a: stored in both"):
        scan(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    (tmp_path / weight_map["c"]).unlink()
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*: missing; .* 1 tensors"):
        scan(tmp_path)


def test_a_shard_the_index_does_not_list(tmp_path: Path) -> None:
    weight_map = two_shards(tmp_path)
    write_index(tmp_path, {name: shard for name, shard in weight_map.items() if name != "c"})
    with pytest.raises(CheckpointError, match=r"does not list model-00002.*stale"):
        scan(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", 3, None]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, shard: object) -> None:
    two_shards(tmp_path)
    write_index(tmp_path, {"a": shard})
    with pytest.raises(CheckpointError, match="is not a shard beside it"):
        scan(tmp_path)


def test_an_index_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(tmp_path, two_shards(tmp_path))

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("halfbyte.checkpoint.shards.read_bounded", refused)
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read \(Permission denied\)"):
        scan(tmp_path)


def test_an_empty_index_and_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors"):
        scan(tmp_path)
    two_shards(tmp_path)
    with pytest.raises(CheckpointError, match="2 shards but no"):
        scan(tmp_path)
    write_index(tmp_path, {})
    with pytest.raises(CheckpointError, match="no weight_map"):
        scan(tmp_path)
