"""What tells one checkpoint from every other: a hash that records carry and a card asks for.

Needs no torch, so that whoever sees only the wire can take it too.
"""

import hashlib
import json
from pathlib import Path

from halfbyte.errors import CheckpointError
from halfbyte.files import is_there, open_regular, parse_json_text, read_bounded

MANIFEST_NAME = "halfbyte-manifest.json"
_PIECES, _PIECE_BYTES = 64, 4096
# A header has no more than this by the format's own rule.
_MAX_HEADER_BYTES = 100 << 20


def checkpoint_identity(directory: Path) -> str:
    """The identity of a checkpoint directory, such as `tensors:3f1c...` (sha256, 64 digits).

    tensors  over the manifest's hashes of all tensors: two checkpoints share it only if every
             weight and scale is equal. Whether the files are what the manifest says, `verify` asks
    sampled  without a manifest: over sizes, headers and 64 evenly spaced pieces of every shard

    Names of files and folders do not count. Raises CheckpointError if a file cannot be read.
    """
    try:
        if is_there(directory / MANIFEST_NAME):
            told = parse_json_text(read_bounded(directory / MANIFEST_NAME))
            tensors = told.get("tensors") if isinstance(told, dict) else None
            if not isinstance(tensors, dict):
                raise CheckpointError(f"{directory / MANIFEST_NAME}: tensors must be an object")
            listed = json.dumps(tensors, sort_keys=True).encode()
            return f"tensors:{hashlib.sha256(listed).hexdigest()}"
        digest = hashlib.sha256()
        for path in sorted(directory.glob("*.safetensors")):
            digest.update(_sample(path))
        return f"sampled:{digest.hexdigest()}"
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} has no identity: {error}") from error


def _sample(path: Path) -> bytes:
    """Hash of a shard's size, header and pieces, as far as it goes."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(length, _MAX_HEADER_BYTES)))
        for start in range(0, num_bytes, max(1, num_bytes // _PIECES)):
            file.seek(start)
            digest.update(file.read(_PIECE_BYTES))
    return digest.digest()
