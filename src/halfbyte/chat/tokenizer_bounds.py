"""Bounds of a tokenizer.json: what would keep the tokenizers library busy, or end the process.

The library believes the sizes of a file and compiles its expressions without a limit. What it
accepts in other shapes than everybody writes (a step as a list of its values) is refused, too.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.chat.vocabulary import MAX_TOKENS
from halfbyte.errors import CheckpointError, shown

MAX_ADDED_CHARS = 65_536  # of one added token; its automaton takes 70 bytes for each
MAX_ALL_ADDED_CHARS = 1_000_000  # of all of them
MAX_TOKEN_CHARS = 4096  # of a token of the vocabulary; the longest in use are rows of 512 blanks
MAX_PATTERN_CHARS = 10_000  # of a regular expression; those in use have 300
MAX_HOLES = 65_536  # ids that no token has; each becomes a token that nothing reaches
MAX_GROWTH = 64  # times that the normalizer may lengthen a text; " " to its three-byte sign is 3


def check_before_reading(description: Mapping[str, Any], path: Path) -> None:
    """Refuse what ends the process, or fills its memory, while the library reads it."""
    # Tables whose sizes and places the library believes. Models of SentencePiece have them, whose
    # text does not become bytes.
    if '"precompiled_charsmap"' in json.dumps(description.get("normalizer")):
        raise CheckpointError(
            f"{path}: the normalizer Precompiled, of SentencePiece, is not supported; byte-level "
            "BPE is, which has no use for it"
        )
    for name in _STEPS:
        _check_step(description.get(name), f"{path}: {name}")
    model = description.get("model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and model.get(name):
            raise CheckpointError(f"{path}: model.{name} is not supported; BPE over bytes has none")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict) and len(vocab) > MAX_TOKENS:
        raise CheckpointError(
            f"{path}: a vocabulary of {len(vocab):,} tokens; the limit is {MAX_TOKENS:,}"
        )
    longest = max(map(len, vocab), default=0) if isinstance(vocab, dict) else 0
    check_length(longest, MAX_TOKEN_CHARS, f"{path}: a token of the vocabulary has")
    entries = description.get("added_tokens")
    added = [
        len(entry["content"])
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    ]
    check_length(max(added, default=0), MAX_ADDED_CHARS, f"{path}: an added token has")
    check_length(sum(added), MAX_ALL_ADDED_CHARS, f"{path}: all added tokens together have")


# What a text goes through, each one step or a sequence of them, and what sequences call theirs.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def _check_step(step: object, where: str) -> None:
    """Refuse a step that is no object, though the library reads it, and one made to take long."""
    if step is None:
        return
    if not isinstance(step, dict):
        raise CheckpointError(f"{where} must be an object: {shown(step)}")
    pattern = step.get("pattern")
    for text in pattern.values() if isinstance(pattern, dict) else ():
        if isinstance(text, str) and not text:
            raise CheckpointError(f"{where} looks for an empty text, which is everywhere")
        check_length(len(text) if isinstance(text, str) else 0, MAX_PATTERN_CHARS, f"{where} has")
    for name in _SEQUENCES:
        parts = step.get(name, [])
        if not isinstance(parts, list) or None in parts:
            raise CheckpointError(f"{where}.{name} must be a list of objects: {shown(parts)}")
        for part in parts:
            _check_step(part, where)


def check_length(found: int, most: int, what: str) -> None:
    """Raise CheckpointError, which begins with `what`, for more characters than `most`."""
    if found > most:
        raise CheckpointError(f"{what} {found:,} characters; the limit is {most:,}")


def check_growth(normalizer: Mapping[str, Any] | None, path: Path) -> None:
    """Refuse replacements that together make much text out of little."""
    growth = 1.0
    for step in _steps(normalizer):
        if step.get("type") == "Replace":
            pattern = step.get("pattern") or {}
            # A regular expression may match one character, or none at all between any two.
            shortest = len(pattern["String"].encode()) if "String" in pattern else 1
            length = len(str(step.get("content", "")).encode())
            growth *= max(1.0, length / max(shortest, 1))
        elif step.get("type") == "Prepend":
            growth *= 1 + len(str(step.get("prepend", ""))) / 1024
    if growth > MAX_GROWTH:
        raise CheckpointError(
            f"{path}: the normalizer makes text up to {growth:.3g} times as long; the limit is "
            f"{MAX_GROWTH} times"
        )


def _steps(normalizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if normalizer is None:
        return
    if normalizer.get("type") == "Sequence":
        for step in normalizer.get("normalizers") or ():
            yield from _steps(step)
    else:
        yield normalizer
