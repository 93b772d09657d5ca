"""How close one checkpoint comes to another: perplexity, KL divergence, agreement, answer flips.

Both models are teacher-forced through the engine's own path (paged cache in the checkpoint's
format) over windows of the text, each starting afresh. The first token of a window has no
distribution and is not counted. With both models in memory divergences are over the full
vocabulary; with a stored baseline they are estimates whose error is stated (`baseline`).

Shapes: N positions of a window, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.bench.baseline import (
    Baseline,
    Compact,
    Divergence,
    compact,
    concatenate,
    divergence,
)
from halfbyte.bench.choices import Choice, Flips, answer, count_flips, longest
from halfbyte.chat.tokens import load_chat
from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.files import read_bounded
from halfbyte.model.linear import Mode

WINDOW_TOKENS = 512
_BOOTSTRAP_DRAWS = 2000
_SURE = 0.9
_PLACES = {"0-1k": (0, 1024), "1k-8k": (1024, 8192), "8k-32k": (8192, 32_768),
           "32k+": (32_768, None)}  # fmt: skip
_SEED = 0


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One model of a comparison. What compares it with the base is None for the base itself.

    bytes            of its safetensors files
    kl_*             KL(base || this) per token, nats; the interval is a bootstrap over windows
    kl_lower_mean    a lower bound of kl_mean, and kl_tail_error the standard error of its
                     estimate, where the base was a compact baseline
    top1_agreement   share of positions where both find the same token most likely; `unsure` of
                     those where the base gives its best token less than 0.9
    kl_by_position   mean by place in the window, such as "1k-8k"; long windows fill more of them
    flips            answers to multiple-choice items that differ from the base's, if asked for
    """

    name: str
    mode: str
    bytes: int
    perplexity: float
    kl_mean: float | None = None
    kl_interval: Interval | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    kl_lower_mean: float | None = None
    kl_tail_error: float | None = None
    kl_median: float | None = None
    top1_agreement_unsure: float | None = None
    kl_by_position: Mapping[str, float] | None = None
    flips: Flips | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A base and what was compared with it, on one text.

    method  "full" (both over the whole vocabulary) or "compact" (a stored baseline)
    """

    base: Row
    candidates: tuple[Row, ...]
    text_sha256: str
    num_windows: int
    num_tokens: int
    window_tokens: int
    method: str

    @property
    def rows(self) -> tuple[Row, ...]:
        """The base, then the candidates."""
        return (self.base, *self.candidates)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A table for people, and in one line what the figures are."""
        return format_table(self)


class Loaded(NamedTuple):
    """A model that is ready to be scored."""

    name: str
    mode: Mode
    num_bytes: int
    engine: Engine


Window = tuple[int, ...]
Candidate = tuple[str, Path, Mode]
Progress = Callable[[int, int], None]


def compare_models(
    base_dir: Path,
    candidates: Sequence[Candidate],
    text_path: Path,
    *,
    max_tokens: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
    choices: Sequence[Choice] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Compare (name, directory, mode) with a base, all in memory at once.

    max_tokens  use the beginning of the text only
    choices     multiple-choice items whose answers are compared as well (`encode_choices`)
    progress    called with windows done and windows in all
    Raises UsageError for a text that is too short, CheckpointError if vocabularies differ.
    """
    text = read_text(text_path)
    room = max(window_tokens, longest(choices))
    base = load_model(base_dir.name, base_dir, "weight_only", room)
    others = [load_model(*candidate, room) for candidate in candidates]
    windows = cut_windows(base_dir, text, window_tokens, max_tokens)
    for name, directory, _ in candidates:
        if cut_windows(directory, text, window_tokens, max_tokens) != windows:
            raise CheckpointError(f"{name}: its tokenizer cuts the text differently from the base")
    base_tally, tallies = Tally(), [Tally() for _ in others]
    for done, window in enumerate(windows):
        base_logprobs_NV = window_logprobs(base.engine, window)
        base_tally.add(base_logprobs_NV, window)
        for other, tally in zip(others, tallies, strict=True):
            logprobs_NV = window_logprobs(other.engine, window)
            _check_vocabulary(other, logprobs_NV, base_logprobs_NV.shape[1])
            found = full_divergence(base_logprobs_NV, logprobs_NV)
            tally.add(logprobs_NV, window, found, BestToken(*base_logprobs_NV.max(-1)))
        if progress is not None:
            progress(done + 1, len(windows))
    rows = [tally.row(model) for model, tally in zip(others, tallies, strict=True)]
    if choices:
        answers = answer(base.engine, choices)
        rows = [
            replace(row, flips=count_flips(choices, answers, answer(other.engine, choices)))
            for row, other in zip(rows, others, strict=True)
        ]
    return _comparison(base_tally.row(base), rows, text, windows, window_tokens, "full")


def compare_with_baseline(
    baseline: Baseline, candidate: Candidate, *, progress: Progress | None = None
) -> Comparison:
    """Compare a model with a stored baseline, over the baseline's own tokens.

    Raises CheckpointError if the vocabularies differ in size.
    """
    window_tokens = max(map(len, baseline.windows))
    choices = baseline.choices
    model = load_model(*candidate, max(window_tokens, longest(choices)))
    tally = Tally()
    for index, window in enumerate(baseline.windows):
        logprobs_NV = window_logprobs(model.engine, window)
        _check_vocabulary(model, logprobs_NV, baseline.vocab_size)
        kept = baseline.of_window(index)
        best = BestToken(kept.top_logprobs[:, 0].float(), kept.top_ids[:, 0].long())
        tally.add(logprobs_NV, window, divergence(kept, logprobs_NV), best)
        if progress is not None:
            progress(index + 1, len(baseline.windows))
    negative_logprob = -float(baseline.positions.target_logprobs.double().mean())
    base = Row(baseline.name, baseline.mode, baseline.bytes, math.exp(negative_logprob))
    row = tally.row(model, is_estimate=True)
    if choices:
        found = count_flips(choices, baseline.answers, answer(model.engine, choices))
        row = replace(row, flips=found)
    return Comparison(
        base,
        (row,),
        baseline.text_sha256,
        len(baseline.windows),
        baseline.positions.tail_mass.shape[0],
        window_tokens,
        "compact",
    )


def make_baseline(
    directory: Path,
    text_path: Path,
    *,
    mode: Mode = "weight_only",
    max_tokens: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
    choices: Sequence[Choice] = (),
    progress: Progress | None = None,
) -> Baseline:
    """Score a model over a text, answer the choices, and keep the compact form."""
    text = read_text(text_path)
    room = max(window_tokens, longest(choices))
    model = load_model(directory.name, directory, mode, room)
    windows = cut_windows(directory, text, window_tokens, max_tokens)
    generator = torch.Generator().manual_seed(_SEED)
    parts: list[Compact] = []
    for done, window in enumerate(windows):
        logprobs_NV = window_logprobs(model.engine, window)
        parts.append(compact(logprobs_NV, torch.tensor(window[1:]), generator))
        if progress is not None:
            progress(done + 1, len(windows))
    return Baseline(
        name=model.name,
        mode=mode,
        bytes=model.num_bytes,
        vocab_size=model.engine.vocab_size,
        text_sha256=_sha256(text),
        windows=tuple(windows),
        positions=concatenate(parts),
        choices=tuple(choices),
        answers=answer(model.engine, choices),
    )


# A text is held whole, and scoring more of it would take days.
MAX_TEXT_BYTES = 1 << 30


def read_text(path: Path) -> str:
    """A text file in UTF-8; raises UsageError with the reason if it is none."""
    try:
        return read_bounded(path, MAX_TEXT_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def load_model(name: str, directory: Path, mode: Mode, window_tokens: int) -> Loaded:
    """A model with a cache for one window."""
    config = EngineConfig(
        mode=mode,
        max_sequences=1,
        max_model_len=window_tokens,
        kv_cache_tokens=window_tokens,
        prefix_cache=False,
    )
    num_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return Loaded(name, mode, num_bytes, Engine.load(directory, config))


def cut_windows(
    directory: Path, text: str, window_tokens: int, max_tokens: int | None
) -> list[Window]:
    """Cut a text's tokens into windows, each opened by the bos token if the model has one.

    A last window of less than half the length is left out.
    """
    vocabulary = load_chat(directory).vocabulary
    token_ids = vocabulary.encode_text(text)[:max_tokens]
    opening = () if vocabulary.bos_token_id is None else (vocabulary.bos_token_id,)
    room = window_tokens - len(opening)
    windows = [
        (*opening, *token_ids[start : start + room]) for start in range(0, len(token_ids), room)
    ]
    kept = [window for window in windows if len(window) > window_tokens // 2]
    if not kept:
        raise UsageError(
            f"the text has {len(token_ids)} tokens; a window of {window_tokens} needs at least "
            f"half of that"
        )
    return kept


def window_logprobs(engine: Engine, window: Window) -> Tensor:
    """Log-probs f32 (N, V) of the window's tokens after the first."""
    with closing(engine.score(window)) as chunks:
        logits_NV = torch.cat(list(chunks))[:-1]
    return torch.log_softmax(logits_NV, dim=-1)


def full_divergence(base_NV: Tensor, other_NV: Tensor) -> Divergence:
    """KL(base || other) of each position over the whole vocabulary."""
    kl = (base_NV.exp() * (base_NV - other_NV)).sum(-1, dtype=torch.float64)
    return Divergence(kl, kl, torch.zeros_like(kl))


class BestToken(NamedTuple):
    """The base's most likely token of each position and its log-prob, (N,) each."""

    logprobs: Tensor
    token_ids: Tensor


class Tally:
    """Per-position figures of one model, window by window."""

    def __init__(self) -> None:
        self._negative_logprobs: list[Tensor] = []
        self._divergences: list[Divergence] = []
        self._agreements: list[Tensor] = []
        self._unsure: list[Tensor] = []

    def add(
        self,
        logprobs_NV: Tensor,
        window: Window,
        found: Divergence | None = None,
        base_best: BestToken | None = None,
    ) -> None:
        """Note one window; the last two compare it with the base."""
        targets_N1 = torch.tensor(window[1:])[:, None]
        self._negative_logprobs.append(-logprobs_NV.gather(1, targets_N1)[:, 0].double())
        if found is not None and base_best is not None:
            self._divergences.append(found)
            self._agreements.append(logprobs_NV.argmax(-1) == base_best.token_ids)
            self._unsure.append(base_best.logprobs < math.log(_SURE))

    def row(self, model: Loaded, *, is_estimate: bool = False) -> Row:
        """Summary of all windows. Raises CheckpointError if any figure is NaN."""
        perplexity = math.exp(float(torch.cat(self._negative_logprobs).mean()))
        if math.isnan(perplexity):
            raise CheckpointError(f"{model.name}: its log-probs are not numbers")
        if not self._divergences:
            return Row(model.name, model.mode, model.num_bytes, perplexity)
        kl = torch.cat([found.kl for found in self._divergences])
        lower = torch.cat([found.lower for found in self._divergences])
        variance = torch.cat([found.variance for found in self._divergences])
        agreements, unsure = torch.cat(self._agreements).double(), torch.cat(self._unsure)
        return Row(
            model.name,
            model.mode,
            model.num_bytes,
            perplexity,
            kl_mean=float(kl.mean()),
            kl_interval=bootstrap([found.kl.numpy() for found in self._divergences]),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            top1_agreement=float(agreements.mean()),
            kl_lower_mean=float(lower.mean()) if is_estimate else None,
            kl_tail_error=float(variance.sum().sqrt() / len(kl)) if is_estimate else None,
            kl_median=float(kl.median()),
            top1_agreement_unsure=float(agreements[unsure].mean()) if unsure.any() else None,
            kl_by_position=self._by_position(),
        )

    def _by_position(self) -> dict[str, float]:
        """Mean divergence by place in the window; a position counts the tokens before it."""
        means = {}
        for name, (first, end) in _PLACES.items():
            parts = [found.kl[first:end] for found in self._divergences]
            if any(len(part) for part in parts):
                means[name] = float(torch.cat(parts).mean())
        return means


def bootstrap(windows: Sequence[NDArray[np.float64]]) -> Interval | None:
    """95 % interval of the mean over all positions, resampling windows; None for fewer than two.

    Positions of one window share their text, so they are not independent draws.
    """
    if len(windows) < 2:
        return None
    generator = np.random.default_rng(_SEED)
    sums = np.array([window.sum() for window in windows])
    counts = np.array([len(window) for window in windows])
    drawn = generator.integers(0, len(windows), (_BOOTSTRAP_DRAWS, len(windows)))
    means = sums[drawn].sum(-1) / counts[drawn].sum(-1)
    return Interval(float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))


def format_table(comparison: Comparison) -> str:
    """The comparison as text."""
    head = ("model", "bytes", "perplexity", "KL mean", "95 % interval", "KL p99", "top-1 same")
    lines = [head]
    for row in comparison.rows:
        interval = row.kl_interval
        lines.append(
            (
                f"{row.name} (declared)" if row.mode == "declared" else row.name,
                f"{row.bytes / 1e6:,.1f} MB",
                f"{row.perplexity:.3f}",
                "-" if row.kl_mean is None else f"{row.kl_mean:.5f}",
                "-" if interval is None else f"{interval.low:.5f} - {interval.high:.5f}",
                "-" if row.kl_p99 is None else f"{row.kl_p99:.4f}",
                "-" if row.top1_agreement is None else f"{row.top1_agreement:.2%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, _explanation(comparison), *_flip_lines(comparison)])


def _flip_lines(comparison: Comparison) -> list[str]:
    """One line per candidate on its changed answers; none without choices."""
    return [
        f"{row.name}: {f.changed} of {f.items} answers differ from {comparison.base.name} "
        f"({f.lost} right ones lost, {f.won} won, {f.changed_wrong} among wrong ones); right "
        f"{f.right / f.items:.1%}, {comparison.base.name} {f.base_right / f.items:.1%}"
        for row in comparison.candidates
        if (f := row.flips) is not None
    ]


def _explanation(comparison: Comparison) -> str:
    words = (
        f"{comparison.num_tokens:,} tokens in {comparison.num_windows} windows of "
        f"{comparison.window_tokens}; KL in nats per token, from {comparison.base.name}; "
    )
    if comparison.method == "full":
        return words + "over the full vocabulary."
    bounds = [
        f"at least {row.kl_lower_mean:.5f}, sampling error of the tail {row.kl_tail_error:.5f}"
        for row in comparison.candidates
    ]
    return words + f"from a compact baseline: {'; '.join(bounds)}."


def _comparison(
    base: Row,
    rows: Sequence[Row],
    text: str,
    windows: Sequence[Window],
    window_tokens: int,
    method: str,
) -> Comparison:
    num_tokens = sum(len(window) - 1 for window in windows)
    return Comparison(
        base, tuple(rows), _sha256(text), len(windows), num_tokens, window_tokens, method
    )


def _check_vocabulary(model: Loaded, logprobs_NV: Tensor, vocab_size: int) -> None:
    if logprobs_NV.shape[1] != vocab_size:
        raise CheckpointError(
            f"{model.name}: a vocabulary of {logprobs_NV.shape[1]}; the base has {vocab_size}"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
