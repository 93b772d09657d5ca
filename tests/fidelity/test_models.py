import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.chat.tokens import load_chat
from halfbyte.cli.main import main
from halfbyte.engine.core import Engine
from halfbyte.engine.generate import generate
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.fidelity.baseline import load_baseline, save_baseline
from halfbyte.fidelity.choices import EncodedItem, count_flips, encode_choices
from halfbyte.fidelity.models import (
    Candidate,
    compare_models,
    compare_with_baseline,
    full_divergence,
    interval_of_mean,
    make_baseline,
    window_logprobs,
)
from halfbyte.fidelity.windows import cut_windows

WINDOW = 64


def candidates(models: Path) -> list[Candidate]:
    return [
        ("same", models / "bf16", "weight_only"),
        ("fp8", models / "fp8", "weight_only"),
        ("fp8d", models / "fp8", "declared"),
    ]


def test_same_model_is_equal_and_worse_formats_are_worse(models: Path) -> None:
    text = models / "text.txt"
    found = compare_models(models / "bf16", candidates(models), text, window_tokens=WINDOW)
    same, fp8, declared = found.candidates
    assert (same.kl_mean, same.kl_max, same.top1_agreement) == (0.0, 0.0, 1.0)
    assert same.perplexity == found.base.perplexity
    assert fp8.kl_mean is not None and fp8.kl_p99 is not None and fp8.kl_max is not None
    assert declared.kl_mean is not None
    assert 0 < fp8.kl_mean < declared.kl_mean
    assert fp8.kl_mean < fp8.kl_p99 <= fp8.kl_max
    assert fp8.kl_interval is not None
    assert fp8.kl_interval.low < fp8.kl_mean < fp8.kl_interval.high
    assert fp8.top1_agreement is not None and 0 < fp8.top1_agreement < 1
    assert fp8.bytes == (models / "fp8" / "model.safetensors").stat().st_size
    assert fp8.bytes < same.bytes
    # The last window is shorter.
    assert found.num_windows == 15
    assert 14 * (WINDOW - 1) + WINDOW // 2 <= found.num_tokens < 15 * (WINDOW - 1)


def test_perplexity_is_that_of_the_prompts_logprobs(models: Path) -> None:
    """The same figure through requests instead of teacher forcing."""
    text = models / "text.txt"
    found = compare_models(models / "bf16", [], text, window_tokens=WINDOW)
    engine = Engine.load(models / "bf16")
    windows = cut_windows(models / "bf16", text.read_text(), WINDOW, None)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found_too = generate(
        engine, (GenerationRequest(str(i), window, params) for i, window in enumerate(windows))
    )
    total = sum(one.logprob for item in found_too.values() for one in item.prompt_logprobs or ())
    assert found.base.perplexity == pytest.approx(math.exp(-total / found.num_tokens), rel=1e-3)


def test_stored_baseline_tells_the_same_within_its_error(models: Path) -> None:
    text = models / "text.txt"
    fp8: Candidate = ("fp8", models / "fp8", "weight_only")
    full = compare_models(models / "bf16", [fp8], text, window_tokens=WINDOW).candidates[0]
    baseline = make_baseline(models / "bf16", text, window_tokens=WINDOW)
    found = compare_with_baseline(baseline, fp8)
    row = found.candidates[0]
    assert row.kl_mean is not None and full.kl_mean is not None
    assert row.kl_tail_error is not None and row.kl_lower_mean is not None
    # Four standard errors of the tail, and the f16 of log-probs (2**-12 of at most log(512)).
    assert abs(row.kl_mean - full.kl_mean) <= 4 * row.kl_tail_error + 6.3 * 2**-12
    assert row.kl_lower_mean <= full.kl_mean + 6.3 * 2**-12
    assert row.perplexity == pytest.approx(full.perplexity, rel=1e-9)
    assert row.top1_agreement == pytest.approx(full.top1_agreement, abs=0.01)
    assert "compact baseline" in found.table()


def test_place_and_doubt_are_told_apart(models: Path) -> None:
    found = compare_models(
        models / "bf16", candidates(models), models / "text.txt", window_tokens=WINDOW
    )
    fp8 = found.candidates[1]
    assert fp8.kl_median is not None and fp8.kl_mean is not None
    assert 0 <= fp8.kl_median < fp8.kl_mean
    # Windows of 64 tokens fill the first place only.
    assert fp8.kl_by_position is not None
    assert dict(fp8.kl_by_position) == pytest.approx({"0-1k": fp8.kl_mean})
    # A random model is never sure.
    assert fp8.top1_agreement_unsure == pytest.approx(fp8.top1_agreement)


def test_answers_of_a_stored_baseline_flip_like_those_of_the_model(
    models: Path, tmp_path: Path
) -> None:
    text, fp8 = models / "text.txt", ("fp8d", models / "fp8", "declared")
    choices = encode_choices(models / "bf16", "quick", None, None)
    assert len(choices) == 20
    prompts = {choice.token_ids for choice in choices}
    assert len(prompts) == 20 and all(len(c.letter_ids) == 4 for c in choices)
    options: dict[str, Any] = {"window_tokens": WINDOW, "max_tokens": 100, "choices": choices}
    same: Candidate = ("same", models / "bf16", "weight_only")
    full = compare_models(models / "bf16", [same, fp8], text, **options)  # type: ignore[list-item]
    unchanged, changed = (row.flips for row in full.candidates)
    assert unchanged is not None and changed is not None
    assert (unchanged.changed, unchanged.items) == (0, 20)
    assert changed.right - changed.base_right == changed.won - changed.lost
    assert f"{changed.changed} of 20 answers differ" in full.table()
    save_baseline(tmp_path / "b", make_baseline(models / "bf16", text, **options))
    kept = load_baseline(tmp_path / "b")
    assert kept.choices == choices
    (row,) = compare_with_baseline(kept, fp8).candidates  # type: ignore[arg-type]
    assert row.flips == changed


def test_flips_count_right_answers_lost_and_won_and_others() -> None:
    items = [EncodedItem((1,), (2, 3, 4), 0)] * 5
    flips = count_flips(items, (0, 0, 1, 1, 1), (0, 1, 0, 2, 1))
    assert (flips.lost, flips.won, flips.changed_wrong) == (1, 1, 1)
    assert (flips.base_right, flips.right, flips.changed) == (2, 2, 3)


def test_sets_without_options_have_no_choices(models: Path) -> None:
    with pytest.raises(UsageError, match="there are quick, mmlu_pro"):
        encode_choices(models / "bf16", "ifbench", None, None)


def test_windows_open_with_bos_and_leave_out_a_short_end(models: Path) -> None:
    text = (models / "text.txt").read_text()
    vocabulary = load_chat(models / "bf16").vocabulary
    windows = cut_windows(models / "bf16", text, WINDOW, 3 * WINDOW + 10)
    assert [len(window) for window in windows] == [WINDOW] * 3
    if vocabulary.bos_token_id is not None:
        assert {window[0] for window in windows} == {vocabulary.bos_token_id}
    joined = [token for window in windows for token in window]
    if vocabulary.bos_token_id is None:
        assert joined == list(vocabulary.encode_text(text))[: 3 * WINDOW]


def test_short_text_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two words")
    with pytest.raises(UsageError, match="needs at least half"):
        compare_models(models / "bf16", [], tmp_path / "short.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        compare_models(models / "bf16", [], tmp_path / "bytes.txt")


@pytest.mark.parametrize("count", [3, 4, 6, 24])
def test_interval_covers_the_mean_of_clustered_positions(count: int) -> None:
    """Windows with means of their own: an interval over positions alone would be far too short."""
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(600):
        means = 1.0 + 0.3 * generator.standard_normal(count)
        windows = [mean + generator.standard_normal(50) for mean in means]
        interval = interval_of_mean(windows, range(count))
        assert interval is not None
        covered += interval.low <= 1.0 <= interval.high
    # One standard error of 600 trials is 0.9 points; a bootstrap covers 74 % with three windows.
    assert 0.92 <= covered / 600 <= 0.98


def test_interval_of_a_small_case() -> None:
    """Three windows of four, two and two positions: t with two degrees of freedom."""
    windows = [np.full(4, 1.0), np.full(2, 2.0), np.full(2, 4.0)]
    interval = interval_of_mean(windows, [0, 1, 2])
    assert interval is not None
    error = math.sqrt(3 / 2 * (4.0**2 + 0.0 + 4.0**2)) / 8  # sums of rests: -4, 0, 4
    assert interval == pytest.approx((2 - 4.302653 * error, 2 + 4.302653 * error))
    # Windows of one unit count once: copies of a window make nothing narrower.
    twice = interval_of_mean([w for w in windows for _ in range(2)], [0, 0, 1, 1, 2, 2])
    assert twice == pytest.approx(interval)


@pytest.mark.parametrize("units", [[0], [0, 1], [0, 0, 0, 1, 1]])
def test_fewer_than_three_units_have_no_interval(units: list[int]) -> None:
    windows = [np.arange(5.0, dtype=np.float64) for _ in units]
    assert interval_of_mean(windows, units) is None


def test_divergence_is_from_the_base_to_the_candidate() -> None:
    base, other = (torch.tensor([p]).log() for p in ([0.9, 0.1], [0.5, 0.5]))
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert float(full_divergence(base, other).kl) == pytest.approx(expected)
    assert float(full_divergence(other, base).kl) != pytest.approx(expected, rel=0.1)


def test_two_candidates_are_told_apart_on_the_same_tokens(models: Path) -> None:
    found = compare_models(
        models / "bf16", candidates(models), models / "text.txt", window_tokens=WINDOW
    )
    same, fp8, declared = found.candidates
    assert [(pair.first, pair.second) for pair in found.pairs] == [
        ("same", "fp8"), ("same", "fp8d (declared)"), ("fp8", "fp8d (declared)"),
    ]  # fmt: skip
    pair = found.pairs[2]
    assert declared.kl_mean is not None and fp8.kl_mean is not None
    assert pair.kl_difference == pytest.approx(declared.kl_mean - fp8.kl_mean)
    assert pair.kl_interval is not None and pair.kl_interval.low > 0
    assert fp8.kl_interval is not None
    width = pair.kl_interval.high - pair.kl_interval.low
    assert width < fp8.kl_interval.high - fp8.kl_interval.low + declared.kl_mean
    assert same.log_perplexity_change == 0.0
    assert fp8.log_perplexity_change == pytest.approx(
        math.log(fp8.perplexity / found.base.perplexity)
    )
    assert pair.log_perplexity_difference == pytest.approx(
        math.log(declared.perplexity / fp8.perplexity)
    )
    for row in found.rows:
        assert row.perplexity_interval is not None
        assert row.perplexity_interval.low < row.perplexity < row.perplexity_interval.high
    text = found.table()
    assert "KL of fp8d (declared) minus fp8: +" in text and "along this text only" in text


def test_three_texts_give_intervals_across_texts(models: Path, tmp_path: Path) -> None:
    whole = (models / "text.txt").read_text()
    third = len(whole) // 3
    texts = []
    for index in range(3):
        texts.append(tmp_path / f"{index}.txt")
        texts[-1].write_text(whole[index * third : (index + 1) * third])
    fp8: Candidate = ("fp8", models / "fp8", "weight_only")
    found = compare_models(models / "bf16", [fp8], texts, window_tokens=WINDOW)
    assert found.num_texts == 3 and "across 3 texts" in found.table()
    two = compare_models(models / "bf16", [fp8], texts[:2], window_tokens=WINDOW)
    assert "along these texts only" in two.table()
    # A stored baseline remembers which window is of which text.
    save_baseline(tmp_path / "b", make_baseline(models / "bf16", texts, window_tokens=WINDOW))
    kept = load_baseline(tmp_path / "b")
    assert len(set(kept.origins)) == 3
    stored = compare_with_baseline(kept, fp8)
    assert stored.num_texts == 3
    one, other = found.base.perplexity_interval, stored.base.perplexity_interval
    assert one is not None and other is not None and other == pytest.approx(one, rel=1e-6)
    (row,), (full,) = stored.candidates, found.candidates
    assert row.log_perplexity_change_interval == pytest.approx(
        full.log_perplexity_change_interval, abs=1e-6
    )


def test_commands(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, fp8 = str(models / "bf16"), str(models / "fp8")
    text = ["--text", str(models / "text.txt"), "--window-tokens", str(WINDOW), "--tokens", "200"]
    kept, figures = tmp_path / "b.safetensors", tmp_path / "figures.json"
    more = ["--choices", "quick", "--limit", "8", "--json", str(figures)]
    assert main(["compare", base, fp8, *text, *more]) == 0
    shown = capsys.readouterr().out
    assert "top-1 same" in shown and "answers differ from bf16" in shown
    full = json.loads(figures.read_text())
    assert full["method"] == "full" and full["num_windows"] == 3
    assert main(["compare", base, *text, "--save-baseline", str(kept)]) == 0
    assert len(load_baseline(kept).windows) == 3
    arguments = ["--baseline", str(kept), "--json", str(figures), "--mode", "declared"]
    assert main(["compare", fp8, *arguments]) == 0
    found = json.loads(figures.read_text())
    assert found["method"] == "compact"
    assert found["candidates"][0]["mode"] == "declared"
    assert found["base"]["perplexity"] == pytest.approx(full["base"]["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "--text FILE"),
        (["a", "--text", "t"], "BASE CANDIDATE"),
        (["a", "b", "--baseline", "f"], "name the candidate alone"),
        (["a", "--baseline", "f", "--text", "t"], "leave out --text"),
        (["a", "--baseline", "f", "--save-baseline", "g"], "exclude each other"),
        (["a", "b", "--text", "t", "--window-tokens", "1"], "at least 2"),
        (["a", "b", "--text", "t", "--tokens", "0"], "--tokens 0 must be at least 1"),
    ],
)
def test_contradictory_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_baseline_of_another_vocabulary_is_refused(models: Path) -> None:
    baseline = make_baseline(models / "bf16", models / "text.txt", window_tokens=WINDOW)
    wrong = type(baseline)(
        "x", "weight_only", 1, 99, "0", baseline.windows[:1], baseline.of_window(0)
    )
    with pytest.raises(CheckpointError, match="a vocabulary of 512; the base has 99"):
        compare_with_baseline(wrong, ("fp8", models / "fp8", "weight_only"))


def test_reported_divergence_weighs_by_the_base(models: Path, tmp_path: Path) -> None:
    """The figure is that of the definition, which is another the other way round."""
    text = tmp_path / "text.txt"
    text.write_text((models / "text.txt").read_text()[:600])
    names = ("bf16", "fp8")
    windows = cut_windows(models / "bf16", text.read_text(), WINDOW, None)
    base, other = (
        torch.cat([window_logprobs(engine, window) for window in windows]).double()
        for engine in (Engine.load(models / name) for name in names)
    )

    def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum(-1).mean())

    fp8: Candidate = ("fp8", models / "fp8", "weight_only")
    row = compare_models(models / "bf16", [fp8], text, window_tokens=WINDOW).candidates[0]
    forth, back = divergence(base, other), divergence(other, base)
    assert row.kl_mean == pytest.approx(forth, rel=1e-4)
    assert row.kl_mean is not None and abs(forth - back) > 10 * abs(forth - row.kl_mean)
