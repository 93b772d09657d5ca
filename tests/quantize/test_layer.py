"""One layer: which tensors come out, FP8 codes that pass through, weights that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.calibrate.budget import MemoryBudget, OverBudgetError
from halfbyte.calibrate.stream import TAPS, LayerStatistics
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import FormatError
from halfbyte.formats.fp8 import PROFILES, Profile, decode_fp8
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.encode import SourceWeight, _encode_fp8
from halfbyte.quantize.layer import cache_scales, quantize_layer, wanted_sums
from halfbyte.quantize.report import linear_record
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import Scales, load_recipe, parse_recipe

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


NORMED = ("attention.input", "mlp.input")
EVERY = (*NORMED, "attention.o.input", "mlp.down.input")


@pytest.mark.parametrize(
    "scales, wanted",
    [
        (Scales("amax", "amax"), {}),
        (Scales("mse", "amax"), {}),
        (Scales("weighted", "amax"), dict.fromkeys(EVERY, "squares")),
        (Scales("gptq", "amax"), dict.fromkeys(EVERY, "products")),
        # What is folded into a norm is asked for where a norm is read.
        (Scales("amax", "amax", smoothing=0.5), dict.fromkeys(NORMED, "squares")),
        (Scales("weighted", "amax", smoothing=0.5), dict.fromkeys(EVERY, "squares")),
        (Scales("gptq", "amax", smoothing=0.5), dict.fromkeys(EVERY, "products")),
    ],
)
def test_calibration_sums_up_what_the_rules_need_and_no_more(
    fp8_source: Checkpoint, scales: Scales, wanted: dict[str, str]
) -> None:
    everywhere = replace(load_recipe("nvfp4-everywhere"), scales=scales)
    assert wanted_sums(make_plan(everywhere, fp8_source.config), 3) == wanted
    mixed = make_plan(replace(load_recipe("medium-3.5"), scales=scales), fp8_source.config)
    assert wanted_sums(mixed, 0) == {}, "FP8 linears need none"
    kept = {tap: want for tap, want in wanted.items() if tap.startswith("mlp")}
    assert wanted_sums(mixed, 4) == kept


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
            assert record["sqnr_db"] is not None and 18 < record["sqnr_db"] < 25
            assert 0 <= record["zeroed"] < 0.2
            assert record["tensor_scale"] > 0


class _Ledger(MemoryBudget):
    """A budget that notes what it is asked for, and has no room for one amount."""

    def __init__(self, refused: int = -1) -> None:
        super().__init__(None)
        self.asked: list[int] = []
        self._refused = refused

    def check(self, num_bytes: int = 0) -> None:
        self.asked.append(num_bytes)
        if num_bytes == self._refused:
            raise OverBudgetError("no room")


def test_the_budget_is_asked_before_anything_is_made(fp8_source: Checkpoint) -> None:
    plan = make_plan(load_recipe("medium-3.5"), fp8_source.config)
    ledger = _Ledger()
    seen = list(quantize_layer(fp8_source, 4, plan, None, "ieee", CPU, ledger))
    made = [
        linear.source.stored.numel() * 9 // 16 if linear.format == "nvfp4" else 0  # 4.5 bits
        for linear in seen
    ]
    read = [fp8_source.num_bytes(f"{linear.name}.weight") for linear in seen]
    assert sorted(ledger.asked) == sorted(made + read)
    assert max(made) > 0
    with pytest.raises(OverBudgetError):
        list(quantize_layer(fp8_source, 4, plan, None, "ieee", CPU, _Ledger(max(made))))


ATTENTION_KEPT = """
name: kept
rules:
  - {part: decoder, group: attention, format: bf16}
  - {part: decoder, group: mlp, format: fp8}
keep: [embedding, head]
kv_cache: bf16
scales: {weights: amax, activations: none}
calibration: {blend: builtin, samples: 1, tokens_per_sample: 1, seed: 0}
"""


def test_a_linear_that_a_recipe_keeps_is_decoded_from_fp8(fp8_source: Checkpoint) -> None:
    plan = make_plan(parse_recipe(ATTENTION_KEPT, "kept.yaml"), fp8_source.config)
    ledger = _Ledger()
    for linear in quantize_layer(fp8_source, 2, plan, None, "ieee", CPU, ledger):
        weight = linear.tensors[f"{linear.name}.weight"]
        if ".mlp." in linear.name:
            assert linear.format == "fp8" and weight.dtype == torch.float8_e4m3fn
            continue
        assert linear.format == "bf16" and linear.tensors.keys() == {f"{linear.name}.weight"}
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, fp8_source.decoded(linear.name))
        assert 2 * weight.numel() in ledger.asked  # decoded, it takes two bytes each


def test_a_kept_linear_of_a_bf16_source_is_not_copied(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "bf16", layers=1)
    source = Checkpoint.open(tmp_path / "bf16")
    plan = make_plan(parse_recipe(ATTENTION_KEPT, "kept.yaml"), source.config)
    ledger = _Ledger()
    for linear in quantize_layer(source, 0, plan, None, "ieee", CPU, ledger):
        if linear.format == "bf16":
            weight = linear.tensors[f"{linear.name}.weight"]
            assert weight is linear.source.stored
            assert torch.equal(weight, source.tensor(f"{linear.name}.weight"))
            # Asked for once, when it was read; nothing is made of it.
            assert ledger.asked.count(2 * weight.numel()) <= 2


def test_every_weight_is_told_as_it_is_read(fp8_source: Checkpoint) -> None:
    plan = make_plan(load_recipe("medium-3.5"), fp8_source.config)
    told: dict[str, torch.Tensor] = {}
    list(quantize_layer(fp8_source, 1, plan, None, "ieee", CPU, on_read=told.__setitem__))
    assert len(told) == 7
    for name, tensor in told.items():
        assert torch.equal(tensor.view(torch.uint8), fp8_source.tensor(name).view(torch.uint8))


def test_a_scale_among_subnormals_is_kept_with_its_codes(fp8_source: Checkpoint) -> None:
    """bf16 says the largest weight only roughly there; codes under another scale would be wrong."""
    codes = torch.arange(32, dtype=torch.uint8).view(2, 16)
    codes[0, 0] = 0x7E
    weight = SourceWeight("w", codes.view(torch.float8_e4m3fn), torch.tensor(3.3e-43))
    kept, scale = _encode_fp8(weight, weight.amax(), "ieee")
    assert torch.equal(kept.view(torch.uint8), codes) and float(scale) == float(weight.scale or 0)
