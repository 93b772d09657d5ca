from pathlib import Path

import pytest

from halfbyte.bench import cpu_decode
from halfbyte.bench.cpu_decode import CpuMeasurement, Ours, cpu_figures, measure, write_record
from halfbyte.bench.idle import MachineUse
from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.errors import UnsupportedError
from halfbyte.figures import read_record
from halfbyte.model.tiny import write_tiny_checkpoint

MODEL = "halfbyte mixed"


@pytest.fixture
def report() -> CpuMeasurement:
    figures = {
        "prefill": 500.0, "decode": 60.0, "decode of 16": 150.0, "16 with prompts": 120.0
    }  # fmt: skip
    medians = {"transformers": {"prefill": 400.0, "decode": 20.0}, MODEL: figures}
    return CpuMeasurement(medians, {f"{MODEL}.decode": [59.0, 60.0, 61.0]}, MachineUse(0.01, 0.0))


def test_figures_compare_with_the_peer_of_the_same_run(report: CpuMeasurement) -> None:
    peers = [f for f in cpu_figures(report.tokens_per_s, MODEL) if f.topic == "peer"]
    ours = [f for f in cpu_figures(report.tokens_per_s, MODEL) if f.topic != "peer"]
    assert {figure.conditions["by"] for figure in peers} == {"transformers"}
    assert [figure.name for figure in ours] == [
        "prefill", "decode", "decode", "decode, prompts included"
    ]  # fmt: skip
    assert ours[0].against_text == "transformers bf16, 1 user: 400 tokens/s (1.25x)"
    # Many at once against one stream of the peer.
    assert ours[2].against_text.endswith("20 tokens/s (7.50x)")
    assert "7.50x" in report.table() and "1.0%" in report.table()


def test_record_keeps_every_sample_and_figures_of_a_card(
    report: CpuMeasurement, tmp_path: Path
) -> None:
    folder = tmp_path / MODEL.removeprefix("halfbyte ")
    write_tiny_checkpoint(folder, layers=1)
    write_record(report, tmp_path / "r.json", "halfbyte bench cpu", folder)
    record = read_record(tmp_path / "r.json")
    assert record.samples == {f"{MODEL}.decode, tokens/s": [59.0, 60.0, 61.0]}
    assert record.results["tokens_per_s"][MODEL]["decode"] == 60.0
    assert record.checkpoint == checkpoint_identity(folder)
    own = [(f.conditions["users"], f.value) for f in record.figures if f.topic != "peer"]
    assert own == [(1, 500.0), (1, 60.0), (16, 150.0), (16, 120.0)]


def test_busy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "wait_until_quiet", lambda _: MachineUse(0.5, 0.1))
    with pytest.raises(UnsupportedError, match="others use 50% and the host withholds 10%"):
        measure(Path("a"), Path("b"))


def test_engine_times_one_and_many(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "PROMPT_TOKENS", 40)
    ours = Ours(models / "fp8")
    timing = ours.answer((5,) * 40, 8)
    assert timing.prefill_s > 0 and timing.decode_s > 0
    steady, total = ours.answer_together([(5 + i,) * 40 for i in range(4)], 8)
    assert steady > 0 and total > 0
    stats = ours.engine.stats()
    assert stats.generated_tokens == 8 + 4 * 8
    assert stats.cached_tokens == 0
