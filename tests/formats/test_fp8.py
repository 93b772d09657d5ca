"""FP8 per tensor: golden bytes, the three profiles, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import (
    PROFILES,
    Profile,
    decode_fp8,
    encode_fp8,
    fp8_scale,
    round_to_fp8,
)
from halfbyte.formats.measure import largest_magnitude, relative_error

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LAYERS = "model.language_model.layers."


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(GOLDEN / "modelopt-tiny.safetensors")
    return tensors


@pytest.mark.parametrize("profile", ["ieee", "cuda"])
@pytest.mark.parametrize("linear", ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.mlp.down_proj"])
def test_weights_have_the_reference_bytes(
    golden: dict[str, torch.Tensor], profile: Profile, linear: str
) -> None:
    name = LAYERS + linear
    scale = fp8_scale(golden[f"amax:{name}.weight_quantizer"], profile)
    codes = encode_fp8(golden[f"source:{name}.weight"], scale, profile)
    assert torch.equal(scale, golden[f"{profile}:{name}.weight_scale"])
    expected = golden[f"{profile}:{name}.weight"]
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("profile", ["ieee", "cuda"])
def test_cache_scales_have_the_reference_bytes(
    golden: dict[str, torch.Tensor], profile: Profile
) -> None:
    compared = 0
    for name, stored in golden.items():
        if name.startswith(f"{profile}:") and name.endswith(("k_scale", "v_scale")):
            layer, which = name.removeprefix(f"{profile}:").rsplit(".", 2)[0], name[-7]
            amax = golden[f"amax:{layer}.{which}_bmm_quantizer"]
            assert torch.equal(fp8_scale(amax, profile), stored), name
            compared += 1
    assert compared == 16


def test_mistral_source_decodes_as_the_model_library_does() -> None:
    golden = load_file(GOLDEN / "modelopt-tiny-fp8.safetensors")
    name = LAYERS + "3.self_attn.o_proj"
    codes, scale = golden[f"source:{name}.weight"], golden[f"source:{name}.weight_scale_inv"]
    decoded = decode_fp8(codes, scale)
    assert torch.equal(decoded, (codes.float() * scale.float()).bfloat16())
    again = encode_fp8(decoded, fp8_scale(golden[f"amax:{name}.weight_quantizer"]))
    assert torch.equal(again.view(torch.uint8), golden[f"ieee:{name}.weight"].view(torch.uint8))


def test_profiles_differ_where_they_should() -> None:
    amax = torch.arange(1, 2000).to(torch.bfloat16)
    ieee, cuda = fp8_scale(amax), fp8_scale(amax, "cuda")
    assert torch.equal(fp8_scale(amax, "direct"), ieee)
    assert 0.1 < float((ieee != cuda).float().mean()) < 0.9
    assert torch.allclose(ieee, cuda, rtol=2**-23, atol=0)


def test_direct_is_the_most_accurate_profile() -> None:
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    errors = {
        profile: relative_error(w, decode_fp8(encode_fp8(w, scale, profile), scale, torch.float32))
        for profile in PROFILES
        for scale in [fp8_scale(largest_magnitude(w), profile)]
    }
    assert errors["direct"] < min(errors["ieee"], errors["cuda"])


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_scale_of_nothing_is_refused(bad: float) -> None:
    with pytest.raises(FormatError, match="positive and finite"):
        fp8_scale(torch.tensor(bad))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_weights_are_refused(bad: float, dtype: torch.dtype) -> None:
    w = torch.ones(4, 16, dtype=dtype)
    w[3, 15] = bad
    with pytest.raises(FormatError, match="NaN or infinity"):
        encode_fp8(w, torch.tensor(1.0))


def test_scale_shapes_and_dtypes_of_either_dialect_decode_alike() -> None:
    codes = encode_fp8(torch.randn(3, 5), torch.tensor(0.01))
    scale = torch.tensor(0.0123, dtype=torch.bfloat16)
    expected = decode_fp8(codes, scale)
    assert torch.equal(decode_fp8(codes, scale.float()), expected)
    assert torch.equal(decode_fp8(codes, scale.reshape(1)), expected)
    assert expected.dtype == torch.bfloat16


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_decoding_and_encoding_again_changes_no_code(seed: int, size: float) -> None:
    """A max-scaled tensor passes through bf16 unchanged: FP8 linears may keep their codes."""
    w = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    codes = encode_fp8(w, fp8_scale(largest_magnitude(w)))
    scale = fp8_scale(largest_magnitude(w)).bfloat16()
    decoded = decode_fp8(codes, scale)
    again = encode_fp8(decoded, fp8_scale(largest_magnitude(decoded)))
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_activations_round_as_declared_and_saturate() -> None:
    scale = torch.tensor(0.5)
    x = torch.tensor([[0.0, 0.5, 0.6, 224.0, 1000.0, -1000.0]], dtype=torch.bfloat16)
    rounded = round_to_fp8(x, scale)
    assert rounded.dtype == torch.bfloat16
    assert rounded.tolist() == [[0.0, 0.5, 0.625, 224.0, 224.0, -224.0]]


def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(9, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    scale = fp8_scale(largest_magnitude(w))
    whole = encode_fp8(w, scale)
    decoded = decode_fp8(whole, scale)
    monkeypatch.setattr("halfbyte.formats.measure.CHUNK_VALUES", 32)
    assert torch.equal(encode_fp8(w, scale).view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(decode_fp8(whole, scale), decoded)
