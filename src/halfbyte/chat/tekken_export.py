"""A tekken.json as the files of a hub's tokenizer: tokenizer.json, its config, a chat template.

vLLM asks a model's processor for the text "[IMG]", which only such a tokenizer turns into the
control token: mistral-common takes all text for text. Written beside tekken.json, which our own
server goes on reading, when a checkpoint with pictures is exported or given to vLLM.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mistral_common.exceptions import MistralCommonException
from mistral_common.integrations.chat_templates.chat_templates import (
    convert_tokenizer_to_chat_template,
)
from mistral_common.tokens.tokenizers.base import SpecialTokens

from halfbyte.chat.mistral_format import load_mistral_format
from halfbyte.chat.tokenizer_json import byte_level_alphabet
from halfbyte.chat.vocabulary import Vocabulary, read_json
from halfbyte.errors import CheckpointError
from halfbyte.log import logger

# Names of tokenizer_config.json, and the control tokens that they stand for where there are such.
_ROLES = {
    "bos_token": SpecialTokens.bos,
    "eos_token": SpecialTokens.eos,
    "unk_token": SpecialTokens.unk,
    "pad_token": SpecialTokens.pad,
}


def needs_hub_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names leave mistral-common as the only one who can read the text."""
    there = set(names)
    return "tekken.json" in there and "tokenizer.json" not in there


def hub_tokenizer(tekken: Path) -> dict[str, bytes]:
    """File name -> content, for the tokenizer of `tekken`.

    The template is mistral-common's own for this file; without a word of settings or an odd version
    there is none, which a warning says.

    Raises CheckpointError for a file that cannot be read, or whose text has the name of a control
    token as one of its pieces: a tokenizer.json has one id for one name.
    """
    vocabulary = load_mistral_format(tekken).vocabulary
    pattern = read_json(tekken)["config"]["pattern"]
    named = {role: name.value for role, name in _ROLES.items() if name.value in vocabulary.control}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        **named,
    }
    files = {
        "tokenizer.json": _json(_description(vocabulary, pattern, tekken)),
        "tokenizer_config.json": _json(config, indent=2),
    }
    try:
        files["chat_template.jinja"] = convert_tokenizer_to_chat_template(tekken).encode()
    except (MistralCommonException, ValueError) as error:
        logger.warning("%s: no chat template can be made of it: %s", tekken, error)
    return files


def _json(value: dict[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode()


def _description(vocabulary: Vocabulary, pattern: str, tekken: Path) -> dict[str, Any]:
    """A tokenizer.json: byte-level BPE over the same pieces, split by the same pattern."""
    to_char = {byte: char for char, byte in byte_level_alphabet().items()}
    pieces = {
        piece: token_id
        for token_id, piece in enumerate(vocabulary.token_bytes)
        if not vocabulary.is_control(token_id)
    }
    spelt = {piece: "".join(to_char[byte] for byte in piece) for piece in pieces}
    taken = vocabulary.control.keys() & set(spelt.values())
    if taken:
        raise CheckpointError(
            f"{tekken}: {sorted(taken)[0]!r} is a control token and a piece of text"
        )
    control = sorted(vocabulary.control_names.items())
    vocab = {name: token_id for token_id, name in control}
    vocab |= {spelt[piece]: token_id for piece, token_id in pieces.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": name, **plain, "special": True}
            for token_id, name in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", **byte_level},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": _merges(spelt),
        },
    }


def _merges(spelt: Mapping[bytes, str]) -> list[tuple[str, str]]:
    """One merge for each way in which a piece falls into two others.

    They are ordered by the rank of what comes of them, as Tekken merges whatever makes the piece
    of the lowest rank.
    """
    return [
        (spelt[piece[:at]], spelt[piece[at:]])
        for piece in spelt
        for at in range(1, len(piece))
        if piece[:at] in spelt and piece[at:] in spelt
    ]
