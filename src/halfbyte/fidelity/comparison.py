"""How close checkpoints came: intervals, rows, and the tables that a terminal shows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.evals.judging.stats import Interval as Interval
from halfbyte.fidelity.choices import Flips
from halfbyte.fidelity.seen import ImageFidelity
from halfbyte.fidelity.windows import FEWEST_UNITS
from halfbyte.printable import columns


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model of a comparison. What compares it with the base is None for the base itself.

    bytes            of its safetensors files
    perplexity_interval  e to the interval of the mean negative log-prob
    log_perplexity_change  this one's minus the base's, token by token, with its interval
    kl_*             KL(base || this) per token, nats
    kl_lower_mean    a lower bound of kl_mean, and kl_tail_error the standard error of its
                     estimate, where the base was a compact baseline
    top1_agreement   share of positions where both find the same token most likely; `unsure` of
                     those where the base gives its best token less than 0.9
    kl_by_position   mean by place in the window, such as "1k-8k"; long windows fill more of them
    flips            answers to multiple-choice items that differ from the base's, if asked for
    images           what differs behind pictures, if asked for
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
    perplexity_interval: Interval | None = None
    log_perplexity_change: float | None = None
    log_perplexity_change_interval: Interval | None = None
    images: ImageFidelity | None = None


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two candidates on the same tokens: the second's figures minus the first's, paired.

    An interval without zero tells them apart, also where the intervals of both overlap.
    """

    first: str
    second: str
    kl_difference: float
    kl_interval: Interval | None
    log_perplexity_difference: float
    log_perplexity_interval: Interval | None


@dataclass(frozen=True, slots=True)
class FidelityComparison:
    """A base and what was compared with it, on one text or several.

    method  "full" (both over the whole vocabulary) or "compact" (a stored baseline)
    pairs   every two candidates
    """

    base: ModelRow
    candidates: tuple[ModelRow, ...]
    text_sha256: str
    num_windows: int
    num_tokens: int
    window_tokens: int
    method: str
    num_texts: int = 1
    pairs: tuple[PairRow, ...] = ()

    @property
    def rows(self) -> tuple[ModelRow, ...]:
        """The row of the base, then those of the candidates."""
        return (self.base, *self.candidates)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain values, which JSON can hold."""
        return asdict(self)

    def table(self) -> str:
        """A table for people, and in one line what the figures are."""
        return format_table(self)


def comparison_of(record: Mapping[str, Any], where: str = "record") -> FidelityComparison:
    """The comparison that `as_dict` was made of; a record may say more beside it.

    where  names the record in an error
    Raises UsageError for what is none.
    """
    try:
        told = _known(FidelityComparison, record)
        told["base"] = _row(told["base"])
        told["candidates"] = tuple(map(_row, told["candidates"]))
        told["pairs"] = tuple(
            PairRow(**{n: _interval(n, v) for n, v in _known(PairRow, pair).items()})
            for pair in told.get("pairs", ())
        )
        found = FidelityComparison(**told)
        format_table(found)  # whatever it holds can be shown
    except (TypeError, ValueError, KeyError, AttributeError) as failure:
        raise UsageError(
            f"{where} is not a comparison as `halfbyte compare --json` writes it: {failure}"
        ) from failure
    return found


def _row(record: Mapping[str, Any]) -> ModelRow:
    told = {name: _interval(name, value) for name, value in _known(ModelRow, record).items()}
    if told.get("flips") is not None:
        told["flips"] = Flips(**_known(Flips, told["flips"]))
    if told.get("images") is not None:
        values = _known(ImageFidelity, told["images"])
        told["images"] = ImageFidelity(**{n: _interval(n, v) for n, v in values.items()})
    return ModelRow(**told)


def _known(kind: type, record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record that a data class has."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in dict(record).items() if name in names}


def _interval(name: str, value: Any) -> Any:
    """JSON has lists where intervals were."""
    return Interval(*value) if name.endswith("interval") and value is not None else value


def shown_name(row: ModelRow) -> str:
    """The name of a row, with its arithmetic where that is not the usual one."""
    return f"{row.name} (declared)" if row.mode == "declared" else row.name


def format_table(comparison: FidelityComparison) -> str:
    """Format the comparison as a table for a terminal."""
    head = ("model", "bytes", "perplexity", "KL mean", "95 % interval", "KL p99", "top-1 same")
    lines = [head]
    for row in comparison.rows:
        interval = row.kl_interval
        lines.append(
            (
                shown_name(row),
                f"{row.bytes / 1e6:,.1f} MB",
                f"{row.perplexity:.3f}",
                "-" if row.kl_mean is None else f"{row.kl_mean:.5f}",
                "-" if interval is None else f"{interval.low:.5f} - {interval.high:.5f}",
                "-" if row.kl_p99 is None else f"{row.kl_p99:.4f}",
                "-" if row.top1_agreement is None else f"{row.top1_agreement:.2%}",
            )
        )
    below = (
        explanation(comparison),
        *_pair_lines(comparison),
        *flip_lines(comparison),
        *image_lines(comparison),
    )
    return "\n".join([*columns(lines), *below])


def _pair_lines(comparison: FidelityComparison) -> list[str]:
    """Perplexity against the base, and every two candidates, each with its paired interval."""
    base = comparison.base.name
    said = [
        f"log perplexity of {shown_name(row)} minus {base}: {row.log_perplexity_change:+.4f}"
        f"{_between(row.log_perplexity_change_interval)}"
        for row in comparison.candidates
        if row.log_perplexity_change is not None
    ]
    said += [
        f"KL of {pair.second} minus {pair.first}: {pair.kl_difference:+.5f}"
        f"{_between(pair.kl_interval, 5)}"
        for pair in comparison.pairs
    ]
    return said


def _between(interval: Interval | None, digits: int = 4) -> str:
    if interval is None:
        return ""
    return f" ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def flip_lines(comparison: FidelityComparison) -> list[str]:
    """One line per candidate on its changed answers; none without choices."""
    return [
        f"{row.name}: {f.changed} of {f.items} answers differ from {comparison.base.name} "
        f"({f.lost} right ones lost, {f.won} won, {f.changed_wrong} among wrong ones); right "
        f"{f.right / f.items:.1%}, {comparison.base.name} {f.base_right / f.items:.1%}"
        for row in comparison.candidates
        if (f := row.flips) is not None
    ]


def image_lines(comparison: FidelityComparison) -> list[str]:
    """One line per candidate on its predictions behind pictures; none without image prompts."""
    return [
        f"{shown_name(row)} behind pictures: KL {seen.kl_mean:.5f}"
        f"{_between(seen.kl_interval, 5)} over {seen.tokens:,} tokens of {seen.prompts} "
        f"conversations, {seen.answer_kl_mean:.5f} over the {seen.answer_tokens:,} of their last "
        f"answers; top-1 same {seen.top1_agreement:.2%}; answers right to the token {seen.right}, "
        f"{comparison.base.name} {seen.base_right} ({seen.lost} lost, {seen.won} won)"
        for row in comparison.candidates
        if (seen := row.images) is not None
    ]


def explanation(comparison: FidelityComparison) -> str:
    """What the figures are, in one line: of how much text, with which intervals."""
    words = (
        f"{comparison.num_tokens:,} tokens in {comparison.num_windows} windows of "
        f"{comparison.window_tokens}; KL in nats per token, from {comparison.base.name}; "
    )
    if comparison.num_texts >= FEWEST_UNITS:
        words += f"intervals across {comparison.num_texts} texts; "
    elif comparison.num_windows >= FEWEST_UNITS:
        given = "this text" if comparison.num_texts == 1 else "these texts"
        words += f"intervals along {given} only (three texts or more speak for others like them); "
    else:
        words += f"no intervals from fewer than {FEWEST_UNITS} windows; "
    if comparison.method == "full":
        return words + "over the full vocabulary."
    bounds = [
        f"at least {row.kl_lower_mean:.5f}, sampling error of the tail {row.kl_tail_error:.5f}"
        for row in comparison.candidates
    ]
    return words + f"from a compact baseline: {'; '.join(bounds)}."
