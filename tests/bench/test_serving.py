"""The serving benchmark in small: figures are figures, and a wrong one would show."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from halfbyte.bench.idle import MachineUse
from halfbyte.bench.record import percentile
from halfbyte.bench.serving import ServingMeasurement, ServingSizes, measure, write_record
from halfbyte.errors import UnsupportedError
from halfbyte.figures import read_record
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

DATA = Path(__file__).parent.parent / "data" / "chat"
NAMES = (
    "model step, ms", "engine step, ms", "served step, ms", "first token uncached, ms",
    "first token cached, ms", "gap alone, ms", "gap beside a prompt, ms",
    "prompt beside a stream, s",
)  # fmt: skip


def test_figures_follow_from_samples(tmp_path: Path) -> None:
    values = ([10.0], [11.0], [12.0], [500.0], [20.0], [1.0] * 99 + [2.0], [3.0, 1.0], [60.0])
    report = ServingMeasurement(dict(zip(NAMES, values, strict=True)), MachineUse(0.01, 0.0))
    found = report.figures()
    assert found["overhead_share"] == pytest.approx(0.2)
    assert found["cached_share"] == pytest.approx(0.04)
    assert found["gap_ratio"] == pytest.approx(3.0)
    assert (found["gaps_over_the_bar"], found["gaps_beside_a_prompt"]) == (1, 2)
    assert (found["usual_gaps_over_the_bar"], found["usual_gaps"]) == (1, 100)
    write_record(report, tmp_path / "serving.json", "halfbyte bench serve DIR", tmp_path)
    record = read_record(tmp_path / "serving.json")
    assert record.samples["gap beside a prompt, ms"] == [3.0, 1.0]
    assert [(figure.value_text, figure.against_text) for figure in record.figures] == [
        ("20 %", "at most 15 %"),
        ("20 ms", "not cached: 500 ms (0.04x); at most 50 ms"),
        ("3 ms", "alone: 1 ms (3.00x); at most 2 ms"),
        ("3 ms", "alone, 99th percentile: 1 ms (3.00x); at most 2 ms"),
        ("50 %", "alone: 1 % (50.00x)"),
    ]
    assert "20.0% over the model" in report.table()


def test_percentile() -> None:
    assert percentile(list(range(101)), 0.99) == 99
    assert percentile([5.0], 0.99) == 5.0


def test_every_question_is_answered_on_a_small_model(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    config = tiny_config(layers=1)
    text = dataclasses.replace(config.text, vocab_size=448)
    write_tiny_checkpoint(tmp_path / "tiny", config=dataclasses.replace(config, text=text))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "chatml" / name, tmp_path / "tiny")
    sizes = ServingSizes(
        streams=2, stream_tokens=24, cached_tokens=120, stall_tokens=500, stall_layers=1,
        usual_tokens=25, repeats=1,
    )  # fmt: skip
    report = measure(tmp_path / "tiny", tmp_path, sizes=sizes, force=True)
    assert set(report.samples) == set(NAMES)
    assert len(report.samples["gap alone, ms"]) >= 20
    figures = report.figures()
    for name in ("gaps_over_the_bar", "usual_gaps_over_the_bar"):
        assert figures.pop(name) >= 0
    # Of so small a step chance may leave less than nothing.
    assert figures.pop("overhead_share") > -1
    assert all(value > 0 for value in figures.values() if value is not None)


def test_busy_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.bench.serving.wait_until_quiet", lambda s: MachineUse(0.5, 0.0))
    with pytest.raises(UnsupportedError, match="busy"):
        measure(tmp_path, tmp_path)
