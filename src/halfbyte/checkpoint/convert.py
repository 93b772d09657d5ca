"""A checkpoint whose weights are f32 or f16 -> the same in bf16, which everything else here reads.

Published copies and merges often come so. Rounding happens once, to nearest even; what bf16 cannot
hold is refused by name. FP8 codes and scales beside such tensors stay as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.fp8_source import copy_companions
from halfbyte.checkpoint.names import is_scale
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import require_sound
from halfbyte.checkpoint.writer import ShardWriter, check_target
from halfbyte.config import ModelConfig
from halfbyte.errors import UsageError

_WIDE = (torch.float32, torch.float16)
# Fields that say which dtype the weights have; the file is the source's otherwise.
_DTYPE_FIELDS = ("dtype", "torch_dtype")


def convert_to_bf16(source: Path, target: Path) -> ModelConfig:
    """Write `source`, a checkpoint in a hub layout, to `target` in bf16; returns its architecture.

    Raises UsageError if nothing is to convert or the target exists, CheckpointError for a damaged
    source, FormatError for a tensor with NaN or beyond what bf16 holds.
    """
    check_target(target)
    checkpoint = Checkpoint.open(source, any_float=True)
    if checkpoint.layout == "mistral":
        raise UsageError(f"{source} is in the native layout; a hub layout is needed")
    if checkpoint.quantization.dialect == "modelopt":
        raise UsageError(
            f"{source} is a Model Optimizer export; convert the checkpoint that it was made of"
        )
    wide = {name for name in checkpoint.names() if _is_wide(checkpoint, name)}
    if not wide:
        raise UsageError(
            f"{source} is a checkpoint already and nothing in it is wider than bf16; "
            "--to mistral-fp8 makes an FP8 one of a bf16 one"
        )
    shapes = {
        checkpoint.foreign(name): (
            checkpoint.shape(name),
            torch.bfloat16 if name in wide else checkpoint.dtype(name),
        )
        for name in checkpoint.names()
    }
    with ShardWriter(target, shapes) as writer:
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            if name in wide:
                tensor = tensor.to(torch.bfloat16)
            require_sound(name, checkpoint.foreign(name), tensor)
            writer.add(checkpoint.foreign(name), tensor)
        writer.write_json("config.json", _says_bf16(checkpoint.raw_config))
        copy_companions(source, writer)
        writer.finish({"source": source.name, "converted_to": "bf16"})
    return checkpoint.config


def _is_wide(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.dtype(name) in _WIDE and not is_scale(checkpoint.foreign(name))


def _says_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose stated dtypes are bfloat16, in its parts, too."""
    said = dict(config)
    for key, value in config.items():
        if isinstance(value, dict):
            said[key] = _says_bf16(value)
        elif key in _DTYPE_FIELDS and value is not None:
            said[key] = "bfloat16"
    return said
