"""One layer: which tensors come out, FP8 codes that pass through, weights that are refused."""

import pytest
import torch

from halfbyte.calibrate.stream import TAPS, LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import PROFILES, Profile, decode_fp8
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.layer import SourceWeight, _encode_fp8, cache_scales, quantize_layer
from halfbyte.quantize.report import linear_record
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe

CPU = torch.device("cpu")
SEEN = {tap: torch.tensor(2.0 + n).bfloat16() for n, tap in enumerate(TAPS)}


@pytest.fixture(scope="module")
def fp8_source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny") / "fp8"
    write_tiny_checkpoint(directory, layers=6, dialect="mistral-fp8")
    return Checkpoint.open(directory)


def made(checkpoint: Checkpoint, layer: int, profile: Profile) -> dict[str, torch.Tensor]:
    plan = make_plan(load_recipe("medium-3.5"), checkpoint.config)
    statistics = LayerStatistics(layer, SEEN)
    linears = quantize_layer(checkpoint, layer, plan, statistics, profile, CPU)
    return {name: tensor for linear in linears for name, tensor in linear.tensors.items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_fp8_linears_keep_their_codes(fp8_source: Checkpoint, profile: Profile) -> None:
    tensors = made(fp8_source, 0, profile)
    for short in ("attention.q", "attention.o", "mlp.down"):
        name = f"decoder.0.{short}"
        source = fp8_source.tensor(f"{name}.weight")
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), source.view(torch.uint8))
        scale = float(tensors[f"{name}.weight_scale"])
        declared = fp8_source.scalar(f"{name}.weight_scale")
        assert scale == pytest.approx(declared, rel=0.003)
        assert (scale == declared) or profile != "direct"


def test_siblings_share_what_they_must(fp8_source: Checkpoint) -> None:
    tensors = made(fp8_source, 4, "ieee")
    gate, up = "decoder.4.mlp.gate", "decoder.4.mlp.up"
    for role in ("tensor_scale", "input_scale"):
        assert torch.equal(tensors[f"{gate}.{role}"], tensors[f"{up}.{role}"])
    for role in ("weight_scale", "input_scale"):
        assert tensors[f"decoder.4.attention.q.{role}"].shape == ()
    assert len(tensors) == 4 * 3 + 3 * 4


def test_cache_scales_come_from_keys_and_values() -> None:
    scales = cache_scales(7, LayerStatistics(7, SEEN), "ieee", "amax")
    assert list(scales) == ["decoder.7.attention.k_scale", "decoder.7.attention.v_scale"]
    values = [float(scale) for scale in scales.values()]
    assert values == [float(SEEN[t].float() / 448) for t in ("attention.k", "attention.v")]
    assert {float(s) for s in cache_scales(7, None, "ieee", "none").values()} == {1.0}


def test_without_data_the_declared_input_scales_are_used(fp8_source: Checkpoint) -> None:
    plan = make_plan(load_recipe("medium-3.5"), fp8_source.config)
    for linear in quantize_layer(fp8_source, 4, plan, None, "ieee", CPU):
        declared = fp8_source.scalar(f"{linear.name}.input_scale")
        factor = 6 if linear.format == "nvfp4" else 1
        scale = float(linear.tensors[f"{linear.name}.input_scale"])
        assert scale == pytest.approx(declared / factor)


def test_amax_from_codes_is_amax_of_the_decoded_weight() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randn(16, 16, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand((), generator=generator)
        source = SourceWeight("w", codes, scale)
        assert source.amax() == decode_fp8(codes, scale).abs().max()


@pytest.mark.parametrize(
    "stored, said",
    [
        (torch.zeros(4, 16).bfloat16(), "all weights are zero"),
        (torch.full((4, 16), torch.nan).bfloat16(), "NaN or infinity"),
        (torch.full((4, 16), torch.inf).bfloat16(), "NaN or infinity"),
        (torch.zeros(4, 16).to(torch.float8_e4m3fn), "all weights are zero"),
        (torch.full((4, 16), torch.nan).to(torch.float8_e4m3fn), "NaN or infinity"),
    ],
)
def test_weights_without_a_scale_are_refused_by_name(stored: torch.Tensor, said: str) -> None:
    scale = None if stored.dtype == torch.bfloat16 else torch.tensor(0.5)
    with pytest.raises(FormatError, match=rf"decoder\.1\.mlp\.up: .*{said}"):
        SourceWeight("decoder.1.mlp.up", stored, scale).amax()


def test_a_source_that_is_not_max_scaled_keeps_its_exact_values(fp8_source: Checkpoint) -> None:
    """Small codes with a large scale: re-deriving the scale would need other codes."""
    weight = SourceWeight("w", torch.full((2, 16), 3.0).to(torch.float8_e4m3fn), torch.tensor(0.7))
    codes, scale = _encode_fp8(weight, weight.amax(), "ieee")
    assert torch.equal(decode_fp8(codes, scale), weight.decoded())


def test_records_measure_the_decoded_weight(fp8_source: Checkpoint) -> None:
    plan = make_plan(load_recipe("medium-3.5"), fp8_source.config)
    for linear in quantize_layer(fp8_source, 4, plan, None, "direct", CPU):
        record = linear_record(linear)
        assert record["name"] == linear.name
        if linear.format == "fp8":
            assert record["sqnr_db"] is None  # nothing changed
        else:
            assert 18 < record["sqnr_db"] < 25
            assert 0 <= record["zeroed"] < 0.2
            assert record["tensor_scale"] > 0
