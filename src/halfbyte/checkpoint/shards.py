"""Safetensors files at the byte level: headers parsed and checked by us, tensors read on demand.

Nothing here knows what a tensor means; `reader` does. A file is untrusted input: every offset,
size, dtype and shape is checked before a byte of data is read, and nothing is ever unpickled.

Source: the safetensors format description (8-byte little-endian header length, JSON header, data
without holes). Tensors are read into memory of our own rather than mapped: a file that shrinks
while mapped kills the process, and mapped pages count against a memory budget unpredictably.
"""

import os
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError, in_words, shown
from halfbyte.files import is_there, open_regular, parse_json_text, read_bounded, refuse_pointer

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Room for 150,000 tensors in one file. The format's own reader allows six times as much, which can
# become gigabytes of objects before any of it is checked.
MAX_HEADER_BYTES = 16 << 20
# No tensor comes near it, and sums of such sizes can still be printed.
_MAX_SIZE = 2**63 - 1
# The longest names of checkpoints known to us have some 80.
_MAX_NAME_CHARACTERS = 1000
INDEX_NAME = "model.safetensors.index.json"
# One read moves at most this much at a time, so that a slice of columns needs little memory.
_CHUNK_BYTES = 64 << 20
# Holes in a row that are smaller than this are read too: a disk delivers whole pages anyway.
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `offset` counts from the start of file `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(
    path: Path, *, needs_data: bool = True
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file and its metadata, everything checked against the size.

    needs_data   false: the file may end anywhere after its header, as one of which only the
                 beginning was fetched does

    Raises CheckpointError that names the file, and the tensor where one is at fault.
    """
    try:
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(64)
            refuse_pointer(start, path)
            if len(start) < 8:
                raise CheckpointError(f"{path.name}: {file_bytes} bytes, too short for a header")
            (header_bytes,) = struct.unpack("<Q", start[:8])
            if header_bytes > file_bytes - 8:
                raise CheckpointError(
                    f"{path.name}: header of {header_bytes} bytes in a file of {file_bytes}; "
                    "truncated, or no safetensors file"
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path.name}: header of {header_bytes} bytes; {MAX_HEADER_BYTES} at most are "
                    "read"
                )
            file.seek(8)
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    header = parse_json(text, path.name)
    metadata = _metadata(header.pop("__metadata__", {}), path.name)
    data = 8 + header_bytes
    tensors = {name: _entry(name, entry, path, data) for name, entry in header.items()}
    if needs_data:
        _check_tiling(tensors, path.name, data, file_bytes)
    return tensors, metadata


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without repeated keys; CheckpointError naming `where` otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{where}: {shown(twice)} occurs twice")
        return result

    try:
        value = parse_json_text(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({in_words(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, not {shown(value)}")
    return value


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{where}: __metadata__ must map strings to strings")
    return value


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _check_name(name: str, where: str) -> None:
    """Refuse a name that would not stand as it is in a message of one line."""
    if not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS:
        raise CheckpointError(f"{where}: a tensor is called {shown(name)}; no name of ours is so")


def _entry(name: str, entry: object, path: Path, start: int) -> StoredTensor:
    _check_name(name, path.name)
    where = f"{path.name}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {shown(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: bad shape {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{where}: bad data_offsets {shown(offsets)}")
    begin, end = offsets
    num_bytes = prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{where}: {entry['dtype']} {shape} needs {num_bytes} bytes, offsets give {end - begin}"
        )
    return StoredTensor(name, path, dtype, tuple(shape), start + begin, num_bytes)


def _check_tiling(
    tensors: dict[str, StoredTensor], where: str, start: int, file_bytes: int
) -> None:
    """Tensors must cover the data exactly: no overlap, no hole, nothing missing or left over."""
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "follows a hole"
            raise CheckpointError(f"{where}: {tensor.name} {what}")
        end = tensor.offset + tensor.num_bytes
        if end > file_bytes:
            raise CheckpointError(
                f"{where}: truncated: {tensor.name} ends at byte {end}, the file has {file_bytes}"
            )
    if end != file_bytes:
        raise CheckpointError(f"{where}: {file_bytes - end} bytes after the last tensor")


def scan(directory: Path, *, native: bool = False) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint directory, the index checked against the shards both ways.

    native   read `consolidated*.safetensors` instead of `model*.safetensors`

    Raises CheckpointError for a missing, damaged or unlisted shard, and for a tensor that only
    one of index and shard knows.
    """
    stem = "consolidated" if native else "model"
    files = sorted(path.name for path in directory.glob(f"{stem}*.safetensors"))
    index_path = directory / f"{stem}.safetensors.index.json"
    if not is_there(index_path):
        if not files:
            raise CheckpointError(f"{directory} has no {stem}*.safetensors")
        if len(files) > 1:
            raise CheckpointError(f"{directory}: {len(files)} shards but no {index_path.name}")
        return read_header(directory / files[0])[0]
    weight_map = read_weight_map(index_path)
    unlisted = sorted(set(files) - set(weight_map.values()))
    if unlisted:
        raise CheckpointError(
            f"{index_path.name} does not list {', '.join(unlisted)}; is it stale?"
        )
    return _join(directory, weight_map, index_path.name)


def read_weight_map(index_path: Path) -> dict[str, str]:
    """`weight_map` of an index; each shard must be a plain file name beside it."""
    try:
        index = parse_json(read_bounded(index_path), index_path.name)
    except OSError as error:
        raise CheckpointError(f"{index_path}: cannot be read ({error.strerror})") from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path.name} has no weight_map")
    for name, shard in weight_map.items():
        _check_name(name, index_path.name)
        plain = isinstance(shard, str) and shard == Path(shard).name and shard.strip(".") != ""
        plain = plain and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path.name}: {name}: {shown(shard)} is not a shard beside it"
            )
    return weight_map


def _join(directory: Path, weight_map: dict[str, str], where: str) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if not is_there(path):
            names = sorted(name for name, home in weight_map.items() if home == shard)
            raise CheckpointError(
                f"{shard}: missing; {where} promises {len(names)} tensors in it ({names[0]}, …)"
            )
        for name, tensor in read_header(path)[0].items():
            if name in found:
                raise CheckpointError(f"{name}: stored in both {found[name].path.name} and {shard}")
            if weight_map.get(name) != shard:
                home = weight_map.get(name, "nowhere")
                raise CheckpointError(f"{shard} holds {name}, which {where} puts {home}")
            found[name] = tensor
    lost = [name for name in weight_map if name not in found]
    if lost:
        more = f"; found {len(lost) - 1} others missing" if len(lost) > 1 else ""
        raise CheckpointError(f"{weight_map[lost[0]]}: lacks {lost[0]} ({where} promises it){more}")
    return found


def read_whole(stored: StoredTensor) -> Tensor:
    """Read a tensor into memory of its own."""
    out = torch.empty(stored.shape, dtype=stored.dtype)
    _fill(stored, out, stored.offset)
    return out


def read_rows(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the first axis, and only their bytes."""
    _check_range(stored, 0, start, stop)
    out = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
    row_bytes = stored.num_bytes // max(stored.shape[0], 1)
    _fill(stored, out, stored.offset + start * row_bytes)
    return out


def read_columns(stored: StoredTensor, start: int, stop: int) -> Tensor:
    """Read columns [start, stop) along the second axis.

    Reads only their bytes, except where a row's other columns fill less than a page; of those at
    most a chunk is in memory.
    """
    _check_range(stored, 1, start, stop)
    rows = stored.shape[0]
    out = torch.empty((rows, stop - start, *stored.shape[2:]), dtype=stored.dtype)
    if out.numel() == 0:
        return out
    row_bytes = stored.num_bytes // rows
    column_bytes = row_bytes // stored.shape[1]
    flat = out.reshape(rows, -1).view(torch.uint8)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for row in range(0, rows, step):
        fill_columns(stored, flat[row : row + step], row, start * column_bytes)
    return out


def fill_columns(stored: StoredTensor, out: Tensor, first_row: int, start_byte: int) -> None:
    """Read a range of bytes of some rows into `out`, uint8 (rows, bytes of each), contiguous.

    Holes between them are read only if they are smaller than a page.
    """
    row_bytes = stored.num_bytes // stored.shape[0]
    offset = stored.offset + first_row * row_bytes
    if row_bytes - out.shape[1] >= _PAGE_BYTES:
        _fill_strided(stored, out, offset + start_byte, row_bytes)
        return
    whole = torch.empty(out.shape[0], row_bytes, dtype=torch.uint8)
    _fill(stored, whole, offset)
    out.copy_(whole[:, start_byte : start_byte + out.shape[1]])


def _check_range(stored: StoredTensor, axis: int, start: int, stop: int) -> None:
    assert axis < len(stored.shape), f"{stored.name}: no axis {axis} in {stored.shape}"
    assert 0 <= start <= stop <= stored.shape[axis], (
        f"{stored.name}: [{start}, {stop}) of {stored.shape[axis]}"
    )


def read_bytes(stored: StoredTensor, start: int, stop: int) -> memoryview:
    """Bytes [start, stop) of the tensor's data, as they lie in the file."""
    out = torch.empty(stop - start, dtype=torch.uint8)
    _fill(stored, out, stored.offset + start)
    return bytes_of(out)


def _fill(stored: StoredTensor, out: Tensor, offset: int) -> None:
    """Read bytes from `offset` on into all of `out`, which is contiguous."""
    _fill_strided(stored, out.view(1, out.numel()), offset, 0)


def _fill_strided(stored: StoredTensor, out: Tensor, offset: int, stride_bytes: int) -> None:
    """Read row i of contiguous `out` from byte `offset + i * stride_bytes` on."""
    if out.numel() == 0:
        return
    buffer = bytes_of(out)
    row_bytes = len(buffer) // out.shape[0]
    try:
        with open_regular(stored.path, buffering=0) as file:
            for row in range(out.shape[0]):
                part = buffer[row * row_bytes : (row + 1) * row_bytes]
                _read_at(file.fileno(), part, offset + row * stride_bytes, stored)
    except OSError as error:
        raise CheckpointError(
            f"{stored.path.name}: {stored.name} cannot be read ({error.strerror})"
        ) from error


def _read_at(descriptor: int, buffer: memoryview, offset: int, stored: StoredTensor) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done : done + _CHUNK_BYTES]], offset + done)
        if got == 0:
            raise CheckpointError(
                f"{stored.path.name}: ended within {stored.name}; changed while being read?"
            )
        done += got


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, not copied, as bytes that may be written to."""
    # numpy arrays offer the buffer protocol; its type stubs say so from Python 3.12 on only.
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
