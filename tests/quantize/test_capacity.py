"""`halfbyte plan`: sizes are exact, times come from measuring, and nothing is written."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.cli.main import main
from halfbyte.config import ModelConfig
from halfbyte.errors import CapacityError
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize import capacity
from halfbyte.quantize.capacity import (
    Speeds,
    Text,
    disk_bytes,
    duration,
    durations,
    estimate,
    format_estimate,
    measure,
    output_bytes,
    run_memory,
)
from halfbyte.quantize.layer import widths_of_products
from halfbyte.quantize.memory import sums_of
from halfbyte.quantize.scales import METHODS
from halfbyte.quantize.survey import Survey, survey
from halfbyte.recipe.plan import Plan, make_plan
from halfbyte.recipe.schema import load_recipe

SPEEDS = Speeds(
    device="cpu",
    read_bytes=1e9,
    is_read_measured=True,
    hash_bytes=1e9,
    nvfp4=1e8,
    fp8=1e8,
    decode=1e8,
    compare=1e8,
    flops=1e11,
    wide_flops=5e10,
    gptq=1e7,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    directory = tmp_path_factory.mktemp("capacity") / "fp8"
    write_tiny_checkpoint(directory, layers=6, dialect="mistral-fp8")
    return survey(directory)


@pytest.fixture(scope="module")
def plan(source: Survey) -> Plan:
    return make_plan(load_recipe("medium-3.5"), source.config)


def test_disk_counts_the_output_and_two_layer_boundaries(source: Survey, plan: Plan) -> None:
    output = sum(output_bytes(plan, source.config).values())
    assert disk_bytes(plan, source.config, Text(0, 512)) == output
    width = source.config.text.width
    assert disk_bytes(plan, source.config, Text(10, 512)) == output + 2 * 10 * 512 * width * 2


def test_a_full_width_layer_fits_the_gpus_it_is_said_to_fit() -> None:
    text = replace(tiny_config(layers=88).text, width=12288, mlp_width=28672, num_heads=96)
    wide = replace(text, num_kv_heads=8, head_dim=128)
    layer = 2 * (2 * 12288 * 12288 + 2 * 1024 * 12288 + 3 * 12288 * 28672)
    rows, gib = Text(128, 2048), 1 << 30
    free = run_memory(wide, rows, budget_bytes=64 * gib, device="cuda")
    assert free.prefetch and free.gpu_peak_bytes is not None
    assert 2 * layer < free.gpu_peak_bytes < 5 * layer
    tight = run_memory(wide, rows, budget_bytes=64 * gib, device="cuda", gpu_budget_bytes=8 * gib)
    assert not tight.prefetch and tight.gpu_peak_bytes is not None
    assert layer < tight.gpu_peak_bytes <= 8 * gib
    with pytest.raises(CapacityError, match=r"--gpu-memory 4\.00 GiB: one decoder layer"):
        run_memory(wide, rows, budget_bytes=64 * gib, device="cuda", gpu_budget_bytes=4 * gib)
    assert run_memory(wide, rows, budget_bytes=64 * gib).gpu_peak_bytes is None


def test_twice_the_text_takes_longer_and_no_text_needs_no_run(source: Survey, plan: Plan) -> None:
    none = durations(source, plan, Text(0, 512), SPEEDS)
    some = durations(source, plan, Text(64, 512), SPEEDS)
    more = durations(source, plan, Text(128, 512), SPEEDS)
    assert "running the text" not in none
    assert more["running the text"] == pytest.approx(2 * some["running the text"])
    assert some["reading"] > none["reading"]
    assert some["encoding"] == none["encoding"]


def test_weights_that_keep_their_codes_are_not_encoded(source: Survey) -> None:
    fp8 = make_plan(load_recipe("fp8"), source.config)
    assert durations(source, fp8, Text(0, 1), SPEEDS)["encoding"] == 0


def test_a_budget_without_room_for_a_layer_is_refused(source: Survey, plan: Plan) -> None:
    with pytest.raises(CapacityError, match="one decoder layer"):
        estimate(source, plan, Text(4, 64), memory_bytes=10 << 20)


def test_measuring_works_without_any_weights(source: Survey, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    alone = survey(tmp_path)
    speeds = measure(alone)
    assert not speeds.is_read_measured and speeds.read_bytes == 2e9
    assert measure(alone, read_bytes=5e8).read_bytes == 5e8
    assert min(speeds.hash_bytes, speeds.nvfp4, speeds.fp8, speeds.decode, speeds.flops) > 0
    text = format_estimate(alone, estimate(alone, make_plan(load_recipe("fp8"), alone.config),
                                           Text(4, 64), speeds=speeds))  # fmt: skip
    assert "known from the config alone" in text
    assert "2.000 GB/s (assumed)" in text


def test_a_gpu_that_is_not_here_is_said(source: Survey) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(CapacityError, match="no GPU here"):
        measure(source, device="cuda")


def test_the_command_says_everything_and_writes_nothing(
    source: Survey, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in source.directory.parent.rglob("*"))
    command = ["plan", str(source.directory), "--recipe", "medium-3.5", "--log-level", "error"]
    assert main([*command, "--gpu", "h200", "b200", "--tp", "1", "2", "--context", "512"]) == 0
    said = capsys.readouterr().out
    for word in ("output", "nvfp4", "disk", "host memory", "time", "2 x b200", "yes"):
        assert word in said
    assert main([*command, "--no-timing", "--json", "--requests", "3"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["seconds"] is None and value["basis"] == "the weights"
    assert {entry["requests"] for entry in value["hosting"]} == {3}
    assert main([*command, "--gpu", "abacus"]) == 2
    assert "there are" in capsys.readouterr().err
    assert sorted(path.name for path in source.directory.parent.rglob("*")) == before


@pytest.mark.parametrize("method", ["weighted", "gptq"])
def test_methods_that_weigh_errors_are_counted(source: Survey, method: str) -> None:
    recipe = load_recipe("medium-3.5")
    plans = {
        name: make_plan(replace(recipe, scales=METHODS[name]), source.config)
        for name in ("max", method)
    }
    text = Text(64, 512)
    found = {
        name: estimate(source, plan, text, memory_bytes=4 << 30, speeds=SPEEDS)
        for name, plan in plans.items()
    }
    fewer, seconds = found["max"].seconds, found[method].seconds
    assert fewer is not None and seconds is not None
    wanted = {"weighted": {"searching scales"}, "gptq": {"summing up inputs", "GPTQ"}}
    new = seconds.keys() - fewer.keys()
    assert new == wanted[method]
    assert min(seconds[part] for part in new) > 0
    more = found[method].memory.peak_bytes - found["max"].memory.peak_bytes
    assert (more > 0) == (method == "gptq")


def test_gptq_of_the_full_width_fits_in_twelve_gib() -> None:
    # Products of down's 28,672 inputs take 3.3 GB, and twice that while they are factored.
    text = replace(tiny_config(layers=88).text, width=12288, mlp_width=28672, num_heads=96)
    config = ModelConfig(replace(text, num_kv_heads=8, head_dim=128), None)
    plan = make_plan(replace(load_recipe("medium-3.5"), scales=METHODS["gptq"]), config)
    sums = sums_of(widths_of_products(plan, config))
    assert sums.held_bytes == 4 * (12288**2 + 28672**2)
    rows, gib = Text(128, 2048), 1 << 30
    made = run_memory(config.text, rows, sums=sums, budget_bytes=12 * gib)
    assert 10 * gib < made.peak_bytes <= 12 * gib and not made.prefetch
    with pytest.raises(CapacityError, match="one decoder layer"):
        run_memory(config.text, rows, sums=sums, budget_bytes=8 * gib)


def test_speeds_are_weights_by_seconds(source: Survey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that takes half as long is twice as fast, for each kind of it."""
    speeds = {}
    for seconds in (0.5, 0.25):
        monkeypatch.setattr(capacity, "_median_seconds", lambda _, __, s=seconds: s)
        speeds[seconds] = measure(source, read_bytes=1e9)
    for kind in ("hash_bytes", "nvfp4", "fp8", "decode", "compare", "flops"):
        assert getattr(speeds[0.25], kind) == 2 * getattr(speeds[0.5], kind), kind
    one = speeds[0.5]
    assert one.nvfp4 == one.fp8 == one.decode == one.compare


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"), (12, "12.0 s"), (99.9, "99.9 s"), (100, "1.7 min"), (3599, "60.0 min"),
        (3600, "1 h 00 min"), (12_000, "3 h 20 min"), (86_399, "23 h 59 min"),
    ],
)  # fmt: skip
def test_times_are_told_in_hours_minutes_or_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_middle_of_three_runs_after_one_to_warm_up_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 50.0, 60.0, 63.0, 70.0, 71.0, 80.0, 88.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert capacity._median_seconds(lambda: None, torch.device("cpu")) == 3.0
