"""Gives a text-only checkpoint a small Pixtral tower with random weights, so that it takes images.

No package carries weights of a small model of this family that sees. What becomes of a picture on
its way - tokens, encoder, merger, projector, prefill - can be shown without training; answers about
pictures cannot, and the NOTE.txt written here says so wherever a figure of the checkpoint stands.
The text model keeps every weight and every token id.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from halfbyte.checkpoint.fp8_source import COMPANION_FILES, NOTE_FILE, check_source
from halfbyte.checkpoint.inventory import Expected, expected_tensors, shapes_to_write
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import require_sound
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.config import ModelConfig, VisionConfig
from halfbyte.errors import CheckpointError, UsageError, in_words
from halfbyte.files import MAX_TOKENIZER_BYTES, read_bounded

IMAGE_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
# 16 x 16 merged patches of 28 pixels at most: 272 tokens, which leaves a small context room.
MAX_SIDE_PIXELS = 448
_ROWS = 64  # the vocabulary is filled up to a multiple of this, as products like it
NOTE = (
    "the vision tower of this checkpoint is untrained (random weights, seed {seed}): it shows that "
    "images go through encoder, merger, projector and prefill; answers about them are chance"
)


def add_untrained_tower(source: Path, target: Path, *, seed: int = 0) -> ModelConfig:
    """Write the bf16 text model `source` with an untrained tower to `target`; returns its config.

    Equal arguments give equal bytes. Raises UsageError if the target exists, or the source is
    quantized, has a tower already, or has no tokenizer.json to add the image tokens to.
    """
    checkpoint = Checkpoint.open(source)
    check_source(checkpoint)
    if checkpoint.config.vision is not None:
        raise UsageError(f"{source} has a vision tower already")
    if not (source / "tokenizer.json").is_file() or (source / "tekken.json").exists():
        raise UsageError(f"{source}: image tokens can be added to a tokenizer.json only")
    tokenizer, ids = _with_image_tokens(source / "tokenizer.json")
    text = checkpoint.config.text
    num_rows = max(text.vocab_size, -(-(max(ids) + 1) // _ROWS) * _ROWS)
    config = ModelConfig(replace(text, vocab_size=num_rows), _tower(ids[0]))
    generator = torch.Generator().manual_seed(seed)
    scale = checkpoint.tensor("embedding.weight").float().square().mean().sqrt().item()
    with ShardWriter(target, shapes_to_write(config, unquantized(config), "hf")) as writer:
        for name, expected in expected_tensors(config, unquantized(config)).items():
            if name in checkpoint:
                tensor = _lengthened(checkpoint.tensor(name), expected)
            else:
                tensor = _random(name, expected, generator, scale)
            require_sound(name, foreign_name(name, "hf", "none"), tensor)
            writer.add(foreign_name(name, "hf", "none"), tensor)
        writer.write_json("config.json", hub_config(config))
        for name in COMPANION_FILES:
            if (source / name).is_file() and name not in ("tokenizer.json", NOTE_FILE):
                writer.copy_file(source / name)
        writer.write_file("tokenizer.json", tokenizer)
        writer.write_json("processor_config.json", _processor(config.vision))
        writer.write_file(NOTE_FILE, (NOTE.format(seed=seed) + "\n").encode())
        writer.finish({"source": source.name, "untrained_tower": {"seed": seed}})
    return config


def _with_image_tokens(path: Path) -> tuple[bytes, list[int]]:
    try:
        tokenizer = Tokenizer.from_buffer(read_bounded(path, MAX_TOKENIZER_BYTES))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer ({in_words(error)})"
        ) from error
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in IMAGE_TOKENS]
    )
    ids = [int(tokenizer.token_to_id(name) or 0) for name in IMAGE_TOKENS]
    return tokenizer.to_str(pretty=False).encode(), ids


def _tower(image_token_id: int) -> VisionConfig:
    """Four layers of width 128: Pixtral's shape, a few milliseconds an image."""
    return VisionConfig(
        num_layers=4,
        width=128,
        num_heads=2,
        head_dim=64,
        mlp_width=320,
        patch_size=14,
        image_size=MAX_SIDE_PIXELS,
        num_channels=3,
        rope_theta=10000.0,
        norm_eps=1e-5,
        activation="silu",
        spatial_merge_size=2,
        projector_activation="gelu",
        projector_bias=False,
        image_token_id=image_token_id,
        feature_layer=-1,
    )


def _processor(vision: VisionConfig | None) -> dict[str, object]:
    assert vision is not None
    image, line, end = IMAGE_TOKENS
    return {
        "image_break_token": line,
        "image_end_token": end,
        "image_processor": {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "size": {"longest_edge": vision.image_size},
        },
        "image_token": image,
        "patch_size": vision.patch_size,
        "processor_class": "PixtralProcessor",
        "spatial_merge_size": vision.spatial_merge_size,
    }


def _lengthened(tensor: Tensor, expected: Expected) -> Tensor:
    """A table with rows for the new tokens; any other tensor as it is.

    Each new row is the mean of the others, so that in the head its logit is the mean logit and it
    takes no probability worth naming: text is as likely as before.
    """
    missing = expected.shape[0] - tensor.shape[0]
    if missing == 0:
        return tensor
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat((tensor, mean.expand(missing, -1)))


def _random(name: str, expected: Expected, generator: torch.Generator, scale: float) -> Tensor:
    """Norms of 1, linears that keep variance; the projector ends at the embeddings' size."""
    if "norm" in name:
        return torch.ones(expected.shape, dtype=torch.bfloat16)
    size = 1 / math.sqrt(math.prod(expected.shape[1:]))
    if name.startswith("projector.out"):
        size *= scale
    values: Tensor = torch.randn(expected.shape, generator=generator) * size
    return values.to(torch.bfloat16)
