"""The manifest of a checkpoint that we wrote: what it came from, and a hash of every tensor.

`ShardWriter` and `quantize` collect the hashes while they write, `verify` recomputes them. Without
it a flipped byte in a checkpoint is visible only beside its source.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.shards import StoredTensor, parse_json, read_bytes
from halfbyte.errors import CheckpointError
from halfbyte.files import hash_regular, is_there, read_bounded

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says; it holds no times or paths, so that equal runs give equal bytes.

    made_of   free facts about what the checkpoint was made of (source, recipe, calibration)
    tensors   foreign name -> sha256 of the tensor's bytes
    files     name of a file beside the shards -> sha256 of its content
    """

    made_of: Mapping[str, Any]
    tensors: Mapping[str, str]
    files: Mapping[str, str]


def manifest_file(
    made_of: Mapping[str, Any], tensors: Mapping[str, str], files: Mapping[str, str]
) -> bytes:
    """The content of the file; parameters as the fields of `Manifest`."""
    value = {
        "made_of": dict(made_of),
        "tensors": dict(sorted(tensors.items())),
        "files": dict(sorted(files.items())),
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a directory, None if there is none; CheckpointError if it is damaged."""
    path = directory / MANIFEST_NAME
    if not is_there(path):
        return None
    try:
        raw = parse_json(read_bounded(path), MANIFEST_NAME)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    for key in ("made_of", "tensors", "files"):
        if not isinstance(raw.get(key), dict):
            raise CheckpointError(f"{MANIFEST_NAME}: {key} must be an object")
    return Manifest(raw["made_of"], raw["tensors"], raw["files"])


def hash_stored(stored: StoredTensor) -> str:
    """sha256 of a tensor's bytes in its file, read in pieces."""
    digest = hashlib.sha256()
    for start in range(0, stored.num_bytes, _CHUNK_BYTES):
        digest.update(read_bytes(stored, start, min(start + _CHUNK_BYTES, stored.num_bytes)))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file; CheckpointError if it cannot be read."""
    try:
        return hash_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
