"""Poisoned sources: refused with the tensor's name, or published and found sound by `verify`."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.checkpoint.names import canonical_module, canonical_name
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.soundness import closeness, faults
from halfbyte.checkpoint.verify import verify
from halfbyte.errors import CheckpointError, FormatError, HalfbyteError
from halfbyte.formats.nvfp4 import EncodedNVFP4, decode_nvfp4, encode_nvfp4, nvfp4_tensor_scale
from halfbyte.kernels.dispatch import largest_fp8_code
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.modules import fused_partners
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.scales import METHODS
from halfbyte.recipe.schema import load_recipe

LAYERS = 6
RECIPE = load_recipe("medium-3.5")
DATA_FREE = replace(RECIPE, scales=METHODS["none"])
NAN, INF = torch.nan, torch.inf
Poison = Callable[[Tensor], object]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for dialect in ("none", "mistral-fp8"):
        write_tiny_checkpoint(root / dialect, layers=LAYERS, vision=True, dialect=dialect)
    generator = torch.Generator().manual_seed(0)
    tokens = {"batch0.input_ids": torch.randint(0, 512, (2, 24), generator=generator)}
    save_file(tokens, root / "tokens.safetensors")
    return root


def poisoned(source: Path, target: Path, name: str, poison: Poison) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name].clone()
    poison(tensors[name])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def judge(source: Path, output: Path, name: str, tokens: Path | None) -> str:
    """What became of it; fails if neither of the two things that may."""
    recipe = DATA_FREE if tokens is None else RECIPE
    config = QuantizeConfig(source, output, recipe, calibration_tokens=tokens, with_errors=False)
    refused: HalfbyteError | None = None
    try:
        quantize(config)
    except (FormatError, CheckpointError) as error:
        refused = error
    if refused is None:
        report = verify(output, source)
        assert report.is_sound, f"{name}: {[str(p) for p in report.problems]}"
        return "sound"
    module = canonical_module(name.rpartition(".")[0], "hf") or ""
    # A partner may be what is refused; calibration sees what comes of a tensor further on.
    known = [name, *fused_partners(module)] if module.count(".") == 3 else [name, module]
    is_named = any(word and word in str(refused) for word in known)
    assert is_named or tokens is not None, f"{name}: {refused}"
    assert sorted(p.name for p in output.parent.iterdir()) == [source.name]
    return "refused"


def value_poison(rng: random.Random) -> tuple[str, Poison]:
    """Puts an odd value, or an odd factor, into one element, one row or everything."""
    value = rng.choice([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 3e38, 1e-38, 1e30, 1e-30, 7e4])
    is_factor, part = rng.random() < 0.4, rng.choice(["element", "row", "all"])

    def poison(tensor: Tensor) -> None:
        flat = tensor.view(-1)
        rows = tensor.shape[0] if tensor.dim() else 1
        size = {"element": 1, "row": flat.numel() // rows, "all": flat.numel()}[part]
        start = rng.randrange(0, flat.numel() - size + 1)
        if tensor.dtype == torch.float8_e4m3fn:
            codes = flat.view(torch.uint8)[start : start + size]
            codes.fill_(rng.choice([0x00, 0x7F, 0xFF, 0x80, 0x7E, 0x01]))
        elif is_factor:
            flat[start : start + size] *= value
        else:
            flat[start : start + size] = value

    return f"{value} {'times' if is_factor else 'set'} {part}", poison


def check_seed(seed: int, sources: Path, tmp_path: Path) -> str:
    rng = random.Random(seed)
    dialect = rng.choice(["none", "mistral-fp8"])
    names = list(load_file(sources / dialect / "model.safetensors"))
    # Every kind of tensor equally often, whatever number of them there is.
    kinds = sorted({name.rpartition("layers.")[2].partition(".")[2] or name for name in names})
    kind = rng.choice(kinds)
    name = rng.choice([n for n in names if n.endswith(kind)])
    what, poison = value_poison(rng)
    source = poisoned(sources / dialect, tmp_path / "source", name, poison)
    tokens = sources / "tokens.safetensors" if rng.random() < 0.3 else None
    return f"{judge(source, tmp_path / 'out', name, tokens)} {what}"


@pytest.mark.parametrize("seed", range(14))
def test_poison_is_refused_by_name_or_does_no_harm(
    seed: int, sources: Path, tmp_path: Path
) -> None:
    check_seed(seed, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_much_poison_is_refused_by_name_or_does_no_harm(sources: Path, tmp_path: Path) -> None:
    outcomes = []
    for seed in range(1000, 1400):
        outcomes.append(check_seed(seed, sources, tmp_path / str(seed)).split()[0])
        shutil.rmtree(tmp_path / str(seed))
    assert outcomes.count("refused") > 40 and outcomes.count("sound") > 40


# name -> dialect, end of the tensor's name, what is done to it
BY_HAND: dict[str, tuple[str, str, Poison]] = {
    "NaN in the embedding": ("none", "embed_tokens.weight", lambda t: t[3].fill_(NAN)),
    "infinity in the last norm": ("none", "language_model.norm.weight", lambda t: t[0].fill_(INF)),
    "NaN in the head": ("mistral-fp8", "lm_head.weight", lambda t: t[-1].fill_(NAN)),
    "NaN in the tower": ("none", "patch_conv.weight", lambda t: t[0].fill_(NAN)),
    "NaN in the projector": ("none", "projector.linear_1.weight", lambda t: t[0].fill_(NAN)),
    "a norm of zeros": ("none", "layers.2.input_layernorm.weight", lambda t: t.zero_()),
    "input scale 0": ("mistral-fp8", "5.self_attn.q_proj.activation_scale", lambda t: t.zero_()),
    "input scale NaN": ("mistral-fp8", "4.mlp.down_proj.activation_scale", lambda t: t.fill_(NAN)),
    "input scale below 0": ("mistral-fp8", "4.mlp.up_proj.activation_scale", lambda t: t.neg_()),
    "scale below 0": ("mistral-fp8", "1.self_attn.o_proj.weight_scale_inv", lambda t: t.neg_()),
    "scale infinite": ("mistral-fp8", "4.mlp.gate_proj.weight_scale_inv", lambda t: t.fill_(INF)),
    "gate drowns up": ("none", "layers.4.mlp.gate_proj.weight", lambda t: t[0, :1].fill_(3e38)),
    "up drowns gate": ("none", "layers.4.mlp.up_proj.weight", lambda t: t.mul_(1e9)),
    "up is a whisper": ("mistral-fp8", "4.mlp.up_proj.weight_scale_inv", lambda t: t.mul_(1e-12)),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_what_cannot_be_published_is_refused(what: str, sources: Path, tmp_path: Path) -> None:
    dialect, ending, poison = BY_HAND[what]
    name = next(
        name for name in load_file(sources / dialect / "model.safetensors") if name.endswith(ending)
    )
    source = poisoned(sources / dialect, tmp_path / "source", name, poison)
    assert judge(source, tmp_path / "out", name, None) == "refused"


@pytest.mark.parametrize("group", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
@pytest.mark.parametrize("layer", [1, 4, 5])
def test_a_fused_group_takes_its_largest_input_scale(
    sources: Path, tmp_path: Path, group: tuple[str, ...], layer: int
) -> None:
    ending = f"layers.{layer}.{'self_attn' if len(group) == 3 else 'mlp'}.{group[-1]}"
    stored = load_file(sources / "mistral-fp8" / "model.safetensors")
    name = next(n for n in stored if n.endswith(f"{ending}.activation_scale"))
    source = poisoned(sources / "mistral-fp8", tmp_path / "source", name, lambda t: t.mul_(2))
    plain = tmp_path / "plain"
    for one, output in ((source, tmp_path / "out"), (sources / "mistral-fp8", plain)):
        quantize(QuantizeConfig(one, output, DATA_FREE, with_errors=False))
    assert verify(tmp_path / "out", source).is_sound
    ours, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(plain)
    member = canonical_name(f"{name.rpartition('.')[0]}.weight", "hf", "none")
    assert member is not None
    for linear in fused_partners(member.removesuffix(".weight")):
        scale = f"{linear}.input_scale"
        assert ours.scalar(scale) == 2 * before.scalar(scale), linear


def test_a_pruned_linear_and_a_bias_of_zeros_may_be_kept(sources: Path, tmp_path: Path) -> None:
    """What a recipe keeps in bf16 may be zero: odd, and said so, but a model."""
    fp8 = replace(load_recipe("fp8"), scales=METHODS["none"])
    name = next(
        n for n in load_file(sources / "none" / "model.safetensors")
        if n.endswith("vision_tower.transformer.layers.0.attention.q_proj.weight")
    )  # fmt: skip
    source = poisoned(sources / "none", tmp_path / "source", name, lambda t: t.zero_())
    quantize(QuantizeConfig(source, tmp_path / "out", fp8, with_errors=False))
    report = verify(tmp_path / "out", source)
    assert report.is_sound
    assert [str(p) for p in report.problems if "zero" in p.what] == [
        f"warning: {name}: is all zero"
    ]


def test_tokens_without_an_embedding_are_refused(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "none", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 512}}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has token 512"):
        quantize(QuantizeConfig(tmp_path / "source", tmp_path / "out", DATA_FREE))


def test_a_faster_way_to_the_largest_code_finds_the_same_faults() -> None:
    generator = torch.Generator().manual_seed(0)
    for byte in (None, 0x00, 0x80, 0x7F, 0xFF, 0x7E):
        bits = torch.randint(0, 0x7F, (33, 48), generator=generator, dtype=torch.uint8)
        bits[5, 7] = 3 if byte is None else byte
        if byte == 0x80:
            bits.fill_(byte)
        codes = bits.view(torch.float8_e4m3fn)
        for name in ("decoder.0.mlp.up.weight", "decoder.0.mlp.up.weight_scale"):
            plain = list(faults(name, codes))
            assert plain == list(faults(name, codes, largest_fp8_code))
            assert bool(plain) == (byte in (0x7F, 0xFF, 0x80))


@pytest.mark.parametrize("values", [(5.0, 6.0), (0.24, 6.0), (1.0,), (0.1, 0.3, 6.0)])
def test_a_weight_that_no_scale_suits_is_not_called_wrong(values: tuple[float, ...]) -> None:
    """Blocks of e2m1's worst values lose more than 15 dB allows; that is the format's doing."""
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, len(values), (16, 64), generator=generator)
    w = torch.tensor(values)[choice]
    w[:, ::16] = max(values)
    w = w.to(torch.bfloat16)
    encoded = encode_nvfp4(w, nvfp4_tensor_scale(w.abs().amax()))
    assert not closeness("nvfp4", w, decode_nvfp4(encoded, torch.float32)).is_far
    other = EncodedNVFP4(encoded.codes_OI2, encoded.scale_OB, encoded.tensor_scale * 3)
    assert closeness("nvfp4", w, decode_nvfp4(other, torch.float32)).is_far


@pytest.mark.parametrize("rows, is_told", [(1, False), (2, True), (3, True)])
def test_a_table_of_zeros_is_told_and_a_row_of_zeros_may_be(rows: int, is_told: bool) -> None:
    found = list(faults("decoder.0.attention.q.weight", torch.zeros(rows, 16).bfloat16()))
    assert bool(found) is is_told
