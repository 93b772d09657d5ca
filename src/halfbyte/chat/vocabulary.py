"""What each token id is: bytes of text, or a control token. Plain text to ids, never to control.

Both chat formats, the detokenizer, the router and the grammars look ids up here. How a
conversation becomes ids is in `tokens`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from halfbyte.errors import CheckpointError
from halfbyte.files import MAX_TOKENIZER_BYTES, read_bounded


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One tokenizer's tokens.

    token_bytes  bytes that each id adds to a text; empty for control tokens
    control      name -> id of every control token
    encode_text  plain text -> ids, none of them a control token, whatever the text says
    """

    token_bytes: tuple[bytes, ...]
    control: Mapping[str, int]
    control_names: Mapping[int, str]
    encode_text: Callable[[str], list[int]]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ids; the model's head may be padded beyond it."""
        return len(self.token_bytes)

    def is_control(self, token_id: int) -> bool:
        """Whether the id switches state instead of adding text."""
        return token_id in self.control_names

    def piece(self, token_id: int) -> str:
        """A printable form of one token: its text, or the name of a control token."""
        name = self.control_names.get(token_id)
        if name is not None:
            return name
        return self.token_bytes[token_id].decode("utf-8", errors="replace")

    def decode(self, token_ids: list[int] | tuple[int, ...], *, keep_control: bool = False) -> str:
        """Text of a whole sequence; broken UTF-8 becomes U+FFFD.

        Control tokens are left out, or written by name with `keep_control`.
        """
        names = self.control_names if keep_control else {}
        parts = [
            names[token_id].encode() if token_id in names else self.token_bytes[token_id]
            for token_id in token_ids
        ]
        return b"".join(parts).decode("utf-8", errors="replace")


def tekken_vocabulary(tekken: Tekkenizer) -> Vocabulary:
    """The vocabulary of a tekken.json that mistral-common has read."""
    num_special = tekken.num_special_tokens
    names = {
        token_id: tekken.decode([token_id], special_token_policy=SpecialTokenPolicy.KEEP)
        for token_id in range(num_special)
    }
    token_bytes = tuple(
        b"" if token_id in names else tekken.id_to_byte_piece(token_id)
        for token_id in range(tekken.n_words)
    )

    def encode_text(text: str) -> list[int]:
        return tekken.encode(text, bos=False, eos=False)

    return Vocabulary(
        token_bytes=token_bytes,
        control={name: token_id for token_id, name in names.items()},
        control_names=names,
        encode_text=encode_text,
        bos_token_id=tekken.bos_id,
        eos_token_ids=(tekken.eos_id,),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError names the file when it is not one."""
    try:
        value = json.loads(read_bounded(path, MAX_TOKENIZER_BYTES))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def tokenizer_json_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json with a byte-level decoder (GPT-2 style BPE).

    Raises CheckpointError for other decoders: their bytes cannot be looked up token by token.
    """
    description = read_json(directory / "tokenizer.json")
    decoder = description.get("decoder") or {}
    kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
    if "ByteLevel" not in kinds:
        raise CheckpointError(
            f"{directory / 'tokenizer.json'}: decoder {kinds[0]!r} is not supported; "
            "byte-level BPE is"
        )
    added = {token["id"]: token for token in description.get("added_tokens", [])}
    names = {token_id: token["content"] for token_id, token in added.items() if token["special"]}
    full = tokenizers.Tokenizer.from_str(json.dumps(description))
    size = max([*full.get_vocab(with_added_tokens=True).values()]) + 1
    to_byte = byte_level_alphabet()

    def bytes_of(token_id: int) -> bytes:
        if token_id in names:
            return b""
        if token_id in added:
            return str(added[token_id]["content"]).encode()
        token = full.id_to_token(token_id)
        # A hole in the id space never comes out of the model with any probability worth naming.
        if token is None:
            return b""
        return bytes(to_byte[char] for char in token)

    control = {name: token_id for token_id, name in names.items()}
    return Vocabulary(
        token_bytes=tuple(bytes_of(token_id) for token_id in range(size)),
        control=control,
        control_names=names,
        encode_text=_plain_encoder(description),
        bos_token_id=_bos_token_id(directory, control),
        eos_token_ids=_eos_token_ids(directory, control),
    )


def _plain_encoder(description: dict[str, Any]) -> Callable[[str], list[int]]:
    """An encoder that does not know any control token: it has none to match.

    `Tokenizer.encode` finds added tokens inside any text; taking them out of a copy is what makes
    a typed "<|im_end|>" a string of ordinary tokens. Added tokens that are not special stay.
    """
    plain = dict(description)
    plain["added_tokens"] = [t for t in description.get("added_tokens", []) if not t["special"]]
    # Post-processors may name the removed tokens; a bos is added by the caller.
    plain["post_processor"] = None
    plain["truncation"] = plain["padding"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))

    def encode_text(text: str) -> list[int]:
        # `encode` holds Python's lock for as long as it takes, tenths of a second for a long
        # prompt, in which no answer gets a token; batches give it up. Nobody asks for offsets.
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode_text


def _bos_token_id(directory: Path, control: Mapping[str, int]) -> int | None:
    """The id put before plain prompts, where tokenizer_config.json asks for one."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    if not config.get("add_bos_token"):
        return None
    name = token_text(config.get("bos_token"))
    return control.get(name) if name else None


def _eos_token_ids(directory: Path, control: Mapping[str, int]) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json and config.json, else the tokenizer's eos."""
    found: list[int] = []
    for file in ("generation_config.json", "config.json"):
        path = directory / file
        value = read_json(path).get("eos_token_id") if path.exists() else None
        found += [value] if isinstance(value, int) else value or []
    path = directory / "tokenizer_config.json"
    name = token_text(read_json(path).get("eos_token")) if path.exists() else None
    if name is not None and name in control:
        found.append(control[name])
    if not found:
        raise CheckpointError(f"{directory}: no file names the token that ends an answer")
    return tuple(dict.fromkeys(found))


def token_text(value: object) -> str | None:
    """A token of tokenizer_config.json, written as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the GPT-2 byte-level alphabet.

    Printable Latin-1 bytes stand for themselves; the other 68 take the code points from 256 on,
    in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(256 + index): byte for index, byte in enumerate(others)}
    return alphabet
