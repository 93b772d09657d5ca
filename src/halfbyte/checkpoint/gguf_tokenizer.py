"""The tokenizer in a GGUF file's metadata -> the files that Hugging Face's libraries read.

Byte-pair vocabularies only ("gpt2" in GGUF terms), with the pre-tokenizers we have checked. Called
by `gguf`.

Source: llama.cpp's list of pre-tokenizers; docs/reference/formats.md#gguf.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from halfbyte.errors import CheckpointError, UnsupportedError, shown

# GGUF token types that are not ordinary text (llama.cpp, llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4


def _digits_then_bytes() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _bytes_only() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PRE_TOKENIZERS = {"smollm": _digits_then_bytes, "gpt-2": _bytes_only}


def tokenizer_files(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, bytes]:
    """Content of tokenizer.json, tokenizer_config.json and chat_template.jinja by file name.

    metadata     all key-value pairs of the GGUF file
    vocab_size   rows of the embedding

    Raises UnsupportedError for a vocabulary we cannot convert, CheckpointError for one that is
    damaged.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"tokenizer {str(kind)[:40]}/{str(pre)[:40]} is not convertible (only gpt2 with "
            f"{' or '.join(_PRE_TOKENIZERS)}); give a directory that has its files: --tokenizer DIR"
        )
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int)
    if len(tokens) != len(types) or len(tokens) > vocab_size or len(set(tokens)) < len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.tokens: {len(tokens)} tokens, {len(set(tokens))} of them different, "
            f"beside {len(types)} types and an embedding of {vocab_size} rows"
        )
    tokenizer = _build(tokens, types, _list(metadata, "merges", str), pre)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(_config(metadata, tokens), indent=2).encode(),
    }
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        files["chat_template.jinja"] = str(template).encode()
    return files


_Item = TypeVar("_Item", str, int)


def _list(metadata: Mapping[str, Any], key: str, kind: type[_Item]) -> list[_Item]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise CheckpointError(
            f"tokenizer.ggml.{key}: a list of {kind.__name__} was expected: {shown(value)}"
        )
    return value


def _build(tokens: list[str], types: list[int], merges: list[str], pre: str) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])
    return tokenizer


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    named = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    special = {
        theirs: tokens[int(metadata[f"tokenizer.ggml.{ours}_token_id"])]
        for ours, theirs in named.items()
        if f"tokenizer.ggml.{ours}_token_id" in metadata
    }
    return {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(metadata["llama.context_length"]),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
