"""GGUF files that announce more than they hold, or lie otherwise: one sentence, at once."""

import contextlib
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.test_gguf import write_gguf
from halfbyte.checkpoint.gguf import import_gguf
from halfbyte.checkpoint.gguf_header import check_header
from halfbyte.config import ModelConfig, RopeConfig
from halfbyte.errors import CheckpointError, HalfbyteError

pytest.importorskip("gguf", reason="the extra `demo` is not installed")

STRING, ARRAY, UINT32 = 8, 9, 4


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*pairs: bytes, tensors: int = 0, keys: int | None = None) -> bytes:
    count = len(pairs) if keys is None else keys
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(pairs)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + values


LLAMA = key(b"general.architecture", STRING, text(b"llama"))

HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends within its header"),
    "no magic": (b"GGML" + bytes(100), "is not a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "keys without end": (header(keys=2**63), "announces 9223372036854775808 keys"),
    "tensors without end": (header(LLAMA, tensors=2**40), "announces 1 keys and 10995"),
    "an array of 10**12": (header(key(b"a", ARRAY, array(0, 10**12))), "1000000000000 elements"),
    "many arrays": (
        header(*[key(b"%d" % n, ARRAY, array(0, 10**6, bytes(10**6))) for n in range(3)]),
        "arrays of 1000000 elements",
    ),
    "an array of arrays": (header(key(b"a", ARRAY, array(ARRAY, 1))), "arrays of arrays"),
    "a long text": (header(key(b"a", STRING, struct.pack("<Q", 2**62))), "a text of 46116"),
    "a text past the end": (header(key(b"a", STRING, struct.pack("<Q", 100))), "ends within"),
    "a value of no type": (header(key(b"a", 77, b"1234")), "type 77"),
    "many dimensions": (
        header(LLAMA, text(b"t") + struct.pack("<I", 10**9), tensors=1, keys=1),
        "1000000000 dimensions",
    ),
    "no architecture": (header(), "lacks general.architecture"),
    "no text": (header(key(b"general.architecture", STRING, text(b"\xff\xfe"))), "cannot be read"),
    "a key that is no text": (header(key(b"\xff", UINT32, bytes(4))), "cannot be read as a GGUF"),
    "a key twice": (header(LLAMA, LLAMA), "cannot be read as a GGUF"),
    "a number for a text": (header(key(b"general.architecture", UINT32, bytes(4))), "only llama"),
    "no sizes": (header(LLAMA), "lacks embedding_length"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_a_sentence(what: str, tmp_path: Path) -> None:
    content, said = HOSTILE[what]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.fixture
def small(make: Any) -> ModelConfig:
    text_config = replace(
        make.text, num_layers=1, rope=RopeConfig(1e5, original_max_positions=256),
        max_positions=256, bos_token_id=0, eos_token_ids=(11,), pad_token_id=None,
    )  # fmt: skip
    return ModelConfig(text_config, None)


def test_a_billion_layers_are_refused_before_their_names_are_made(
    make: Any, small: ModelConfig, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", small, make.weights(small))
    content = (tmp_path / "m.gguf").read_bytes()
    name = text(b"llama.block_count") + struct.pack("<I", UINT32)
    assert content.count(name) == 1
    where = content.index(name) + len(name)
    spoilt = content[:where] + struct.pack("<I", 10**9) + content[where + 4 :]
    (tmp_path / "m.gguf").write_bytes(spoilt)
    with pytest.raises(CheckpointError, match="1000000000 layers"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


def spoil(content: bytes, rng: random.Random, header_bytes: int) -> bytes:
    """Some flipped bits, some bytes of another kind, or an early end; mostly in the header."""
    changed = bytearray(content)
    if rng.random() < 0.2:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(header_bytes if rng.random() < 0.9 else len(changed))
        if rng.random() < 0.5:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            size = rng.choice([1, 4, 8])
            fill = rng.choice([b"\xff" * size, bytes(size), rng.randbytes(size)])
            changed[at : at + size] = fill
    return bytes(changed)


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.slow)]
)
@pytest.mark.timeout(600)
def test_damage_is_a_sentence_or_a_model(
    make: Any, small: ModelConfig, tmp_path: Path, seeds: range
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, small, make.weights(small))
    content = path.read_bytes()
    check_header(path)
    header_bytes = content.index(b"output_norm.weight") + 100
    for seed in seeds:
        path.write_bytes(spoil(content, random.Random(seed), header_bytes))
        with contextlib.suppress(HalfbyteError):
            import_gguf(path, tmp_path / str(seed))


@pytest.mark.parametrize(
    "kind, size",
    [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 1), (10, 8), (11, 8), (12, 8)],
)
def test_every_kind_of_value_has_its_length(tmp_path: Path, kind: int, size: int) -> None:
    """By the format's specification; with another length the next key would be misread."""
    file = tmp_path / "m.gguf"
    file.write_bytes(
        header(
            key(b"a", kind, bytes(size)), key(b"b", ARRAY, array(kind, 3, bytes(3 * size))), LLAMA
        )
    )
    check_header(file)
    file.write_bytes(header(key(b"a", kind, bytes(size)), LLAMA)[:-1])
    with pytest.raises(CheckpointError, match="ends within"):
        check_header(file)
