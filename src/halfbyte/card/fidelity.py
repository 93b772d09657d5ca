"""One HTML page of what `halfbyte compare --json` wrote: how close checkpoints are to the base."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from halfbyte.card.plots import LabelledInterval, intervals
from halfbyte.fidelity.comparison import (
    FidelityComparison,
    ModelRow,
    comparison_of,
    explanation,
    flip_lines,
    shown_name,
)
from halfbyte.page import Cell, Table, render_page

_NAN = float("nan")


def render_fidelity(record: Mapping[str, Any], where: str = "record") -> str:
    """The page of a record of `halfbyte compare`. Raises UsageError at `where` for what is none."""
    found = comparison_of(record, where)
    names = " and ".join(map(shown_name, found.candidates))
    return render_page(
        "halfbyte.card",
        "fidelity.html",
        "report.css",
        title=f"{names} against {found.base.name}",
        subtitle=explanation(found),
        rows=_rows(found),
        remarks=flip_lines(found),
        plots=[plot for plot in _plots(found) if plot[2]],
        pairs=_pairs(found),
        facts=_facts(found, record),
    )


def _rows(found: FidelityComparison) -> Table:
    head = ["model", "bytes", "perplexity", "log perplexity minus the base's", "KL mean",
            "KL median", "KL p99", "same top token", "where the base is unsure"]  # fmt: skip
    rows = [
        [
            Cell(shown_name(row), kind="strong" if row is not found.base else ""),
            f"{row.bytes / 1e6:,.1f} MB",
            _cell(row.perplexity, row.perplexity_interval, ".3f"),
            _cell(row.log_perplexity_change, row.log_perplexity_change_interval, "+.4f"),
            _cell(row.kl_mean, row.kl_interval, ".5f"),
            _cell(row.kl_median, None, ".5f"),
            _cell(row.kl_p99, None, ".4f"),
            _cell(row.top1_agreement, None, ".2%"),
            _cell(row.top1_agreement_unsure, None, ".2%"),
        ]
        for row in found.rows
    ]
    return Table(
        head,
        rows,
        "95 % intervals below the figures. KL is the divergence of the model's next token from the "
        "base's: 0 where both foretell the same. Unsure: the base gives no token 90 %.",
    )


def _plots(found: FidelityComparison) -> list[tuple[str, str, Markup]]:
    kl = [_estimate(row, row.kl_mean, row.kl_interval, ".5f") for row in found.candidates]
    change = [
        _estimate(row, row.log_perplexity_change, row.log_perplexity_change_interval, "+.4f")
        for row in found.candidates
        if row.log_perplexity_change is not None
    ]
    places = [
        LabelledInterval(f"{shown_name(row)}, {place}", _NAN, value, _NAN, f"{value:.5f}")
        for row in found.candidates
        for place, value in (row.kl_by_position or {}).items()
    ]
    return [
        (
            "KL divergence",
            "Mean per token and its interval; the further left, the closer to the base.",
            intervals(kl, title="KL divergence", unit="nats per token"),
        ),
        (
            "Perplexity",
            "Log perplexity minus the base's, token by token: right of 0, the text surprises the "
            "model more.",
            intervals(change, title="log perplexity", unit="nats per token"),
        ),
        (
            "By place in the window",
            "KL where so many tokens came before: a loss that grows with the context shows here.",
            intervals(places, title="KL by place", unit="nats per token")
            if any(len(row.kl_by_position or ()) > 1 for row in found.candidates)
            else Markup(""),
        ),
    ]


def _estimate(
    row: ModelRow, value: float | None, interval: Sequence[float] | None, digits: str
) -> LabelledInterval:
    low, high = interval or (_NAN, _NAN)
    mid = _NAN if value is None else value
    note = "not measured" if value is None else f"{value:{digits}}"
    return LabelledInterval(shown_name(row), low, mid, high, note)


def _pairs(found: FidelityComparison) -> Table | None:
    if not found.pairs:
        return None
    rows = [
        [
            f"{pair.second} minus {pair.first}",
            _cell(pair.kl_difference, pair.kl_interval, "+.5f"),
            _cell(pair.log_perplexity_difference, pair.log_perplexity_interval, "+.4f"),
        ]
        for pair in found.pairs
    ]
    head = ["second minus first", "KL mean", "log perplexity"]
    return Table(head, rows, "Token by token; an interval without 0 tells the two apart.")


def _facts(found: FidelityComparison, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    checkpoints = [
        (f"checkpoint {shown_name(row)}", str(raw.get("checkpoint") or "not known"))
        for row, raw in zip(found.candidates, record["candidates"], strict=True)
    ]
    return [
        ("text", f"{found.num_texts}, SHA-256 {found.text_sha256}"),
        ("tokens", f"{found.num_tokens:,} in {found.num_windows:,} windows"),
        *checkpoints,
    ]


def _cell(value: float | None, interval: Sequence[float] | None, digits: str) -> str | Cell:
    if value is None:
        return "-"
    text = f"{value:{digits}}"
    if interval is None:
        return text
    return Cell(text, f"{interval[0]:{digits}} to {interval[1]:{digits}}")
