"""One HTML page from one run, or from a baseline and a candidate; no external assets.

What it says comes from `facts`; a figure without a record does not get here.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib import resources

from halfbyte.card.facts import PRIVATE, Arm, Usage, columns, title_of
from halfbyte.card.plots import Interval, intervals, shares
from halfbyte.evals.compare import BenchmarkComparison, Comparison, Flip
from halfbyte.evals.records import BenchmarkResult
from halfbyte.evals.render import percent, points, what_would_decide

_CAUSES = ("ok", "wrong", "length", "unparsed", "empty", "refused", "ungraded", "error")
_CAUSE_NAMES = {
    "ok": "right", "wrong": "wrong", "length": "truncated (cut by the output limit)",
    "unparsed": "unextracted (no answer found in the text)", "empty": "empty",
    "refused": "refused by the server", "error": "failed or ungraded, not scored",
}  # fmt: skip
_ANSWER_CHARS = 1_600


def render_report(arms: Sequence[Arm], comparison: Comparison | None) -> str:
    """The page's text."""
    style = resources.files("halfbyte.card").joinpath("report.css").read_text()
    names = " against ".join(escape(arm.run.arm) for arm in reversed(arms))
    sections = [
        _head(arms, comparison),
        _scores(arms),
        _differences(comparison),
        _domains(arms, comparison),
        _causes(arms),
        _usage(arms),
        _flips(comparison),
        _provenance(arms, comparison),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation: {names}</title><style>\n{style}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row) + "</tr>\n"
        for row in rows
    )
    return (
        f'<p class="caption">{caption}</p><div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _verdict(text: str) -> str:
    return f'<span class="verdict {text}">{text}</span>'


def _head(arms: Sequence[Arm], comparison: Comparison | None) -> str:
    names = " against ".join(f"{escape(a.run.arm)}" for a in reversed(arms))
    lines = [f"<h1>Evaluation: {names}</h1>"]
    models = ", ".join(sorted({escape(a.run.model) for a in arms}))
    lines.append(
        f'<p class="soft">Model as served: {models}. Finished {arms[-1].run.finished}.</p>'
    )
    notes = dict.fromkeys(note for a in arms if (note := a.run.checkpoint.get("note")))
    lines += [f"<p><b>Note:</b> {escape(note)}.</p>" for note in notes]
    if comparison is None:
        return "".join(lines)
    lines.append(f"<p>{_verdict(comparison.verdict)} {_conclusion(comparison)}</p>")
    return "".join(lines)


def _conclusion(comparison: Comparison) -> str:
    """What the comparison lets one say, in two or three sentences."""
    rows = comparison.benchmarks.values()
    if not rows:
        return "No benchmark was measured in both arms: nothing can be concluded."
    by_verdict: dict[str, list[str]] = {}
    for row in rows:
        by_verdict.setdefault(row.verdict, []).append(row.title)
    parts = []
    if titles := by_verdict.get("GO"):
        parts.append(f"A loss larger than the margin is ruled out on {', '.join(titles)}.")
    if titles := by_verdict.get("NO-GO"):
        parts.append(f"A loss larger than the margin is shown on {', '.join(titles)}.")
    if titles := by_verdict.get("INCONCLUSIVE"):
        parts.append(
            f"On {', '.join(titles)} the interval is too wide to say either: neither equality nor "
            "a loss has been shown."
        )
    m = comparison.macro
    counted = "one benchmark" if len(rows) == 1 else f"{len(rows)} benchmarks"
    parts.append(
        f"Mean difference over {counted}: {points(m.mean)} points, 95 % interval "
        f"{points(m.low)} to {points(m.high)}."
    )
    return escape(" ".join(parts))


def _scores(arms: Sequence[Arm]) -> str:
    names = columns(arms)
    rows = [
        [f"<b>{escape(arm.run.arm)}</b>", *(_score(arm.run.benchmarks.get(n)) for n in names)]
        for arm in arms
    ]
    counted = ["items × repeats"]
    for name in names:
        found = [arm.run.benchmarks[name] for arm in arms if name in arm.run.benchmarks]
        counted.append(
            "<br>".join(dict.fromkeys(f"{r.items} of {r.full_items} × {r.repeats}" for r in found))
            or "-"
        )
    table = _table(
        "Accuracy in percent with its 95 % interval over items; wrong answers include truncated, "
        "unextracted, empty and refused ones.",
        ["precision", *(escape(title_of(name)) for name in names)],
        [*rows, counted],
    )
    results = [result for arm in arms for result in arm.run.benchmarks.values()]
    notes = sorted(
        {
            f"{escape(result.title)}: {escape(note)}"
            for result in results
            for note in (*result.notes, result.reason)
            if note
        }
    )
    listed = "".join(f"<li>{note}</li>" for note in notes)
    return f"<section><h2>Accuracy</h2>{table}<ul class='soft'>{listed}</ul></section>\n"


def _score(result: BenchmarkResult | None) -> str:
    if result is None or result.score is None:
        why = "not measured" if result is None else result.status
        return f'<td class="missing">{why}</td>'
    interval = f"{percent(result.low, 1)} to {percent(result.high, 1)}"
    extra = " (partial)" if result.status == "partial" else ""
    return f"{percent(result.score)}{extra}<small>{interval}</small>"


def _differences(comparison: Comparison | None) -> str:
    if comparison is None or not comparison.benchmarks:
        return ""
    rows = list(comparison.benchmarks.values())
    drawn = [_difference_row(row) for row in rows]
    m = comparison.macro
    drawn.append(
        Interval("macro mean", 100 * m.low, 100 * m.mean, 100 * m.high,
                 f"{points(m.mean)}  {comparison.macro_verdict}")
    )  # fmt: skip
    plot = intervals(
        drawn, title="Difference per benchmark", unit="candidate minus baseline, points",
        marks=(0.0, -100 * min(row.margin for row in rows)),
    )  # fmt: skip
    head = ["benchmark", "difference", "SE", "SE repeats", "SE unpaired", "lost / won", "p (Holm)",
            "margin", "verdict", "what would decide"]  # fmt: skip
    cells = [
        [
            escape(row.title),
            f"{points(row.difference.mean)}<small>{points(row.difference.low, 1)} to "
            f"{points(row.difference.high, 1)}</small>",
            percent(row.difference.standard_error), percent(row.fixed_error),
            percent(row.unpaired_error), f"{row.lost} / {row.won}", f"{row.p_value_holm:.3f}",
            percent(row.margin, 1), _verdict(row.verdict),
            f'<td class="wrap">{escape(what_would_decide(row))}</td>',
        ]
        for row in rows
    ]  # fmt: skip
    table = _table(
        "Paired by item, in points; errors are clustered where items share a source. GO: the "
        "one-sided 95 % interval rules out a loss of the margin. p: exact McNemar or sign flips.",
        head,
        cells,
    )
    remarks = [*comparison.remarks, *(f"{r.title}: {t}" for r in rows for t in r.remarks)]
    remarks += [f"{title_of(n)} left out: {why}" for n, why in comparison.left_out.items()]
    listed = "".join(f"<li>{escape(text)}</li>" for text in remarks)
    return f"<section><h2>Difference</h2>{plot}{table}<ul class='soft'>{listed}</ul></section>\n"


def _difference_row(row: BenchmarkComparison) -> Interval:
    d = row.difference
    note = f"{points(d.mean)}  {row.verdict}"
    return Interval(row.title, 100 * d.low, 100 * d.mean, 100 * d.high, note)


def _domains(arms: Sequence[Arm], comparison: Comparison | None) -> str:
    parts = []
    for name in columns(arms):
        drawn = []
        strata = list(
            dict.fromkeys(
                s for arm in arms if name in arm.run.benchmarks
                for s in arm.run.benchmarks[name].by_stratum
            )
        )  # fmt: skip
        if len(strata) < 2:
            continue
        for stratum in strata[:40]:
            for index, arm in enumerate(arms):
                row = arm.run.benchmarks[name].by_stratum.get(stratum)
                if row is None:
                    continue
                label = f"{stratum}" if index == 0 else ""
                counted = f"{int(row['items'])} item{'s' * (row['items'] != 1)}"
                note = f"{100 * row['score']:.0f}  {arm.run.arm}, {counted}"
                kind = "second" if index else ""
                low, mid, high = (100 * row[key] for key in ("low", "score", "high"))
                drawn.append(Interval(label, low, mid, high, note, kind))
        plot = intervals(
            drawn, title=f"{title_of(name)} by domain", unit="accuracy, percent", marks=(0.0,)
        )
        parts.append(f"<details><summary>{escape(title_of(name))}</summary>{plot}</details>")
    if not parts:
        return ""
    parts[0] = parts[0].replace("<details>", "<details open>")
    return f"<section><h2>By domain</h2>{''.join(parts)}</section>\n"


def _causes(arms: Sequence[Arm]) -> str:
    rows = []
    for name in columns(arms):
        for arm in arms:
            result = arm.run.benchmarks.get(name)
            if result is None or not result.causes:
                continue
            total = sum(result.causes.values())
            members = [(cause, result.causes.get(cause, 0) / total) for cause in _CAUSES]
            rows.append((f"{title_of(name)}, {arm.run.arm}", members))
    key = "".join(f'<li><i class="{cause}"></i>{text}</li>' for cause, text in _CAUSE_NAMES.items())
    plot = shares(rows, title="How attempts ended")
    cells = []
    for arm in arms:
        for result in arm.run.benchmarks.values():
            counted = [str(result.causes.get(cause, 0)) for cause in _CAUSES]
            cells.append([escape(f"{result.title}, {arm.run.arm}"), *counted])
    head = ["benchmark", "right", "wrong", "truncated", "unextracted", "empty", "refused",
            "ungraded", "failed"]  # fmt: skip
    table = _table("Attempts by ending.", head, cells)
    return (
        f"<section><h2>How attempts ended</h2><ul class='key'>{key}</ul>{plot}{table}</section>\n"
    )


def _usage(arms: Sequence[Arm]) -> str:
    rows = [
        [escape(f"{title_of(name)}, {arm.run.arm}"), *_usage_cells(arm.usage[name])]
        for name in columns(arms)
        for arm in arms
        if name in arm.usage
    ]
    if not rows:
        return ""
    head = ["benchmark", "attempts", "prompt tokens", "output tokens", "of it reasoning",
            "output per answer", "wall", "output tokens/s", "latency median", "p90"]  # fmt: skip
    table = _table(
        "As the server counted them, answered attempts only. Speed is that of this evaluation "
        "(its concurrency, this machine), not a benchmark of the server.",
        head,
        rows,
    )
    return f"<section><h2>Tokens and speed</h2>{table}</section>\n"


def _usage_cells(usage: Usage) -> list[str]:
    return [
        f"{usage.attempts:,}", f"{usage.prompt_tokens:,}", f"{usage.completion_tokens:,}",
        f"{usage.reasoning_tokens:,}", f"{usage.mean_completion_tokens:,.0f}",
        f"{usage.wall_s:,.0f} s", f"{usage.tokens_per_s:,.1f}", f"{usage.median_latency_s:.2f} s",
        f"{usage.p90_latency_s:.2f} s",
    ]  # fmt: skip


def _flips(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    parts = []
    for row in comparison.benchmarks.values():
        if not row.flips:
            continue
        shown = "".join(_flip(row.name, flip, comparison) for flip in row.flips)
        head = f"{escape(row.title)}: {row.lost} lost, {row.won} won, {row.unchanged} unchanged"
        parts.append(f"<h3>{head}</h3>{shown}")
    if not parts:
        return "<section><h2>Flips</h2><p>No item changed its score.</p></section>\n"
    return f"<section><h2>Flips</h2>{''.join(parts)}</section>\n"


def _flip(name: str, flip: Flip, comparison: Comparison) -> str:
    direction = "lost" if flip.change < 0 else "won"
    summary = (
        f"{escape(flip.item_id)} {direction} ({points(flip.change, 0)}), {escape(flip.stratum)}: "
        f"right {escape(flip.gold[:60])}, {escape(comparison.baseline)} "
        f"{_short(flip.baseline_extracted)}, {escape(comparison.candidate)} "
        f"{_short(flip.candidate_extracted)}"
    )
    if name in PRIVATE:
        return f"<details><summary>{summary}</summary><p class='soft'>Answers are not shown: the "\
               "authors ask that items never stand in plain text online.</p></details>"  # fmt: skip
    texts = "".join(
        f"<div><h3>{escape(arm)}</h3><pre>{_tail(answer)}</pre></div>"
        for arm, answer in (
            (comparison.baseline, flip.baseline_answer),
            (comparison.candidate, flip.candidate_answer),
        )
    )
    return f"<details><summary>{summary}</summary><div class='pair'>{texts}</div></details>"


def _short(extracted: str | None) -> str:
    if extracted is None:
        return "none"
    line = " ".join(extracted.split())
    return escape(line if len(line) <= 40 else line[:39] + "…")


def _tail(answer: str) -> str:
    if not answer:
        return "(no answer text)"
    cut = "" if len(answer) <= _ANSWER_CHARS else "…"
    return cut + escape(answer[-_ANSWER_CHARS:])


def _provenance(arms: Sequence[Arm], comparison: Comparison | None) -> str:
    parts = []
    for arm in arms:
        run = arm.run
        facts = {
            "run": run.run_id,
            "record": str(arm.folder / "run.json"),
            "command": run.command,
            "settings": json.dumps(run.settings),
            "judge": json.dumps(run.judge) if run.judge else "none",
            "generated code": json.dumps(run.sandbox) if run.sandbox else "none ran",
            "packages": json.dumps(run.packages),
            "machine": run.machine,
            "started, finished": f"{run.started}, {run.finished}",
            "checkpoint": str(run.checkpoint.get("headers sha256", "not known, only its endpoint")),
        }
        rows = "".join(f"<dt>{k}</dt><dd><code>{escape(v)}</code></dd>" for k, v in facts.items())
        parts.append(f"<h3>{escape(run.arm)}</h3><dl>{rows}</dl>")
    rows_of_data = [
        [escape(r.title), escape(r.source), escape(r.licence), escape(r.prompt_id),
         f"<code>{r.prompts_sha256[:16]}</code>", escape(r.scorer),
         escape(str(r.provenance.get("revision") or "by hash")),
         f'<td class="wrap"><code>{escape(_hashes(r))}</code></td>']
        for r in arms[0].run.benchmarks.values()
    ]  # fmt: skip
    head = ["benchmark", "set", "licence", "prompt", "requests sha256", "scored by", "revision",
            "files"]  # fmt: skip
    table = _table("What was asked and how it was scored.", head, rows_of_data)
    a_a = ""
    if comparison is not None and comparison.is_a_a:
        a_a = "<p>Both arms are the same checkpoint: an A/A run, which shows the noise floor.</p>"
    return f"<section><h2>Where the figures come from</h2>{a_a}{table}{''.join(parts)}</section>\n"


def _hashes(result: BenchmarkResult) -> str:
    found = result.provenance.get("sha256", {})
    return ", ".join(f"{name} {digest[:12]}" for name, digest in found.items())
