"""Walks over the header of a GGUF file before a library builds objects of it.

A header says how many keys, elements and tensors follow, each in 64 bits, and the library believes
it: a file of 49 bytes keeps it busy for days. This walk keeps nothing; it proves that everything
announced lies inside the file and that there is no more of it than a model has. What keys and
values mean is `gguf`'s business.

Source: the GGUF description of ggml (layout of the header, types of values).
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

from halfbyte.errors import CheckpointError
from halfbyte.files import open_regular, refuse_pointer

_MAGIC = b"GGUF"
# Bytes of a value by its type; strings (8) and arrays (9) say their own length.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

# A llama file has some thirty keys, and nine tensors a layer.
_MAX_KEYS, _MAX_TENSORS = 4096, 16384
# Vocabulary, types and scores of 262,144 tokens; the library takes 3 to 5 us and up to 1 kB for
# each.
_MAX_ELEMENTS = 800_000
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 65535
_MAX_HEADER_BYTES = 128 << 20


def check_header(path: Path) -> None:
    """Raise CheckpointError unless the header is one that can be read whole in a few seconds."""
    try:
        with open_regular(path) as file:
            _Walk(file, path.name).run()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


class _Walk:
    """One pass over one header; counts what it has seen."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self._where = where
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._end = min(self._file_bytes, _MAX_HEADER_BYTES)
        self._at = 0
        self._elements = 0
        self._order = "<"

    def run(self) -> None:
        start = self._file.peek(64)[:64] if hasattr(self._file, "peek") else b""
        refuse_pointer(start, self._where)
        if self._take(4) != _MAGIC:
            raise CheckpointError(f"{self._where} is not a GGUF file (it begins otherwise)")
        version = self._take(4)
        # A file of the other byte order has its low bytes last.
        self._order = "<" if struct.unpack("<I", version)[0] & 0xFFFF else ">"
        tensors, keys = self._number("Q"), self._number("Q")
        if keys > _MAX_KEYS or tensors > _MAX_TENSORS:
            raise self._refuse(f"announces {keys} keys and {tensors} tensors")
        for _ in range(keys):
            self._skip_string(_MAX_NAME_BYTES)
            self._skip_value(self._number("I"))
        for _ in range(tensors):
            self._skip_string(_MAX_NAME_BYTES)
            dimensions = self._number("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._refuse(f"has a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4)
            offset = self._number("Q")
            if offset > self._file_bytes:
                raise self._refuse(f"has a tensor at byte {offset} of its data")

    def _skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self._skip_string(_MAX_HEADER_BYTES)
        elif kind == _ARRAY:
            inner, length = self._number("I"), self._number("Q")
            self._elements += length
            if inner == _ARRAY:
                raise self._refuse("has arrays of arrays")
            if self._elements > _MAX_ELEMENTS:
                raise self._refuse(f"has arrays of {self._elements} elements")
            if inner == _STRING:
                for _ in range(length):
                    self._skip_string(_MAX_NAME_BYTES)
            else:
                self._skip(length * self._size(inner))
        else:
            self._skip(self._size(kind))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise self._refuse(f"has a value of type {kind}, which there is not")
        return _SIZES[kind]

    def _skip_string(self, most: int) -> None:
        length = self._number("Q")
        if length > most:
            raise self._refuse(f"has a text of {length} bytes")
        self._skip(length)

    def _number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        return int(struct.unpack(f"{self._order}{kind}", self._take(size))[0])

    def _take(self, size: int) -> bytes:
        self._advance(size)
        return self._file.read(size)

    def _skip(self, size: int) -> None:
        self._advance(size)
        # Reading is faster than seeking, which drops what the file object has read ahead.
        if size < 4096:
            self._file.read(size)
        else:
            self._file.seek(size, os.SEEK_CUR)

    def _advance(self, size: int) -> None:
        self._at += size
        if self._at > self._end:
            raise self._refuse("ends within its header")

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {what}; it is damaged, or not a file of a llama model"
        )
