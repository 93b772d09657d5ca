"""NVFP4: golden bytes with their corner cases, a slow twin, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import Profile
from halfbyte.formats.layout import unpack_nibbles
from halfbyte.formats.measure import largest_magnitude
from halfbyte.formats.nvfp4 import (
    EncodedNVFP4,
    decode_nvfp4,
    encode_nvfp4,
    nvfp4_input_scale,
    nvfp4_tensor_scale,
    round_to_nvfp4,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LAYERS = "model.language_model.layers."


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(GOLDEN / "modelopt-tiny.safetensors")
    return tensors


def encode_slowly(w_OI: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The rules of docs/reference/formats.md#arithmetic-of-scales-and-codes, unpacked codes."""
    blocks = w_OI.float().view(-1, 16)
    wanted = blocks.abs().amax(1) / (6 * tensor_scale)
    wanted[wanted == 0] = 1.0
    scale = wanted.clamp(2**-9, 448).to(torch.float8_e4m3fn)
    t = blocks / (scale.float() * tensor_scale)[:, None]
    a = t.abs()
    code = (a > 0.25).int() + (a >= 0.75) + (a > 1.25) + (a >= 1.75)
    code = code + (a > 2.5) + (a >= 3.5) + (a > 5) + 8 * (t < 0)
    return code.to(torch.uint8).view(w_OI.shape), scale.view(w_OI.shape[0], -1)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("profile", ["ieee", "cuda"])
@pytest.mark.parametrize("linear", ["gate_proj", "up_proj", "down_proj"])
def test_weights_have_the_reference_bytes(
    golden: dict[str, Tensor], profile: Profile, linear: str
) -> None:
    name = f"{LAYERS}4.mlp.{linear}"
    scale = nvfp4_tensor_scale(golden[f"amax:{name}.weight_quantizer"], profile)
    encoded = encode_nvfp4(golden[f"source:{name}.weight"], scale)
    assert torch.equal(encoded.tensor_scale, golden[f"{profile}:{name}.weight_scale_2"])
    assert same_bytes(encoded.scale_OB, golden[f"{profile}:{name}.weight_scale"])
    assert same_bytes(encoded.codes_OI2, golden[f"{profile}:{name}.weight"])


def test_an_odd_number_of_blocks_has_the_reference_bytes() -> None:
    golden = load_file(GOLDEN / "modelopt-tiny-fp8.safetensors")
    name = f"{LAYERS}4.mlp.down_proj"
    codes, scale_inv = golden[f"source:{name}.weight"], golden[f"source:{name}.weight_scale_inv"]
    w = (codes.float() * scale_inv.float()).bfloat16()
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(golden[f"amax:{name}.weight_quantizer"]))
    assert encoded.scale_OB.shape[1] == 19
    assert same_bytes(encoded.scale_OB, golden[f"ieee:{name}.weight_scale"])
    assert same_bytes(encoded.codes_OI2, golden[f"ieee:{name}.weight"])


def test_input_scales_have_the_reference_bytes(golden: dict[str, Tensor]) -> None:
    for profile in ("ieee", "cuda"):
        for linear in ("gate_proj", "up_proj", "down_proj"):
            name = f"{LAYERS}4.mlp.{linear}"
            scale = nvfp4_input_scale(golden[f"amax:{name}.input_quantizer"], profile)
            assert torch.equal(scale, golden[f"{profile}:{name}.input_scale"])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 5), st.integers(-20, 20))
def test_fast_encoder_is_the_slow_one(seed: int, rows: int, blocks: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, blocks * 16, generator=generator) * 2.0**power
    w *= torch.rand(rows, 1, generator=generator) ** 8  # some rows under the smallest scale
    for dtype in (torch.bfloat16, torch.float32):
        scale = nvfp4_tensor_scale(largest_magnitude(w.to(dtype)))
        encoded = encode_nvfp4(w.to(dtype), scale)
        codes, scale_OB = encode_slowly(w.to(dtype), scale)
        assert torch.equal(unpack_nibbles(encoded.codes_OI2), codes)
        assert same_bytes(encoded.scale_OB, scale_OB)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31))
def test_error_stays_within_half_a_step_of_the_block(seed: int) -> None:
    """|w - decoded| is at most 1 code unit (half the widest step), plus what e4m3 scales cost."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(largest_magnitude(w)))
    decoded = decode_nvfp4(encoded, torch.float32)
    unit = encoded.scale_OB.float().repeat_interleave(16, dim=1) * encoded.tensor_scale
    # A block scale rounds down by at most 1/16, so 6 may stand for up to 6 * 17/16.
    assert bool(((w - decoded).abs() <= unit * 1.0001).all())


def test_decoding_multiplies_by_the_step_that_encoding_divided_by() -> None:
    """Block scale times tensor scale in f32 first, then the code's value, as the reference does."""
    w = torch.randn(7, 48, generator=torch.Generator().manual_seed(5)).bfloat16()
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(largest_magnitude(w)))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    exact = values[unpack_nibbles(encoded.codes_OI2).long()].view(7, 3, 16)
    exact = exact * (encoded.scale_OB.float() * encoded.tensor_scale)[..., None]
    assert torch.equal(decode_nvfp4(encoded, torch.float32), exact.view(7, 48))
    assert torch.equal(decode_nvfp4(encoded), exact.view(7, 48).bfloat16())


def test_encoding_what_was_decoded_changes_nothing() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    scale = torch.tensor(2.0**-9)
    once = encode_nvfp4(w, scale)
    twice = encode_nvfp4(decode_nvfp4(once, torch.float32), scale)
    assert torch.equal(decode_nvfp4(once, torch.float32), decode_nvfp4(twice, torch.float32))


def test_zero_block_does_not_become_nan() -> None:
    w = torch.zeros(2, 32)
    w[0, 0] = 2688.0
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(torch.tensor(2688.0)))
    assert encoded.scale_OB.view(torch.uint8).tolist() == [[0x7E, 0x38], [0x38, 0x38]]
    assert torch.equal(decode_nvfp4(encoded, torch.float32), w)


def test_block_under_the_smallest_scale_is_clamped_up() -> None:
    w = torch.full((1, 32), 2.0**-20)
    w[0, 0] = 1.0
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(torch.tensor(1.0)))
    assert encoded.scale_OB.view(torch.uint8).tolist() == [[0x7E, 0x01]]
    assert bool(decode_nvfp4(encoded).isfinite().all())


def test_reader_survives_a_stored_scale_of_zero() -> None:
    """Model-Optimizer 0.44 stored scale 0 with codes 7 for blocks under the smallest scale."""
    encoded = EncodedNVFP4(
        torch.full((1, 8), 0x77, dtype=torch.uint8),
        torch.zeros(1, 1).to(torch.float8_e4m3fn),
        torch.tensor(1.0),
    )
    assert torch.equal(decode_nvfp4(encoded), torch.zeros(1, 16, dtype=torch.bfloat16))


def test_weight_beyond_the_shared_scale_saturates_at_six() -> None:
    encoded = encode_nvfp4(torch.full((1, 16), 100.0), torch.tensor(2.0**-9))
    assert set(encoded.codes_OI2.flatten().tolist()) == {0x77}
    assert float(encoded.scale_OB) == 448


@pytest.mark.parametrize("columns", [8, 24, 0, 17])
def test_width_that_is_no_multiple_of_16_is_refused(columns: int) -> None:
    with pytest.raises(FormatError, match=f"{columns} input features"):
        encode_nvfp4(torch.ones(2, columns), torch.tensor(1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_weights_are_refused(bad: float, dtype: torch.dtype) -> None:
    w = torch.ones(4, 32, dtype=dtype)
    w[1, 17] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        encode_nvfp4(w, torch.tensor(1.0))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -1.0])
def test_tensor_scale_must_be_positive_and_finite(bad: float) -> None:
    with pytest.raises(FormatError):
        encode_nvfp4(torch.ones(1, 16), torch.tensor(bad))
    with pytest.raises(FormatError):
        nvfp4_tensor_scale(torch.tensor(bad))


def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(9, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
    scale = nvfp4_tensor_scale(largest_magnitude(w))
    whole = encode_nvfp4(w, scale)
    decoded = decode_nvfp4(whole)
    monkeypatch.setattr("halfbyte.formats.measure.CHUNK_VALUES", 32)
    parts = encode_nvfp4(w, scale)
    assert same_bytes(parts.codes_OI2, whole.codes_OI2)
    assert same_bytes(parts.scale_OB, whole.scale_OB)
    assert torch.equal(decode_nvfp4(parts), decoded)


def test_a_view_of_a_weight_encodes_like_its_copy() -> None:
    whole = torch.randn(8, 64, generator=torch.Generator().manual_seed(9)).bfloat16()
    scale = nvfp4_tensor_scale(largest_magnitude(whole))
    view = whole[::2, 16:48]
    assert same_bytes(
        encode_nvfp4(view, scale).codes_OI2, encode_nvfp4(view.contiguous(), scale).codes_OI2
    )


def test_activations_round_block_by_block() -> None:
    input_scale = torch.tensor(2.0**-6)
    x = torch.zeros(2, 32)
    x[0, :3] = torch.tensor([6.0, 2.6, -0.1])
    x[0, 16] = 1e-9  # its block scale rounds to zero: the block becomes zeros
    x[1, :16] = 1e6  # saturates the block scale at 448 and the codes at 6
    rounded = round_to_nvfp4(x.bfloat16(), input_scale)
    assert rounded.dtype == torch.bfloat16
    assert rounded[0, :3].tolist() == [6.0, 3.0, 0.0]
    assert rounded[0, 3:].abs().max() == 0
    assert rounded[1, 0] == 6 * 448 * 2.0**-6
    with pytest.raises(FormatError, match="24 input features"):
        round_to_nvfp4(torch.zeros(1, 24), input_scale)


def test_nan_activation_stays_visible() -> None:
    x = torch.zeros(1, 32)
    x[0, 3] = math.nan
    rounded = round_to_nvfp4(x, torch.tensor(1.0))
    assert bool(rounded[0, :16].isnan().any())
    assert not bool(rounded[0, 16:].isnan().any())


def test_a_weight_on_a_tie_of_bf16_is_the_reference_s() -> None:
    """Maxima that 7 divides, as 2688 is, put weights on ties; at some the two orders part."""
    parted = 0
    blocks = torch.arange(1, 0x7F, dtype=torch.uint8).view(1, -1).view(torch.float8_e4m3fn)
    for amax in (175, 245):
        tensor_scale = nvfp4_tensor_scale(torch.tensor(amax / 1024))
        for code, value in ((2, 1.0), (3, 1.5), (5, 3.0), (7, 6.0)):
            step_first = (value * (blocks.float() * tensor_scale)).bfloat16()
            code_first = (value * blocks.float() * tensor_scale).bfloat16()
            parted += int((step_first != code_first).sum())
            packed = torch.full((1, blocks.numel() * 8), code | code << 4, dtype=torch.uint8)
            decoded = decode_nvfp4(EncodedNVFP4(packed, blocks, tensor_scale))
            assert torch.equal(decoded, step_first.repeat_interleave(16, dim=1))
    assert parted > 0
