"""Checkpoint -> modules: every dialect gives the same model, and no tensor is left over."""

from pathlib import Path

import pytest
import torch

import tolerances
from bounded import relative
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.load import load_decoder
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.modules import decoder_linears

STEP = Step(torch.randint(0, 512, (24,)), torch.arange(24), DenseAttend([0, 24]))


class Lying(Checkpoint):
    """A checkpoint with one tensor more than the model has."""

    def names(self) -> tuple[str, ...]:
        return (*super().names(), "decoder.0.attention.sink.weight")


def logits(decoder: Decoder) -> torch.Tensor:
    result: torch.Tensor = decoder(STEP)
    return result


def test_fp8_source_is_near_its_bf16_original(directory: Path) -> None:
    write_tiny_checkpoint(directory / "bf16", layers=3)
    write_tiny_checkpoint(directory / "fp8", layers=3, dialect="mistral-fp8")
    plain = load_decoder(Checkpoint.open(directory / "bf16"))
    coded = load_decoder(Checkpoint.open(directory / "fp8"))
    # e4m3 weights err by 2.7 % relative RMS (docs/reference/formats.md#what-equal-means); three
    # layers add up.
    assert 0.001 < relative(logits(coded), logits(plain)) < 0.2
    assert coded.num_weight_bytes < plain.num_weight_bytes
    assert coded.kv_scales == ((1.0, 1.0),) * 3


def test_weight_bytes_follow_from_the_shapes(directory: Path) -> None:
    """FP8 weighs a byte a weight and 4 a row; the rest is bf16. All widths are whole panels."""
    config = write_tiny_checkpoint(directory, layers=2, dialect="mistral-fp8")
    linears = decoder_linears(config)
    weights = sum(one.out_features * one.in_features for one in linears)
    text = config.text
    dense = 2 * text.vocab_size * text.width + (2 * text.num_layers + 1) * text.width
    decoder = load_decoder(Checkpoint.open(directory))
    rows = sum(one.out_features for one in linears)
    packed, decoded = weights + 4 * rows, 2 * weights  # what native holds, what reference holds
    assert decoder.num_weight_bytes - 2 * dense in (packed, decoded)


def test_vision_tensors_are_left_to_the_vision_loader(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=2, vision=True)
    assert logits(load_decoder(Checkpoint.open(directory))).isfinite().all()


def test_unused_tensor_is_named(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=1)
    checkpoint = Checkpoint.open(directory)
    checkpoint.__class__ = Lying
    with pytest.raises(CheckpointError, match=r"1 tensors are not used.*attention\.sink"):
        load_decoder(checkpoint)


def test_declared_differs_from_weight_only_but_not_wildly(directory: Path) -> None:
    write_tiny_checkpoint(directory, layers=3, dialect="mistral-fp8")
    checkpoint = Checkpoint.open(directory)
    exact = logits(load_decoder(checkpoint))
    rounded = logits(load_decoder(checkpoint, mode="declared"))
    assert 0 < relative(rounded, exact) < tolerances.GOLDEN_ROUNDED


def test_tiny_checkpoints_are_reproducible(directory: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = write_tiny_checkpoint(directory / name, layers=1, seed=seed, vision=True)
        assert (
            Checkpoint.open(directory / name).config == config == tiny_config(layers=1, vision=True)
        )
    a, b, c = ((directory / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
