"""One signature for three formats: fused groups, declared rounding, what cannot be fused."""

import pytest
import torch
from torch import Tensor

from bounded import assert_bounded
from halfbyte.errors import CheckpointError
from halfbyte.formats.fp8 import encode_fp8, fp8_scale, round_to_fp8, round_tokens_to_fp8
from halfbyte.formats.nvfp4 import (
    EncodedNVFP4,
    decode_nvfp4,
    encode_nvfp4,
    nvfp4_tensor_scale,
    round_to_nvfp4,
)
from halfbyte.model.linear import (
    FusedLinear,
    SplitLinear,
    StoredLinear,
    TokenScaledLinear,
    make_linear,
)
from halfbyte.modules import Fp8Activations, Mode

WIDTH = 64


def member(format: str, rows: int, input_scale: float | None = 0.02) -> tuple[StoredLinear, Tensor]:
    """A stored linear of random weights, and its weight in float64."""
    w_OI = torch.randn(rows, WIDTH).to(torch.bfloat16)
    amax = w_OI.abs().amax()
    if format == "bf16":
        return StoredLinear("a.bf16", "bf16", w_OI), w_OI.double()
    if format == "fp8":
        scale = fp8_scale(amax)
        codes = encode_fp8(w_OI, scale)
        exact = codes.double() * scale.double()
        return StoredLinear("an.fp8", "fp8", codes, scale, None, input_scale), exact
    encoded: EncodedNVFP4 = encode_nvfp4(w_OI, nvfp4_tensor_scale(amax))
    exact = decode_nvfp4(encoded, torch.float32).double()
    codes_OI2, scale_OB, tensor_scale = encoded
    stored = StoredLinear("an.nvfp4", "nvfp4", codes_OI2, scale_OB, tensor_scale, input_scale)
    return stored, exact


@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4"])
def test_a_group_is_one_product_with_each_member_s_own_scale(format: str) -> None:
    members = [member(format, rows) for rows in (48, 16, 20)]
    linear = make_linear([stored for stored, _ in members], "weight_only")
    assert isinstance(linear, FusedLinear)
    x_TI = torch.randn(5, WIDTH).to(torch.bfloat16)
    exact_OI = torch.cat([exact for _, exact in members])
    plain = x_TI @ exact_OI.to(torch.bfloat16).T
    assert_bounded(linear(x_TI), plain, x_TI.double() @ exact_OI.T)
    assert linear(x_TI, torch.float32).dtype == torch.float32


@pytest.mark.parametrize(("format", "rounding"), [("fp8", round_to_fp8), ("nvfp4", round_to_nvfp4)])
def test_declared_rounds_activations_as_the_checkpoint_says(format: str, rounding) -> None:  # type: ignore[no-untyped-def]
    stored, exact_OI = member(format, 32)
    x_TI = torch.randn(7, WIDTH).to(torch.bfloat16)
    rounded_TI = rounding(x_TI, torch.tensor(0.02))
    assert not torch.equal(rounded_TI, x_TI)
    declared = make_linear([stored], "declared")(x_TI)
    assert torch.equal(declared, make_linear([stored], "weight_only")(rounded_TI))
    plain = rounded_TI @ exact_OI.to(torch.bfloat16).T
    assert_bounded(declared, plain, rounded_TI.double() @ exact_OI.T)


def test_declared_leaves_bf16_alone() -> None:
    stored, _ = member("bf16", 16)
    x_TI = torch.randn(2, WIDTH).to(torch.bfloat16)
    weight_only = make_linear([stored], "weight_only")(x_TI)
    assert torch.equal(make_linear([stored], "declared")(x_TI), weight_only)


def test_members_of_different_formats_run_side_by_side() -> None:
    members = [member(format, rows) for format, rows in (("fp8", 16), ("nvfp4", 32), ("bf16", 8))]
    linear = make_linear([stored for stored, _ in members], "weight_only")
    assert isinstance(linear, SplitLinear)
    x_TI = torch.randn(3, WIDTH).to(torch.bfloat16)
    apart = [make_linear([stored], "weight_only") for stored, _ in members]
    assert torch.equal(linear(x_TI), torch.cat([one(x_TI) for one in apart], -1))
    assert linear.num_bytes == sum(one.num_bytes for one in apart)


def test_different_input_scales_matter_only_where_inputs_are_rounded() -> None:
    group = [member("fp8", 16, 0.02)[0], member("fp8", 16, 0.5)[0]]
    assert isinstance(make_linear(group, "weight_only"), FusedLinear)
    split = make_linear(group, "declared")
    assert isinstance(split, SplitLinear)
    x_TI = torch.randn(3, WIDTH).to(torch.bfloat16)
    apart = [make_linear([stored], "declared")(x_TI) for stored in group]
    assert torch.equal(split(x_TI), torch.cat(apart, -1))


@pytest.mark.parametrize("mode", ["declared", "fp8_declared"])
@pytest.mark.parametrize(
    ("input_scale", "fp8_activations"), [(None, "auto"), (None, "per-token"), (0.02, "per-token")]
)
def test_tokens_are_rounded_by_their_own_largest_value(
    mode: Mode, input_scale: float | None, fp8_activations: Fp8Activations
) -> None:
    members = [member("fp8", rows, input_scale) for rows in (48, 16, 20)]
    linear = make_linear([stored for stored, _ in members], mode, fp8_activations)
    assert isinstance(linear, TokenScaledLinear)
    # Sizes that no scale of the whole tensor would serve.
    x_TI = (torch.randn(5, WIDTH) * torch.logspace(-6, 6, 5)[:, None]).to(torch.bfloat16)
    codes_TI, scale_T = round_tokens_to_fp8(x_TI)
    rounded_TI = codes_TI.double() * scale_T.double()[:, None]
    largest_T1 = x_TI.double().abs().amax(-1, keepdim=True)
    assert bool(((rounded_TI - x_TI.double()).abs() <= largest_T1 / 27.9).all())
    exact_OI = torch.cat([exact for _, exact in members])
    wide = (codes_TI.float() @ exact_OI.float().T) * scale_T[:, None]
    exact = rounded_TI @ exact_OI.T
    for row in range(len(x_TI)):
        part = slice(row, row + 1)
        assert_bounded(linear(x_TI[part]), wide[part].to(torch.bfloat16), exact[part])


def test_one_member_without_a_scale_has_the_group_rounded_by_token() -> None:
    group = [member("fp8", 16, 0.02)[0], member("fp8", 16, None)[0]]
    assert isinstance(make_linear(group, "fp8_declared"), TokenScaledLinear)
    assert isinstance(make_linear(group, "weight_only"), FusedLinear)
    kept = make_linear(group[:1], "fp8_declared")
    assert isinstance(kept, FusedLinear)


@pytest.mark.parametrize("mode", ["weight_only", "fp8_declared"])
def test_rows_of_an_fp8_weight_may_have_scales_of_their_own(mode: Mode) -> None:
    w_OI = torch.randn(40, WIDTH) * torch.logspace(-3, 3, 40)[:, None]
    scale_O1 = w_OI.abs().amax(-1, keepdim=True) / 448.0
    codes_OI = (w_OI / scale_O1).to(torch.float8_e4m3fn)
    stored = StoredLinear("an.fp8", "fp8", codes_OI, scale_O1)
    x_TI = torch.ones(3, WIDTH).to(torch.bfloat16)  # rounded by its largest value: still ones
    exact = x_TI.double() @ (codes_OI.double() * scale_O1.double()).T
    plain = x_TI @ (codes_OI.float() * scale_O1).to(torch.bfloat16).T
    assert_bounded(make_linear([stored], mode)(x_TI), plain, exact)


def test_missing_scales_are_named() -> None:
    stored, _ = member("fp8", 16, None)
    with pytest.raises(CheckpointError, match=r"an\.fp8 has no input_scale.*per-token"):
        make_linear([stored], "declared", "static")
    stored, _ = member("nvfp4", 16, None)
    with pytest.raises(CheckpointError, match=r"an\.nvfp4 has no input_scale"):
        make_linear([stored], "declared")
    bare = StoredLinear("an.nvfp4", "nvfp4", torch.zeros(16, 8, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"an\.nvfp4\.weight_scale is missing"):
        make_linear([bare], "weight_only")
