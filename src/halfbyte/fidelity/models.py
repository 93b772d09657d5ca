"""How close one checkpoint comes to another: perplexity, KL divergence, agreement, answer flips.

Both models are teacher-forced through the engine's own path (paged cache in the checkpoint's
format) over windows of the text, each starting afresh. The first token of a window has no
distribution and is not counted. With both models in memory divergences are over the full
vocabulary; with a stored baseline they are estimates whose error is stated (`baseline`).

Shapes: N positions of a window, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats as distributions
from torch import Tensor

from halfbyte.engine.core import Engine, EngineConfig
from halfbyte.errors import CheckpointError
from halfbyte.fidelity.baseline import (
    Baseline,
    Compact,
    Divergence,
    compact,
    concatenate,
    divergence,
)
from halfbyte.fidelity.choices import EncodedItem, answer, count_flips, longest
from halfbyte.fidelity.comparison import FidelityComparison, Interval, ModelRow, PairRow, shown_name
from halfbyte.fidelity.seen import (
    ImageFidelity,
    ImagePrompt,
    is_right,
    longest_prompt,
    prompt_logprobs,
)
from halfbyte.fidelity.windows import FEWEST_UNITS, WINDOW_TOKENS, Window, cut_texts, read_texts
from halfbyte.model.linear import Mode

_SURE = 0.9
_PLACES = {"0-1k": (0, 1024), "1k-8k": (1024, 8192), "8k-32k": (8192, 32_768),
           "32k+": (32_768, None)}  # fmt: skip
_SEED = 0


Floats = NDArray[np.float64]


class LoadedModel(NamedTuple):
    """A model that is ready to be scored."""

    name: str
    mode: Mode
    num_bytes: int
    engine: Engine


Candidate = tuple[str, Path, Mode]
Progress = Callable[[int, int], None]


def _with_flips(
    rows: Sequence[ModelRow],
    base: LoadedModel,
    others: Sequence[LoadedModel],
    choices: Sequence[EncodedItem],
) -> list[ModelRow]:
    answers = answer(base.engine, choices)
    return [
        replace(row, flips=count_flips(choices, answers, answer(other.engine, choices)))
        for row, other in zip(rows, others, strict=True)
    ]


def compare_models(
    base_dir: Path,
    candidates: Sequence[Candidate],
    text_path: Path | Sequence[Path],
    *,
    max_tokens: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
    choices: Sequence[EncodedItem] = (),
    prompts: Sequence[ImagePrompt] = (),
    progress: Progress | None = None,
) -> FidelityComparison:
    """Compare (name, directory, mode) with a base, all in memory at once.

    text_path   one text or several; no window reaches from one into the next
    max_tokens  use the beginning of each text only
    choices     multiple-choice items whose answers are compared as well (`encode_choices`)
    prompts     conversations about pictures, on which they are compared as well (`image_prompts`)
    progress    called with windows done and windows in all
    Raises UsageError for a text that is too short, CheckpointError if vocabularies differ.
    """
    texts = read_texts(text_path)
    room = max(window_tokens, longest(choices), longest_prompt(prompts))
    base = load_model(base_dir.name, base_dir, "weight_only", room)
    others = [load_model(*candidate, room) for candidate in candidates]
    windows, origins = cut_texts(base_dir, texts, window_tokens, max_tokens)
    for name, directory, _ in candidates:
        if cut_texts(directory, texts, window_tokens, max_tokens)[0] != windows:
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
    units = _units(origins)
    rows = [
        tally.row(model, units, base_tally.negative_logprobs())
        for model, tally in zip(others, tallies, strict=True)
    ]
    if choices:
        rows = _with_flips(rows, base, others, choices)
    if prompts:
        seen = _compare_seen(base, others, prompts)
        rows = [replace(row, images=found) for row, found in zip(rows, seen, strict=True)]
    return FidelityComparison(
        base=base_tally.row(base, units),
        candidates=tuple(rows),
        text_sha256=_sha256("".join(texts)),
        num_windows=len(windows),
        num_tokens=sum(len(window) - 1 for window in windows),
        window_tokens=window_tokens,
        method="full",
        num_texts=len(texts),
        pairs=_pair_rows(rows, tallies, units),
    )


def _compare_seen(
    base: LoadedModel, others: Sequence[LoadedModel], prompts: Sequence[ImagePrompt]
) -> list[ImageFidelity]:
    """The candidates against the base, on what they say behind pictures."""
    base_right: list[bool] = []
    right: list[list[bool]] = [[] for _ in others]
    found: list[list[Floats]] = [[] for _ in others]
    of_answers: list[list[Floats]] = [[] for _ in others]
    agreements: list[list[Tensor]] = [[] for _ in others]
    for prompt in prompts:
        base_NV = prompt_logprobs(base.engine, prompt)
        base_right.append(is_right(prompt, base_NV))
        num_answer = len(prompt.answer_positions)
        for number, other in enumerate(others):
            other_NV = prompt_logprobs(other.engine, prompt)
            _check_vocabulary(other, other_NV, base_NV.shape[1])
            kl = full_divergence(base_NV, other_NV).kl.numpy()
            found[number].append(kl)
            of_answers[number].append(kl[len(kl) - num_answer :])
            agreements[number].append(base_NV.argmax(-1) == other_NV.argmax(-1))
            right[number].append(is_right(prompt, other_NV))
    rows = []
    for kl_of, answers, agree, own in zip(found, of_answers, agreements, right, strict=True):
        pairs = list(zip(base_right, own, strict=True))
        every = np.concatenate(kl_of)
        rows.append(
            ImageFidelity(
                prompts=len(prompts),
                tokens=len(every),
                kl_mean=float(every.mean()),
                kl_interval=interval_of_mean(kl_of, range(len(prompts))),
                kl_p99=float(np.quantile(every, 0.99)),
                top1_agreement=float(torch.cat(agree).double().mean()),
                answer_tokens=sum(map(len, answers)),
                answer_kl_mean=_mean(answers),
                base_right=sum(base_right),
                right=sum(own),
                lost=sum(was and not now for was, now in pairs),
                won=sum(now and not was for was, now in pairs),
            )
        )
    return rows


def compare_with_baseline(
    baseline: Baseline, candidate: Candidate, *, progress: Progress | None = None
) -> FidelityComparison:
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
    origins = baseline.origins or (0,) * len(baseline.windows)
    units = _units(origins)
    kept_logprobs = [
        -baseline.of_window(index).target_logprobs.double().numpy()
        for index in range(len(baseline.windows))
    ]
    mean = math.exp(_mean(kept_logprobs))
    interval = _exponential(interval_of_mean(kept_logprobs, units))
    base = ModelRow(
        baseline.name, baseline.mode, baseline.bytes, mean, perplexity_interval=interval
    )
    row = tally.row(model, units, kept_logprobs, is_estimate=True)
    if choices:
        found = count_flips(choices, baseline.answers, answer(model.engine, choices))
        row = replace(row, flips=found)
    return FidelityComparison(
        base,
        (row,),
        baseline.text_sha256,
        len(baseline.windows),
        baseline.positions.tail_mass.shape[0],
        window_tokens,
        "compact",
        num_texts=len(set(origins)),
    )


def make_baseline(
    directory: Path,
    text_path: Path | Sequence[Path],
    *,
    mode: Mode = "weight_only",
    max_tokens: int | None = None,
    window_tokens: int = WINDOW_TOKENS,
    choices: Sequence[EncodedItem] = (),
    progress: Progress | None = None,
) -> Baseline:
    """Score a model over texts, answer the choices, and keep the compact form."""
    texts = read_texts(text_path)
    room = max(window_tokens, longest(choices))
    model = load_model(directory.name, directory, mode, room)
    windows, origins = cut_texts(directory, texts, window_tokens, max_tokens)
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
        text_sha256=_sha256("".join(texts)),
        windows=tuple(windows),
        origins=tuple(origins),
        positions=concatenate(parts),
        choices=tuple(choices),
        answers=answer(model.engine, choices),
    )


def load_model(name: str, directory: Path, mode: Mode, window_tokens: int) -> LoadedModel:
    """A model with a cache for one window."""
    config = EngineConfig(
        mode=mode,
        max_sequences=1,
        max_model_len=window_tokens,
        kv_cache_tokens=window_tokens,
        prefix_cache=False,
    )
    num_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return LoadedModel(name, mode, num_bytes, Engine.load(directory, config))


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

    def negative_logprobs(self) -> list[Floats]:
        """Negative log-probabilities of the text's tokens, an array for each window."""
        return [part.numpy() for part in self._negative_logprobs]

    def divergences(self) -> list[Floats]:
        """KL divergence of each position, window by window."""
        return [found.kl.numpy() for found in self._divergences]

    def row(
        self,
        model: LoadedModel,
        units: Sequence[int],
        base_logprobs: Sequence[Floats] = (),
        *,
        is_estimate: bool = False,
    ) -> ModelRow:
        """Summary of all windows. Raises CheckpointError if any figure is NaN.

        units          what each window counts under in intervals (`interval_of_mean`)
        base_logprobs  the base's `negative_logprobs`, for what is compared with it
        """
        own = self.negative_logprobs()
        perplexity = math.exp(_mean(own))
        if math.isnan(perplexity):
            raise CheckpointError(f"{model.name}: its log-probs are not numbers")
        spread = _exponential(interval_of_mean(own, units))
        if not self._divergences:
            return ModelRow(
                model.name, model.mode, model.num_bytes, perplexity, perplexity_interval=spread
            )
        kl = torch.cat([found.kl for found in self._divergences])
        lower = torch.cat([found.lower for found in self._divergences])
        variance = torch.cat([found.variance for found in self._divergences])
        agreements, unsure = torch.cat(self._agreements).double(), torch.cat(self._unsure)
        change = [one - other for one, other in zip(own, base_logprobs, strict=True)]
        return ModelRow(
            model.name,
            model.mode,
            model.num_bytes,
            perplexity,
            kl_mean=float(kl.mean()),
            kl_interval=interval_of_mean(self.divergences(), units),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            top1_agreement=float(agreements.mean()),
            kl_lower_mean=float(lower.mean()) if is_estimate else None,
            kl_tail_error=float(variance.sum().sqrt() / len(kl)) if is_estimate else None,
            kl_median=float(kl.median()),
            top1_agreement_unsure=float(agreements[unsure].mean()) if unsure.any() else None,
            kl_by_position=self._by_position(),
            perplexity_interval=spread,
            log_perplexity_change=_mean(change),
            log_perplexity_change_interval=interval_of_mean(change, units),
        )

    def _by_position(self) -> dict[str, float]:
        """Mean divergence by place in the window; a position counts the tokens before it."""
        means = {}
        for name, (first, end) in _PLACES.items():
            parts = [found.kl[first:end] for found in self._divergences]
            if any(len(part) for part in parts):
                means[name] = float(torch.cat(parts).mean())
        return means


def interval_of_mean(windows: Sequence[Floats], units: Sequence[int]) -> Interval | None:
    """95 % t interval of the mean over all positions; None for fewer than three units.

    windows  one value a position, per window; positions of a window share their text
    units    the unit of each window: windows of one unit are not independent draws. The error is
             that of a mean over clusters, with one degree of freedom less than there are units.
    """
    index = np.asarray(units)
    count = len(np.unique(index))
    if count < FEWEST_UNITS:
        return None
    mean = _mean(windows)
    rests = np.bincount(index, weights=[float((window - mean).sum()) for window in windows])
    total = sum(len(window) for window in windows)
    error = math.sqrt(count / (count - 1) * float(np.square(rests).sum())) / total
    reach = float(distributions.t.ppf(0.975, count - 1)) * error
    return Interval(mean - reach, mean + reach)


def _units(origins: Sequence[int]) -> list[int]:
    """Texts, where there are enough of them to tell how much texts differ, else windows."""
    if len(set(origins)) >= FEWEST_UNITS:
        return list(origins)
    return list(range(len(origins)))


def _mean(windows: Sequence[Floats]) -> float:
    return float(np.concatenate(windows).mean())


def _exponential(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(math.exp(interval.low), math.exp(interval.high))


def _pair_rows(
    rows: Sequence[ModelRow], tallies: Sequence["Tally"], units: Sequence[int]
) -> tuple[PairRow, ...]:
    """Every two candidates, position by position."""
    found = []
    for (one, first), (two, second) in combinations(zip(rows, tallies, strict=True), 2):
        kl = _minus(second.divergences(), first.divergences())
        logs = _minus(second.negative_logprobs(), first.negative_logprobs())
        found.append(
            PairRow(
                first=shown_name(one),
                second=shown_name(two),
                kl_difference=_mean(kl),
                kl_interval=interval_of_mean(kl, units),
                log_perplexity_difference=_mean(logs),
                log_perplexity_interval=interval_of_mean(logs, units),
            )
        )
    return tuple(found)


def _minus(one: Sequence[Floats], other: Sequence[Floats]) -> list[Floats]:
    return [x - y for x, y in zip(one, other, strict=True)]


def _check_vocabulary(model: LoadedModel, logprobs_NV: Tensor, vocab_size: int) -> None:
    if logprobs_NV.shape[1] != vocab_size:
        raise CheckpointError(
            f"{model.name}: a vocabulary of {logprobs_NV.shape[1]}; the base has {vocab_size}"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
