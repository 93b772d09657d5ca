"""Codes that are not the nearest are counted, those beside them in the row are not."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify_values import _fp8_misfits, _nvfp4_misfits
from halfbyte.formats.fp8 import encode_fp8, fp8_scale
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.nvfp4 import encode_nvfp4, nvfp4_tensor_scale


def holding(**tensors: Tensor) -> Checkpoint:
    """What the count asks of a checkpoint: the tensors of one linear."""
    return cast("Checkpoint", SimpleNamespace(tensor=lambda name: tensors[name.partition(".")[2]]))


def random_weight(seed: int) -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def nvfp4(w: Tensor) -> dict[str, Tensor]:
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(largest_magnitude(w)))
    return {
        "weight": encoded.codes_OI2.clone(),
        "weight_scale": encoded.scale_OB.clone(),
        "tensor_scale": encoded.tensor_scale,
    }


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_so_many_nvfp4_codes_as_were_moved_are_counted(seed: int, moved: int) -> None:
    """By a whole step or more, up or down, either sign."""
    w = random_weight(seed)
    held = nvfp4(w)
    assert _nvfp4_misfits(holding(**held), "l", w) == 0
    random = torch.Generator().manual_seed(seed)
    places = torch.randperm(held["weight"].numel(), generator=random)[:moved]
    flat = held["weight"].view(-1)
    for place in places.tolist():
        shift = 4 * int(torch.randint(2, (1,), generator=random))
        code = int(flat[place]) >> shift & 15
        other = (code & 8) | ((code & 7) + 3) % 8
        flat[place] = int(flat[place]) & (0xF0 >> shift) | other << shift
    assert _nvfp4_misfits(holding(**held), "l", w) == moved


def test_codes_under_a_scale_of_zero_mean_nothing() -> None:
    w = random_weight(1)
    held = nvfp4(w)
    held["weight_scale"].view(torch.uint8)[0, 0] = 0
    held["weight"][0, :8] = 0x77
    assert _nvfp4_misfits(holding(**held), "l", w) == 0


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_so_many_fp8_codes_as_were_moved_are_counted(seed: int, moved: int) -> None:
    w = random_weight(seed)
    scale = fp8_scale(largest_magnitude(w))
    held: dict[str, Any] = {"weight": encode_fp8(w, scale), "weight_scale": scale}
    assert _fp8_misfits(holding(**held), "l", w) == 0
    flat = held["weight"].view(torch.uint8).view(-1)
    random = torch.Generator().manual_seed(seed)
    for place in torch.randperm(flat.numel(), generator=random)[:moved].tolist():
        code = int(flat[place])
        # Two steps away, and no NaN.
        flat[place] = code - 2 if code & 0x7F > 2 else code + 4
    assert _fp8_misfits(holding(**held), "l", w) == moved


@pytest.mark.parametrize("rows", [1, 511, 512, 513])
def test_every_row_is_looked_at(rows: int) -> None:
    w = torch.full((rows, 16), 1.0).to(torch.bfloat16)
    held = nvfp4(w)
    held["weight"][:, 0] = held["weight"][:, 0] & 0xF0
    assert _nvfp4_misfits(holding(**held), "l", w) == rows
