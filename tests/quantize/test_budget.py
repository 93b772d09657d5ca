"""From a number of bytes to a recipe: kept, reproduced, and explained where it cannot be."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.cli.main import main
from halfbyte.cli.quantize import kept
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.modules import WeightFormat, decoder_linears, fused_partners
from halfbyte.quantize.budget import Asked, made_to_measure, outline, recipe_file, room_on
from halfbyte.quantize.groups import groups_of
from halfbyte.quantize.hosting import GPUS, host_on
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.scales import METHODS
from halfbyte.quantize.survey import survey
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import Recipe, Scales, load_recipe, parse_recipe
from halfbyte.recipe.written import recipe_text, spans
from vllm_rules import require_vllm_reads

LAYERS = 2
FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    write_tiny_checkpoint(root / "fp8", layers=LAYERS, dialect="mistral-fp8")
    ids = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")
    return root


def config_of(source: Path, output: Path, recipe: Recipe | None = None) -> QuantizeConfig:
    return QuantizeConfig(
        source / "fp8",
        output,
        recipe or load_recipe("fp8"),
        calibration_tokens=source / "tokens.safetensors",
        with_errors=False,
    )


def quantize_by(source: Path, output: Path, *flags: str) -> int:
    tokens = str(source / "tokens.safetensors")
    paths = str(source / "fp8"), str(output)
    return main(["quantize", *paths, "--calibration-tokens", tokens, *flags])


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_a_budget_is_kept_and_its_recipe_gives_the_same_checkpoint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quantize_by(source, out, "--budget", "470kB") == 0
    assert "Estimated KL divergence" in capsys.readouterr().out
    assert 440_000 < weight_bytes(out) <= 470_000
    assert verify(out, source / "fp8").is_sound
    require_vllm_reads(out)
    file = tmp_path / "out.recipe.yaml"
    assert quantize_by(source, tmp_path / "again", "--recipe", str(file)) == 0
    first, second = (load_file(x / "model.safetensors") for x in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(
            tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)
        ), name
    # The reasons stand beside the rules: every group, what each format costs and weighs.
    reasons = [line for line in file.read_text().splitlines() if line.startswith("#")]
    groups = groups_of(Checkpoint.open(source / "fp8").config)
    assert sum(": fp8 (" in x or ": nvfp4 (" in x or ": bf16 (" in x for x in reasons) == len(
        groups
    )
    measured = json.loads((tmp_path / "out.sensitivity.json").read_text())
    assert list(measured["losses"]) == [members[0] for members in groups]


def test_any_budget_between_the_bounds_is_kept_and_more_is_never_worse(
    source: Path, tmp_path: Path
) -> None:
    config, before = config_of(source, tmp_path / "out"), float("inf")
    formats: dict[str, Any] = {}
    for budget in range(385_000, 560_000, 18_000):
        found = made_to_measure(config, Asked(budget, f"--budget {budget}B"), Scales())
        assert found.file_bytes <= budget
        assert found.choice.loss <= before and found.choice.gap >= 0
        before = found.choice.loss
        formats = dict(make_plan(found.recipe, Checkpoint.open(source / "fp8").config).formats)
        assert all(formats[name] == formats[x] for name in formats for x in fused_partners(name))
    assert set(formats.values()) <= {"fp8", "nvfp4"}, "an FP8 source is FP8 at best"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budget", "200kB"], "smallest format they take 0.3"),
        (["--budget", "9GB"], "nothing has to be chosen"),
        (["--fit", "h100"], "nothing has to be chosen"),
        (["--fit", "voodoo"], "there are a100"),
        (["--fit", "h100", "--context", "999999999"], "the model has"),
        (["--budget", "470kB", "--method", "none"], "measures on text"),
        (["--budget", "470kB", "--recipe", "fp8"], "exclude each other"),
        (["--context", "100"], "give --fit"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(
    source: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert quantize_by(source, tmp_path / "out", *flags) != 0
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_fits_a_gpu_is_what_serving_finds_there() -> None:
    """A plan that takes all the room serves the request, one that takes more does not."""
    config = tiny_config(layers=LAYERS)
    wide = replace(config, text=replace(config.text, vocab_size=131072, width=12288))
    plan = make_plan(load_recipe("fp8"), wide)
    context = 4096
    for name in GPUS:
        room = room_on(name, context, wide).num_bytes
        hosted = host_on(GPUS[name], 1, plan, wide, context=context, requests=1)
        left = room - hosted.weight_bytes
        tokens = hosted.kv_tokens - context
        assert 0 <= left - tokens * hosted.kv_token_bytes < 16 * hosted.kv_token_bytes


def test_the_plan_says_what_is_possible_and_takes_what_was_measured(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_to_measure(config_of(source, tmp_path / "out"), Asked(470_000, "x"), Scales())
    found = survey(source / "fp8")
    plan, said = outline(found, Asked(470_000, "--budget 470kB"))
    assert "are possible" in said and plan.recipe_name == "budget-470000"
    told, said = outline(found, Asked(470_000, "--budget 470kB"), tmp_path / "out.sensitivity.json")
    assert "Estimated KL divergence" in said and told.formats.keys() <= plan.formats.keys() | {
        "head"
    }
    with pytest.raises(CheckpointError, match="is no sensitivity of ours"):
        outline(found, Asked(470_000, "x"), source / "fp8" / "config.json")
    with pytest.raises(UsageError, match="nothing has to be chosen"):
        outline(found, Asked(10**9, "x"))
    paths = [str(source / "fp8"), "--no-timing", "--gpu", "h100", "--context", "100"]
    assert main(["plan", *paths, "--budget", "470kB"]) == 0
    assert "measuring " in capsys.readouterr().out


@settings(deadline=None)
@given(data=st.data())
def test_any_partition_is_written_as_a_recipe_and_read_back(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 12))
    config = tiny_config(layers=layers)
    chosen: dict[tuple[str, ...], WeightFormat] = {
        members: data.draw(st.sampled_from(FORMATS)) for members in groups_of(config)
    }
    formats = {name: chosen[members] for members in chosen for name in members}
    scales = METHODS[data.draw(st.sampled_from(sorted(METHODS)))]
    text = recipe_text(
        "made to: measure # 1",
        formats,
        config,
        kv_cache="fp8",
        scales=scales,
        calibration=load_recipe("fp8").calibration,
        reasons=["a reason: [with", "marks} of YAML"],
    )
    recipe = parse_recipe(text, "written.yaml")
    plan = make_plan(recipe, config)
    wanted = {name: x for name, x in formats.items() if name != "head" or x != "bf16"}
    assert plan.formats == wanted
    assert recipe.name == "made to: measure # 1"
    assert recipe.scales == scales and recipe.calibration == load_recipe("fp8").calibration
    assert isinstance(yaml.safe_load(text), dict)
    assert len(decoder_linears(config)) == 7 * layers


def test_layers_are_spelt_as_people_spell_them() -> None:
    assert spans([0, 1, 2, 3, 7, 9, 10]) == ["0-3", 7, "9-10"]
    assert recipe_file(Path("/x/out")) == Path("/x/out.recipe.yaml")


def test_what_ctrl_c_leaves_of_measuring_is_said(tmp_path: Path) -> None:
    args = argparse.Namespace(output=tmp_path / "out")
    assert "nothing is kept" in kept(args)
    (tmp_path / ".out.sensitivity.json.halfbyte-work").mkdir()
    assert "measured steps are kept in" in kept(args)
