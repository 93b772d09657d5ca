"""`halfbyte plan`: sizes are exact, times come from measuring, and nothing is written."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte.cli.main import main
from halfbyte.config import ModelConfig
from halfbyte.errors import CapacityError
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize import capacity, rehearsal
from halfbyte.quantize.capacity import (
    CalibrationText,
    Speeds,
    Time,
    disk_bytes,
    duration_of,
    estimate_run,
    measure_speeds,
    output_bytes,
    run_memory,
)
from halfbyte.quantize.hosting import GPUS
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.layer import widths_of_products
from halfbyte.quantize.memory import sums_of
from halfbyte.quantize.pipeline import QuantizeResult, quantize
from halfbyte.quantize.plan_text import duration, format_estimate, shared_out
from halfbyte.quantize.record import LayerFacts
from halfbyte.quantize.rehearsal import Rehearsal, kinds_of, rehearse
from halfbyte.quantize.scales import METHODS
from halfbyte.quantize.survey import Survey, survey
from halfbyte.recipe.plan import Plan, make_plan
from halfbyte.recipe.schema import load_recipe

SPEEDS = Speeds(
    device="cpu",
    read_bytes=1e9,
    is_read_measured=True,
    hash_bytes=1e9,
    wide_flops=5e10,
    gptq=1e7,
    rehearsal=Rehearsal((3.0, 1.0, 2.0), {"fp8": (0.5,), "nvfp4": (0.6,)}, (0.1,)),
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
    assert disk_bytes(plan, source.config, CalibrationText(0, 512)) == output
    width = source.config.text.width
    assert (
        disk_bytes(plan, source.config, CalibrationText(10, 512))
        == output + 2 * 10 * 512 * width * 2
    )


def test_a_full_width_layer_fits_the_gpus_it_is_said_to_fit() -> None:
    text = replace(tiny_config(layers=88).text, width=12288, mlp_width=28672, num_heads=96)
    wide = replace(text, num_kv_heads=8, head_dim=128)
    layer = 2 * (2 * 12288 * 12288 + 2 * 1024 * 12288 + 3 * 12288 * 28672)
    rows, gib = CalibrationText(128, 2048), 1 << 30
    free = run_memory(wide, rows, budget_bytes=64 * gib, device="cuda")
    assert free.prefetch and free.gpu_peak_bytes is not None
    assert 2 * layer < free.gpu_peak_bytes < 5 * layer
    tight = run_memory(wide, rows, budget_bytes=64 * gib, device="cuda", gpu_budget_bytes=8 * gib)
    assert not tight.prefetch and tight.gpu_peak_bytes is not None
    assert layer < tight.gpu_peak_bytes <= 8 * gib
    with pytest.raises(CapacityError, match=r"--gpu-memory 4\.00 GiB: one decoder layer"):
        run_memory(wide, rows, budget_bytes=64 * gib, device="cuda", gpu_budget_bytes=4 * gib)
    assert run_memory(wide, rows, budget_bytes=64 * gib).gpu_peak_bytes is None


def test_parts_add_up_and_the_range_holds_the_time(source: Survey, plan: Plan) -> None:
    for text in (CalibrationText(0, 0), CalibrationText(64, 512)):
        time_ = duration_of(source, plan, text, SPEEDS, starting_s=2.0)
        assert sum(time_.parts.values()) == pytest.approx(time_.likely)
        assert time_.least <= time_.likely / 1.25 and time_.most >= time_.likely * 1.25
        assert time_.parts["starting"] == 2.0
        assert ("running the text" in time_.parts) == bool(text.rows)
    layers = source.config.text.num_layers
    assert time_.parts["running the text"] == 2.0 * layers
    assert time_.least < time_.likely - layers * 0.9 and time_.most > time_.likely + layers * 0.9


def test_a_slow_disk_is_waited_for_and_a_fast_one_is_not(source: Survey, plan: Plan) -> None:
    slow, fast = (
        duration_of(source, plan, CalibrationText(64, 512), replace(SPEEDS, read_bytes=speed))
        for speed in (1e5, 1e12)
    )
    layers = source.config.text.num_layers
    assert fast.parts["waiting for the disk"] == pytest.approx(0.1 * layers)
    assert slow.likely > 2 * source.num_bytes / 1e5


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=7),
)
def test_printed_parts_add_up_to_the_printed_time(parts: list[float]) -> None:
    total = sum(parts)
    time_ = Time(total, total, total, {f"part {n}": value for n, value in enumerate(parts)})
    printed = [_seconds(text) for text in shared_out(time_).values()]
    assert sum(printed) == pytest.approx(_seconds(duration(total)), abs=1e-6)


def _seconds(text: str) -> float:
    words = text.split()
    units = {"h": 3600.0, "min": 60.0, "s": 1.0}
    return sum(float(n) * units[u] for n, u in zip(words[::2], words[1::2], strict=True))


def test_a_budget_without_room_for_a_layer_is_refused(source: Survey, plan: Plan) -> None:
    with pytest.raises(CapacityError, match="one decoder layer"):
        estimate_run(source, plan, CalibrationText(4, 64), memory_bytes=10 << 20)


def test_measuring_works_without_any_weights(source: Survey, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    alone, text = survey(tmp_path), CalibrationText(4, 64)
    speeds = measure_speeds(alone, plan, text)
    assert not speeds.is_read_measured and speeds.read_bytes == 2e9
    assert measure_speeds(alone, plan, CalibrationText(0, 0), read_bytes=5e8).read_bytes == 5e8
    assert min(speeds.hash_bytes, speeds.wide_flops, speeds.gptq, *speeds.rehearsal.running) > 0
    said = format_estimate(alone, estimate_run(alone, plan, text, speeds=speeds))
    assert "known from the config alone" in said
    assert "disk of 2 GB/s (assumed)" in said


def test_every_kind_of_layer_is_rehearsed(source: Survey, plan: Plan) -> None:
    done = rehearse(source, plan, num_tokens=0, longest_row=0)
    assert set(done.encoding) == set(kinds_of(plan, source.config.text.num_layers))
    assert done.running == () and min(min(times) for times in done.encoding.values()) > 0


@pytest.mark.parametrize("wide", [False, True])
def test_ten_times_the_text_runs_about_ten_times_as_long(
    source: Survey, plan: Plan, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rehearsed, with time standing still: what is scaled, not what a machine does."""
    monkeypatch.setattr(rehearsal, "_loading_s", lambda *_: 0.0)
    monkeypatch.setattr(rehearsal, "_MOST_WEIGHTS", 10**9 if wide else 50_000)
    monkeypatch.setattr(rehearsal, "quantize", _quantize_of_one_second)
    some, more = (
        rehearse(source, plan, num_tokens=tokens, longest_row=64) for tokens in (1000, 10_000)
    )
    assert more.running[0] == pytest.approx(10 * some.running[0])
    assert more.encoding == some.encoding


def _quantize_of_one_second(config: QuantizeConfig) -> QuantizeResult:
    """The real run, its clock replaced."""
    result = quantize(config)
    layers: list[LayerFacts] = [
        {**layer, "seconds": {"calibrating": 1.0, "encoding": 1.0, "syncing": 1.0}}
        for layer in result.record["layers"]
    ]
    return replace(result, record={**result.record, "layers": layers})


def test_a_gpu_that_is_not_here_is_said(source: Survey, plan: Plan) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(CapacityError, match=r"no GPU here.*--gpu"):
        measure_speeds(source, plan, CalibrationText(0, 0), device="cuda")


def test_the_command_says_everything_and_writes_nothing(
    source: Survey, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(path.name for path in source.directory.parent.rglob("*"))
    command = ["plan", str(source.directory), "--recipe", "medium-3.5", "--log-level", "error"]
    tokens = tmp_path / "tokens.safetensors"
    save_file({"batch0.input_ids": torch.arange(3 * 40).view(3, 40)}, tokens)
    drawn = [*command, "--calibration-tokens", str(tokens)]
    where = ["--gpu", "h200", "b200", "--tp", "1", "2", "--context", "512"]
    assert main([*drawn, *where, "--price-per-hour", "4.5"]) == 0
    said = capsys.readouterr().out
    for word in ("output", "nvfp4", "disk", "host memory", "time", "2 x b200", "yes", "cost"):
        assert word in said
    assert "3 rows, the longest of 40, 120 tokens" in said and "9.00" in said
    assert main([*command, "--no-timing", "--json", "--requests", "3"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["time"] is None and value["source"]["basis"] == "the weights"
    assert {entry["requests"] for entry in value["hosting"]} == {3}
    assert value["disk_free"] > value["disk"] and value["text"]["not_drawn"]
    assert {entry["gpu"] for entry in value["quantizing"]} == set(GPUS)
    assert main([*drawn, "--json", "--gpu", "h100", "--price-per-hour", "2"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["time"]["likely"] == pytest.approx(sum(value["time"]["parts"].values()))
    assert value["price_per_hour"] == 2 and value["hosting"][0]["speed_basis"] == "computed"
    assert main([*command, "--gpu", "abacus"]) == 2
    assert "there are" in capsys.readouterr().err
    assert sorted(path.name for path in source.directory.parent.rglob("*")) == before


def test_gptq_is_counted(source: Survey) -> None:
    recipe = load_recipe("medium-3.5")
    plans = {
        name: make_plan(replace(recipe, scales=METHODS[name]), source.config)
        for name in ("max", "gptq")
    }
    text = CalibrationText(64, 512)
    found = {
        name: estimate_run(source, plan, text, memory_bytes=4 << 30, speeds=SPEEDS)
        for name, plan in plans.items()
    }
    fewer, more = found["max"].time, found["gptq"].time
    assert fewer is not None and more is not None
    new = more.parts.keys() - fewer.parts.keys()
    assert new == {"summing up inputs", "GPTQ"}
    assert min(more.parts[part] for part in new) > 0
    assert found["gptq"].memory.peak_bytes > found["max"].memory.peak_bytes


def test_every_sweep_of_gptq_costs_the_same(source: Survey) -> None:
    recipe = load_recipe("medium-3.5")
    seconds = []
    for sweeps in range(5):
        scales = METHODS["gptq"]
        scales = replace(scales, gptq=replace(scales.gptq, sweeps=sweeps))
        plan = make_plan(replace(recipe, scales=scales), source.config)
        seconds.append(capacity._weighing(source, plan, CalibrationText(64, 512), SPEEDS)["GPTQ"])
    # The first one factors once more.
    steps = [b - a for a, b in pairwise(seconds)]
    assert steps[0] > steps[1] > 0
    assert steps[1:] == pytest.approx([steps[1]] * 3)


def test_gptq_of_the_full_width_fits_in_twelve_gib() -> None:
    # Products of down's 28,672 inputs take 3.3 GB, and twice that while they are factored.
    text = replace(tiny_config(layers=88).text, width=12288, mlp_width=28672, num_heads=96)
    config = ModelConfig(replace(text, num_kv_heads=8, head_dim=128), None)
    plan = make_plan(replace(load_recipe("medium-3.5"), scales=METHODS["gptq"]), config)
    sums = sums_of(widths_of_products(plan, config))
    assert sums.held_bytes == 4 * (12288**2 + 28672**2)
    rows, gib = CalibrationText(128, 2048), 1 << 30
    made = run_memory(config.text, rows, sums=sums, budget_bytes=12 * gib)
    assert 10 * gib < made.peak_bytes <= 12 * gib and not made.prefetch
    with pytest.raises(CapacityError, match="one decoder layer"):
        run_memory(config.text, rows, sums=sums, budget_bytes=8 * gib)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.04, "0.0 s"), (0.43, "0.4 s"), (4.26, "4.3 s"), (12, "12 s"), (99, "99 s"),
        (101, "1.7 min"), (3599, "60 min"), (3600, "1 h 00 min"), (12_345, "3 h 30 min"),
        (86_399, "24 h"), (600_000, "170 h"),
    ],
)  # fmt: skip
def test_times_are_told_with_two_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_middle_of_five_runs_after_one_to_warm_up_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lasted = [50.0, 3.0, 1.0, 8.0, 2.0, 4.0]
    clock = iter([at for n, seconds in enumerate(lasted) for at in (100.0 * n, 100 * n + seconds)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert capacity._median_seconds(lambda: None, torch.device("cpu")) == 3.0


def test_a_busy_machine_and_a_full_disk_are_said(source: Survey, plan: Plan) -> None:
    made = estimate_run(source, plan, CalibrationText(4, 64, 200), speeds=SPEEDS)
    made = replace(made, busy=0.43)
    said = format_estimate(source, made)
    assert "BUSY: other programs took 43 % of its processors" in said and "NOT ENOUGH" not in said
    said = format_estimate(source, replace(made, busy=0.01, disk_free=made.disk - 1))
    assert "BUSY" not in said and "NOT ENOUGH" in said


@pytest.mark.slow
def test_a_plan_is_within_half_as_much_again_of_the_run(tmp_path: Path) -> None:
    """Nine of ten at a steady load; here the middle of three, on a machine of any load."""
    config = ModelConfig(
        replace(tiny_config(layers=6).text, width=512, mlp_width=1536, num_heads=8), None
    )
    write_tiny_checkpoint(tmp_path / "fp8", dialect="mistral-fp8", config=config)
    found = survey(tmp_path / "fp8")
    plan = make_plan(load_recipe("medium-3.5"), found.config)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"batch0.input_ids": torch.arange(8 * 256).view(8, 256) % 500}, tokens)
    ratios = []
    for number in range(3):
        text = CalibrationText(8, 256, 8 * 256)
        likely = duration_of(found, plan, text, measure_speeds(found, plan, text)).likely
        result = quantize(
            QuantizeConfig(
                source=tmp_path / "fp8",
                output=tmp_path / f"mixed{number}",
                recipe=load_recipe("medium-3.5"),
                calibration_tokens=tokens,
                with_errors=False,
            )
        )
        ratios.append(likely / result.seconds)
    assert 1 / 2 < sorted(ratios)[1] < 2


def test_the_text_of_a_run_is_told(source: Survey, plan: Plan) -> None:
    with_text = format_estimate(
        source, estimate_run(source, plan, CalibrationText(4, 64), speeds=SPEEDS)
    )
    assert "4 rows of up to 64, 256 tokens at most" in with_text
    without = format_estimate(
        source, estimate_run(source, plan, CalibrationText(0, 0), speeds=SPEEDS)
    )
    assert "none: data-free" in without
