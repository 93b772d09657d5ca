"""A run's folder goes on only with what it began with; the record names what was asked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UsageError
from halfbyte.evals.config import JudgeConfig, RunConfig, RunSampling
from halfbyte.evals.judging.compare import compare_runs
from halfbyte.evals.records import GradedAttempt, mark_session, read_run, record_row
from halfbyte.evals.running import evaluate as evaluate_module
from halfbyte.evals.running.endpoint import Endpoint
from halfbyte.evals.running.evaluate import (
    Prepared,
    _begin,
    _check_same_prompts,
    _identity,
    _not_measured,
    default_arm,
    evaluate,
)
from halfbyte.evals.sandbox import SandboxLimits
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options
from halfbyte.evals.tasks.data import Provenance
from halfbyte.evals.tasks.suite import BENCHMARKS
from halfbyte.evals.types import Sample
from halfbyte.json_lines import JsonLines

SERVED = Endpoint("http://x/v1", "m", 4096, {})
JUDGE = JudgeConfig("http://j/v1", "q")
CHECKPOINT = {"headers sha256": "h", "identity": "tensors:1"}


def config(folder: Path, *names: str, **more: Any) -> RunConfig:
    return RunConfig(folder / "run", "a", tuple(BENCHMARKS[n] for n in names), **more)


@pytest.mark.parametrize(
    "change, served, checkpoint, said",
    [
        ({"arm": "b"}, {}, {}, "arm: 'a' and 'b'"),
        ({}, {"model": "n"}, {}, "model: 'm' and 'n'"),
        ({"repeats": 3}, {}, {}, "repeats: None and 3"),
        ({"sampling": RunSampling(max_tokens=7)}, {}, {}, "max_tokens: 65536 and 7"),
        ({"seed_shift": 1}, {}, {}, "seed_shift: None and 1"),
        ({}, {}, {"headers sha256": "i"}, "the checkpoint's tensors"),
        ({}, {}, {"identity": "tensors:2"}, "the checkpoint's weights"),
        ({"judge": replace(JUDGE, revision="2")}, {}, {}, "judge revision: 'not stated' and '2'"),
    ],
)
def test_another_run_in_its_folder_is_refused_with_the_difference(
    tmp_path: Path,
    change: dict[str, Any],
    served: dict[str, Any],
    checkpoint: dict[str, str],
    said: str,
) -> None:
    first = config(tmp_path, "aa_lcr", judge=JUDGE)
    began = _begin(first, SERVED, CHECKPOINT, "c")
    again = _begin(first, SERVED, CHECKPOINT, "c")
    assert again.run_id == began.run_id == read_run(tmp_path / "run" / "run.json").run_id
    with pytest.raises(UsageError) as caught:
        _begin(
            replace(first, **change), replace(SERVED, **served), {**CHECKPOINT, **checkpoint}, "c"
        )
    assert f"holds a run with other settings ({said})" in str(caught.value)


def test_a_judge_and_a_sandbox_may_come_later_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sandbox_of(given: RunConfig) -> dict[str, Any] | None:
        has_code = any(b.kind == "code" for b in given.benchmarks)
        return {"limits": {"wall_s": given.code_limits.wall_s}} if has_code else None

    monkeypatch.setattr(evaluate_module, "_sandbox_of", sandbox_of)
    plain = config(tmp_path, "ifbench", judge=JUDGE)
    assert _begin(plain, SERVED, CHECKPOINT, "c").judge is None
    judged = _begin(config(tmp_path, "aa_lcr", judge=JUDGE), SERVED, CHECKPOINT, "c")
    assert judged.judge == JUDGE.public() and judged.sandbox is None
    code = config(tmp_path, "scicode", code_limits=SandboxLimits(wall_s=5))
    began = _begin(code, SERVED, CHECKPOINT, "c")
    assert began.sandbox == {"limits": {"wall_s": 5}}
    other = tmp_path / "other"
    kept = _begin(config(other, "aa_lcr", "scicode", judge=JUDGE), SERVED, CHECKPOINT, "c")
    later = _begin(config(other, "ifbench"), SERVED, CHECKPOINT, "c")
    assert kept.judge is not None and kept.sandbox is not None
    assert (later.judge, later.sandbox) == (kept.judge, kept.sandbox)
    slower = config(
        other, "scicode", code_limits=SandboxLimits(wall_s=kept.sandbox["limits"]["wall_s"] + 1)
    )
    with pytest.raises(UsageError, match="limits of generated code"):
        _begin(slower, SERVED, CHECKPOINT, "c")


def test_other_requests_in_a_folder_are_refused(tmp_path: Path) -> None:
    _check_same_prompts(tmp_path, "00")
    mark_session(tmp_path, "00")
    _check_same_prompts(tmp_path, "00")
    with pytest.raises(UsageError, match="the rendered requests differ"):
        _check_same_prompts(tmp_path, "01")


def test_the_record_says_how_many_of_the_items_there_are(tmp_path: Path) -> None:
    known = BENCHMARKS["aime2025"]

    def notes(count: int | None, note: str = "") -> list[str]:
        samples = [Sample(str(n), str(n), "s", "1", {}) for n in range(count or 0)]
        provenance = Provenance(source="x", revision="r", sha256={}, note=note)
        data = None if count is None else LoadedItems(tuple(samples), provenance)
        found = _identity(known, config(tmp_path, "aime2025"), data, "p", "h")
        assert (found["full_items"], found["max_tokens"]) == (30, 65_536)
        return list(found["notes"][len(known.notes) :])

    assert notes(None) == []
    assert notes(30) == []
    assert notes(29) == ["29 of 30 items"]
    assert notes(3, "made up") == ["made up", "3 of 30 items"]
    absent = _not_measured(known, config(tmp_path, "aime2025"), "no data")
    assert (absent.status, absent.reason, absent.score) == ("not measured", "no data", None)


def test_an_arm_is_named_by_its_folder_or_host(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    assert default_arm(str(tmp_path / "mixed")) == "mixed"
    assert default_arm("http://host:8000/v1") == "host:8000"


def test_what_was_to_be_asked_is_on_record_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two arms that ended early, both before the same benchmark, have not both passed it."""
    runner = pytest.importorskip("halfbyte.evals.running.run")
    names = ("quick", "aime2025", "ifbench")
    loaded = {"quick": BENCHMARKS["quick"].load(Options())}
    samples = tuple(Sample(str(n), str(n), "s", "1", {"problem": "?"}) for n in range(30))
    loaded["aime2025"] = LoadedItems(samples, Provenance(source="x", revision="r", sha256={}))
    prepared = Prepared(loaded, {"ifbench": "no file"})

    def run_benchmark(benchmark: Benchmark, *_: Any, **given: Any) -> list[GradedAttempt]:
        if benchmark.name == "aime2025":
            raise KeyboardInterrupt
        return [
            record(f"g-{sample.item_id}", sample.item_id, repeat)
            for sample in loaded["quick"].samples
            for repeat in range(given["repeats"])
        ]

    def record(group: str, item: str, repeat: int) -> GradedAttempt:
        return GradedAttempt(
            "r", "a", "quick", "p", "h", item, group, "s", repeat, 1, f"text {repeat}", "", "stop",
            5, 7, 0, 0.5, "A", "A", 1.0, "ok", {}, None, 0,
        )  # fmt: skip

    monkeypatch.setattr(runner, "run_benchmark", run_benchmark)
    arms = []
    for arm in "bc":
        asked = replace(config(tmp_path, *names, repeats=8), out=tmp_path / arm, arm=arm)
        with pytest.raises(KeyboardInterrupt):
            evaluate(asked, SERVED, CHECKPOINT, "c", prepared)
        journal = JsonLines(asked.out / "quick" / "samples.jsonl")
        for row in run_benchmark(BENCHMARKS["quick"], repeats=8):
            journal.append(record_row(row))
        journal.close()
        arms.append(asked.out)
    run = read_run(arms[0])
    assert {name: one.status for name, one in run.benchmarks.items()} == {
        "quick": "complete",
        "aime2025": "incomplete",
    }
    left = run.benchmarks["aime2025"]
    assert (left.items, left.repeats, left.score, left.causes) == (30, 8, None, {})
    comparison = compare_runs(arms[0], arms[1])
    assert comparison.benchmarks["quick"].verdict == "GO"
    assert "the run ended before it did" in comparison.left_out["aime2025"]
    assert (comparison.verdict, comparison.reason) == ("INCONCLUSIVE", "blocked")
    # A run that goes on keeps what is done.
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(asked, benchmarks=asked.benchmarks[1:]), SERVED, CHECKPOINT, "c", prepared)
    assert read_run(arms[1]).benchmarks["quick"].status == "complete"
