"""Damaged checkpoints: whatever was done to the files, a sentence and no traceback.

Bits are flipped, files are cut, values in headers and configs become values of other types and
sizes. What is still a checkpoint after that is read; nothing else may come of it.
"""

import copy
import gc
import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.metadata import read_config
from halfbyte.checkpoint.overview import overview
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.errors import HalfbyteError
from halfbyte.quantize.survey import survey

# Values of every kind that JSON has, and of sizes that nobody expects.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**63), 10**4000, 0.5, -0.0, 1e308,
    1e-308, float("nan"), float("inf"), "", "x", "\x00", "\ud800", "../../etc/passwd",
    "a" * 5000, [], {}, [[]], [1], [None], ["x"], {"a": 1}, [0, 2**63], [2**62, 2**62], "BF16",
    "F8_E4M3", "yarn",
]  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, make: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    for name, dialect, layout in (
        ("plain", "none", "hf"),
        ("fp8", "mistral-fp8", "hf-text"),
        ("export", "modelopt", "hf"),
        ("native", "mistral-fp8", "mistral"),
    ):
        make.checkpoint(root / name, dialect, layout)
    shutil.copytree(root / "plain", root / "indexed")
    with_index(root / "indexed")
    return {path.name: path for path in root.iterdir()}


def with_index(directory: Path) -> None:
    """Rename the one shard and list it in an index."""
    names = [name for name in header_of(directory / "model.safetensors") if name[0] != "_"]
    shard = "model-00001-of-00001.safetensors"
    os.rename(directory / "model.safetensors", directory / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header


def put_header(path: Path, header: dict[str, Any]) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    text = json.dumps(header).encode("utf-8")
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each key or index in it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def swap_values(raw: Any, rng: random.Random) -> None:
    """Put odd values into a JSON value, take some out, add some, rename some."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        found = list(places(raw))
        if not found:
            return
        where, key = rng.choice(found)
        what = rng.random()
        if what < 0.7:
            where[key] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.85:
            del where[key]
        elif isinstance(where, dict):
            where[rng.choice(["x", "rope_type", "0", "layers", str(key) + "x"])] = where.pop(key)
        else:
            where.append(copy.deepcopy(rng.choice(VALUES)))


def spoil(directory: Path, rng: random.Random) -> None:
    """Damage one file of a checkpoint in one of many ways."""
    path = rng.choice([p for p in sorted(directory.iterdir()) if p.stat().st_size])
    content = bytearray(path.read_bytes())
    is_shard = path.suffix == ".safetensors"
    way = rng.choice(["bits", "cut", "values", "values", "values", "bytes", "swap"])
    if way == "values":
        raw = header_of(path) if is_shard else json.loads(content)
        swap_values(raw, rng)
        put_header(path, raw) if is_shard else path.write_text(json.dumps(raw))
        return
    if way == "cut":
        content = content[: rng.randrange(len(content))]
    elif way == "swap":
        others = [p for p in directory.iterdir() if p != path]
        content = bytearray(rng.choice(others).read_bytes()) if others else content
    else:
        size = min(len(content), 20_000 if is_shard else len(content))
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(size)
            content[at] = (
                content[at] ^ 1 << rng.randrange(8) if way == "bits" else rng.randrange(256)
            )
    path.write_bytes(bytes(content))


LOOKS: tuple[Callable[[Path], object], ...] = (
    lambda path: overview(Checkpoint.open(path)),
    read_config,
    survey,
    verify,
)


def look_at(kinds: dict[str, Path], seed: int, tmp_path: Path) -> int:
    """How many of the looks at one spoilt checkpoint ended in a sentence."""
    rng = random.Random(seed)
    spoilt = tmp_path / str(seed)
    shutil.copytree(kinds[rng.choice(sorted(kinds))], spoilt)
    spoil(spoilt, rng)
    refused = 0
    for look in LOOKS:
        started = time.process_time()
        try:
            look(spoilt)
        except HalfbyteError as error:
            refused += 1
            said = str(error)
        else:
            said = ""
        assert len(said) < 1000 and "\n" not in said, f"seed {seed}: {said[:2000]}"
        assert time.process_time() - started < 5, f"seed {seed}"
    shutil.rmtree(spoilt)
    return refused


def test_damage_is_a_sentence(kinds: dict[str, Path], tmp_path: Path) -> None:
    refused = sum(look_at(kinds, seed, tmp_path) for seed in range(100))
    assert refused > 100  # of 400; what is not noticed is harmless, or in the values


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_much_damage_is_a_sentence(kinds: dict[str, Path], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(1000, 3500):
        look_at(kinds, seed, tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20  # KiB


def test_headers_of_many_objects_stay_within_memory(tmp_path: Path, make: Any) -> None:
    """The most that a header may hold of the smallest things that JSON has."""
    make.checkpoint(tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    for piece in (b"{}", b"[]", b'""', b"1"):
        text = b'{"a":[' + b",".join([piece] * 3_000_000) + b"]}"
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        # Garbage collections would walk the heap of all tests before this one, too; thawed again,
        # it would be walked by all tests after this one.
        gc.freeze()
        started = time.process_time()
        with pytest.raises(
            HalfbyteError, match=r"needs exactly dtype|more than 1,000,000 lists and objects"
        ):
            Checkpoint.open(tmp_path / "x")
        assert time.process_time() - started < 5
    path.write_bytes(struct.pack("<Q", 20 << 20) + b"{" + bytes(20 << 20))
    with pytest.raises(HalfbyteError, match="header of 20971520 bytes; 16777216 at most"):
        Checkpoint.open(tmp_path / "x")
