"""Writes a checkpoint in the FP8 dialect in which Mistral publishes its models.

Per-tensor static FP8 for every decoder linear: `weight` in e4m3, `weight_scale_inv` and
`activation_scale` as bf16 scalars; everything else is copied bit for bit. The real job starts from
such a checkpoint, so the demo makes one of its bf16 model. The maxima of the inputs come from
outside (`quantize.fp8_source` measures them).

Rules: docs/reference/formats.md#the-fp8-source.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import require_sound
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import mistral_fp8_config
from halfbyte.errors import FormatError, UsageError
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.modules import decoder_linears

# What a reader of any figure of a checkpoint must know; report and card print it.
NOTE_FILE = "NOTE.txt"
# Files beside the tensors that a server needs; whichever of them the source has are copied.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "SYSTEM_PROMPT.txt",
    "LICENSE",
    NOTE_FILE,
)

# Of these what says how a model sees, for which a text model has no use.
OF_VISION = ("preprocessor_config.json", "processor_config.json")


def write_fp8_source(
    source: Checkpoint, input_amax: Mapping[str, float | Tensor], target: Path
) -> Path:
    """Write `source`, a bf16 checkpoint in a hub layout, as Mistral FP8 to `target`.

    input_amax   canonical decoder linear -> largest magnitude of its input; all of them

    The scales are rounded to bf16 first and the codes made with the rounded ones, so that decoding
    is exact in f32; the largest weight still gets code 448. Raises UsageError if the source is
    quantized already or a maximum is missing, FormatError for NaN weights or a zero maximum.
    """
    check_source(source)
    quantized = {linear.name for linear in decoder_linears(source.config)}
    missing = sorted(quantized - set(input_amax))
    if missing:
        raise UsageError(
            f"there is no input maximum for {missing[0]} ({len(missing)} linears lack one)"
        )

    def spelt(linear: str, role: str) -> str:
        return foreign_name(f"{linear}.{role}", source.layout, "mistral-fp8")

    shapes = {}
    for name in source.names():
        linear, shape = name.removesuffix(".weight"), source.shape(name)
        if linear in quantized:
            shapes[spelt(linear, "weight")] = shape, torch.float8_e4m3fn
            shapes[spelt(linear, "weight_scale")] = (), torch.bfloat16
            shapes[spelt(linear, "input_scale")] = (), torch.bfloat16
        else:
            shapes[source.foreign(name)] = shape, source.dtype(name)
    with ShardWriter(target, shapes) as writer:
        for name in source.names():
            linear = name.removesuffix(".weight")
            if linear in quantized:
                for role, tensor in _encoded(linear, source.tensor(name), input_amax[linear]):
                    require_sound(f"{linear}.{role}", spelt(linear, role), tensor)
                    writer.add(spelt(linear, role), tensor)
            else:
                tensor = source.tensor(name)
                require_sound(name, source.foreign(name), tensor)
                writer.add(source.foreign(name), tensor)
        writer.write_json("config.json", mistral_fp8_config(source.raw_config, source.layout))
        copy_companions(source.directory, writer)
        return writer.finish({"source": source.directory.name})


def check_source(source: Checkpoint) -> None:
    """Raise UsageError unless `source` is bf16 in a hub layout."""
    if source.quantization.dialect != "none":
        raise UsageError(f"{source.directory} is {source.quantization.dialect}; bf16 is needed")
    if source.layout == "mistral":
        raise UsageError(f"{source.directory} is in the native layout; a hub layout is needed")


def copy_companions(directory: Path, writer: ShardWriter) -> None:
    """Copy tokenizer, chat template, processor and generation config of `directory`."""
    for name in COMPANION_FILES:
        if (directory / name).is_file():
            writer.copy_file(directory / name)


def _encoded(
    linear: str, weight: Tensor, input_amax: float | Tensor
) -> Iterable[tuple[str, Tensor]]:
    try:
        scale = fp8_scale(weight.abs().amax()).to(torch.bfloat16)
        input_scale = fp8_scale(torch.as_tensor(input_amax)).to(torch.bfloat16).reshape(())
        codes = encode_fp8(weight, scale.to(torch.float32), "direct")
    except FormatError as error:
        raise FormatError(f"{linear}: {error}") from error
    return (("weight", codes), ("weight_scale", scale), ("input_scale", input_scale))
