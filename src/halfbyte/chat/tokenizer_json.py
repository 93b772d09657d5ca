"""Vocabularies out of a tokenizer.json: BPE over bytes, as the tokenizers library reads it.

Two kinds are known. Byte-level BPE writes every byte as a character of its own alphabet; BPE with
byte fallback, into which SentencePiece's models are converted, writes a space as U+2581 and a
character without a token as its bytes, <0xE2> and so on (decision 0163).

The file's ids are kept, and compared with the library's at load. Text is encoded by a copy that
knows no control token; a rendered conversation is cut at its control tokens here, with the white
space that the file says goes with them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from halfbyte.chat.tokenizer_bounds import MAX_HOLES, check_before_reading, check_growth
from halfbyte.chat.vocabulary import MAX_TOKENS, Vocabulary, read_json
from halfbyte.errors import CheckpointError, RequestError, in_words, shown
from halfbyte.files import is_there

# Not a character of the byte-level alphabet, hence in no text that the model sees.
_UNREACHABLE = "\x00"
# White_Space of Unicode, which is what the library's `lstrip` and `rstrip` take away.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACES += "\u2028\u2029\u202f\u205f\u3000"
_META_SPACE = "\u2581"
_FALLBACK_BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
_SPACES_AFTER = re.compile(f"[{_SPACES}]*")
_WORD = re.compile(r"\w")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that `added_tokens` of a tokenizer.json adds to the vocabulary.

    lstrip, rstrip  white space before and after it in a text belongs to it
    single_word     it is none where a letter or digit stands next to it
    """

    token_id: int
    content: str
    is_special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class ControlCutter:
    """Cuts a rendered conversation at its control tokens, as `Tokenizer.encode` would."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = tokens
        names = sorted(tokens, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def cut(self, text: str, own: bytes) -> Iterator[str | int]:
        """Ids of control tokens and the texts between, in order.

        own  one byte a character; a name with a 0 among its characters is text
        """
        text = str.__str__(text)  # a plain string, whatever it was
        start = 0
        at = 0
        while (match := self._any.search(text, at)) is not None:
            begin, end = match.span()
            token = self._tokens[match[0]]
            if 0 in own[begin:end] or (token.single_word and _is_in_word(text, begin, end)):
                # A name that is the template's may begin within one that is not.
                at = begin + 1
                continue
            if token.lstrip:
                begin = start + len(text[start:begin].rstrip(_SPACES))
            if token.rstrip:
                space = _SPACES_AFTER.match(text, end)
                assert space is not None
                end = space.end()
            if begin > start:
                yield text[start:begin]
            yield token.token_id
            start = at = end
        if start < len(text):
            yield text[start:]


def _is_in_word(text: str, begin: int, end: int) -> bool:
    before, after = text[max(begin - 1, 0) : begin], text[end : end + 1]
    return bool(_WORD.match(before) or _WORD.match(after))


def load_tokenizer_json(directory: Path) -> tuple[Vocabulary, ControlCutter]:
    """The vocabulary of a directory's tokenizer.json, and what finds its control tokens.

    Raises CheckpointError for what is no BPE over bytes (those of other kinds cannot be looked up
    token by token), for ids that the library would not give, and for files made to exhaust us.
    """
    path = directory / "tokenizer.json"
    description = read_json(path)
    check_before_reading(description, path)
    full = _tokenizer(description, path)
    _check_kind(description, path)
    check_growth(description.get("normalizer"), path)
    added = [_added_token(entry, path) for entry in description.get("added_tokens") or ()]
    for token in added:
        found = full.token_to_id(token.content)
        if found != token.token_id:
            raise CheckpointError(
                f"{path}: added token {shown(token.content)} has id {token.token_id}, but the "
                f"tokenizers library gives it {found}; the file's ids contradict each other"
            )
    specials = {token.content: token for token in added if token.is_special}
    names = {token.token_id: token.content for token in specials.values()}
    control = {name: token.token_id for name, token in specials.items()}
    token_bytes = _token_bytes(description["model"], added, path)
    encode_text = _plain_encoder(_without_start(description), added, path)
    vocabulary = Vocabulary(
        token_bytes=token_bytes,
        control=control,
        control_names=names,
        encode_text=encode_text,
        encode_start=(
            encode_text
            if _without_start(description) is description
            else _plain_encoder(description, added, path)
        ),
        bos_token_id=_bos_token_id(directory, control),
        eos_token_ids=_eos_token_ids(directory, control, len(token_bytes)),
    )
    return vocabulary, ControlCutter(specials)


def _tokenizer(description: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The library's own reading; CheckpointError with its words where it gives up."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(description))
    except (KeyboardInterrupt, SystemExit):
        raise
    # The library raises bare Exceptions, and panics that are not even those.
    except BaseException as error:
        raise CheckpointError(f"{path} is not a tokenizer: {in_words(error)}") from error


def _check_kind(description: Mapping[str, Any], path: Path) -> None:
    if _falls_back(description["model"]):
        _check_fallback(description, path)
        return
    decoder = description.get("decoder") or {}
    kinds = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders") or ())]
    if "ByteLevel" not in kinds:
        raise CheckpointError(f"{path}: decoder {kinds[0]!r} is not supported; byte-level BPE is")
    kind = description["model"].get("type", "BPE")
    if kind != "BPE" or not isinstance(description["model"].get("vocab"), dict):
        raise CheckpointError(f"{path}: model {kind!r} is not supported; byte-level BPE is")
    steps = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
    if '"ByteLevel"' not in steps:
        raise CheckpointError(f"{path}: text does not become bytes; byte-level BPE is supported")


def _falls_back(model: Mapping[str, Any]) -> bool:
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def _check_fallback(description: Mapping[str, Any], path: Path) -> None:
    """Refuse byte fallback that would lose a byte, or that writes spaces in another way."""
    vocab = description["model"].get("vocab")
    missing = [name for name in _FALLBACK_BYTES if name not in vocab]
    if missing:
        raise CheckpointError(
            f"{path}: byte fallback without a token {missing[0]}, so that text would vanish"
        )
    steps = json.dumps(
        [description.get("normalizer"), description.get("pre_tokenizer")], ensure_ascii=False
    )
    if _META_SPACE not in steps:
        raise CheckpointError(
            f"{path}: byte fallback is supported with {_META_SPACE} (U+2581) for a space"
        )
    if '"ByteLevel"' in steps:
        raise CheckpointError(f"{path}: byte-level BPE with byte fallback is not supported")


def _without_start(description: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file for text behind a control token; itself, where that is as at the very beginning.

    A space before the first word of all text ("first") is none of a text in between.
    """
    step = description.get("pre_tokenizer") or {}
    if step.get("type") != "Metaspace" or step.get("prepend_scheme") != "first":
        return description
    return {**description, "pre_tokenizer": {**step, "prepend_scheme": "never"}}


def _added_token(entry: Mapping[str, Any], path: Path) -> AddedToken:
    # Types are those that the library has just accepted.
    if not entry["content"]:
        raise CheckpointError(f"{path}: added token {entry['id']} is empty")
    flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(entry["id"], entry["content"], bool(entry.get("special")), **flags)


def _token_bytes(
    model: Mapping[str, Any], added: list[AddedToken], path: Path
) -> tuple[bytes, ...]:
    """Bytes that each id adds to a text; a hole in the ids adds none, like a control token."""
    vocab: Mapping[str, int] = model["vocab"]
    size = max([-1, *vocab.values(), *(token.token_id for token in added)]) + 1
    if size > MAX_TOKENS:
        raise CheckpointError(
            f"{path}: token id {size - 1:,} is too large; the limit is {MAX_TOKENS:,} tokens"
        )
    if size - len(vocab) - len(added) > MAX_HOLES:
        raise CheckpointError(
            f"{path}: ids go up to {size - 1:,}, but there are {len(vocab) + len(added):,} tokens; "
            f"at most {MAX_HOLES:,} ids may be left out"
        )
    to_byte = byte_level_alphabet()
    found = [b""] * size
    if _falls_back(model):
        for token, token_id in vocab.items():
            byte = _FALLBACK_BYTES.get(token)
            text = token.replace(_META_SPACE, " ").encode()
            found[token_id] = text if byte is None else bytes([byte])
        vocab = {}
    for token, token_id in vocab.items():
        try:
            found[token_id] = bytes([to_byte[char] for char in token])
        except KeyError:
            # As the library's decoder does: what is outside its alphabet stands for itself.
            found[token_id] = token.encode()
    for one in added:
        found[one.token_id] = b"" if one.is_special else one.content.encode()
    return tuple(found)


def _without_special(
    description: Mapping[str, Any], added: Sequence[AddedToken]
) -> tuple[dict[str, Any], int]:
    """A copy of a tokenizer without its special tokens, and the id behind the last one of a file.

    Their entries in the model's vocabulary become unreachable, and merges that would build them go.
    """
    model = description["model"]
    special = {token.content for token in added if token.is_special}
    unknown = model.get("unk_token")
    vocab = {
        _UNREACHABLE + token if token in special else token: token_id
        for token, token_id in model["vocab"].items()
    }
    used = set(vocab.values())
    end = max([*used, *(token.token_id for token in added)]) + 1
    vocab |= {f"{_UNREACHABLE}{hole}": hole for hole in range(end) if hole not in used}

    def stays(merge: str | list[str]) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return special.isdisjoint((left, right, left + right))

    copy = {
        **description,
        "added_tokens": [
            entry for entry in description.get("added_tokens") or () if not entry.get("special")
        ],
        "model": {
            **model,
            "vocab": vocab,
            "merges": [merge for merge in model.get("merges") or () if stays(merge)],
            # It may be a control token, often the end of a turn; bytes that no token has, which
            # somebody types, are none. A text with one is refused.
            "unk_token": None if unknown in special else unknown,
        },
        # Post-processors may name the removed tokens; a bos is added by the caller.
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    return copy, end


def _plain_encoder(
    description: Mapping[str, Any], added: list[AddedToken], path: Path
) -> Callable[[str], list[int]]:
    """An encoder that does not know any control token: no text can be one, however it is spelt.

    It is that of `_without_special`. Added tokens that are not special keep the file's ids: those
    that the library counts anew from the end of the vocabulary, where the ids of those left out
    would be free again, are beyond all others and are changed back.
    """
    plain = [token for token in added if not token.is_special]
    copy, end = _without_special(description, added)
    tokenizer = _tokenizer(copy, path)
    anew = {
        given: token.token_id
        for token in plain
        if (given := tokenizer.token_to_id(token.content)) != token.token_id
    }
    assert all(given is not None and given >= end for given in anew), anew
    unwritable = _unwritable_bytes(copy["model"])
    _try(tokenizer, path)

    def encode_text(text: str) -> list[int]:
        if unwritable:
            _check_writable(text, unwritable, plain, tokenizer)
        # `encode` holds Python's lock for as long as it takes, tenths of a second for a long
        # prompt, in which no answer gets a token; batches give it up. Nobody asks for offsets.
        ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [anew.get(token_id, token_id) for token_id in ids] if anew else ids

    return encode_text


def _try(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Refuse a file over whose first text the library ends in a panic."""
    try:
        tokenizer.encode_batch_fast(["Hello, world!\n 123"], add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{path} cannot encode a text: {in_words(error)}") from error


def _unwritable_bytes(model: Mapping[str, Any]) -> frozenset[int]:
    """Bytes of UTF-8 that the library would leave out of a text without a word."""
    if model.get("unk_token") is not None or model.get("byte_fallback"):
        return frozenset()
    # Those that are missing here begin or continue no character.
    of_text = {*range(0xC0), *range(0xC2, 0xF5)}
    return frozenset(
        byte
        for char, byte in byte_level_alphabet().items()
        if char not in model["vocab"] and byte in of_text
    )


def _check_writable(
    text: str,
    unwritable: frozenset[int],
    plain: Sequence[AddedToken],
    tokenizer: tokenizers.Tokenizer,
) -> None:
    """RequestError for a character that no token of the vocabulary can write."""
    rest = str.__str__(text)
    for token in plain:
        rest = rest.replace(token.content, "")
    if tokenizer.normalizer is not None:
        rest = tokenizer.normalizer.normalize_str(rest)
    if unwritable.isdisjoint(rest.encode()):
        return
    character = next(one for one in rest if not unwritable.isdisjoint(one.encode()))
    raise RequestError(
        f"the model's tokenizer has no token for the character {character!r}; leave it out",
        code="unsupported_content",
    )


def _bos_token_id(directory: Path, control: Mapping[str, int]) -> int | None:
    """The id put before plain prompts, where tokenizer_config.json asks for one."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if is_there(path) else {}
    if not config.get("add_bos_token"):
        return None
    name = text_of_token(config.get("bos_token"))
    return control.get(name) if name else None


def _eos_token_ids(directory: Path, control: Mapping[str, int], num_tokens: int) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json and config.json, else the tokenizer's eos."""
    found: list[int] = []
    for file in ("generation_config.json", "config.json"):
        path = directory / file
        value = read_json(path).get("eos_token_id") if is_there(path) else None
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        for one in values:
            if type(one) is not int or not 0 <= one < num_tokens:
                raise CheckpointError(
                    f"{path}: eos_token_id {str(value)[:80]}; expected a token id below "
                    f"{num_tokens}, or a list of them"
                )
        found += values
    path = directory / "tokenizer_config.json"
    name = text_of_token(read_json(path).get("eos_token")) if is_there(path) else None
    if name is not None and name in control:
        found.append(control[name])
    if not found:
        raise CheckpointError(f"{directory}: no file names the token that ends an answer")
    return tuple(dict.fromkeys(found))


def text_of_token(value: object) -> str | None:
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
