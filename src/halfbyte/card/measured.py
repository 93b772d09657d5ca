"""Sections of a card about fidelity and speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.card import phrases
from halfbyte.card.about import (
    hardware_section,
)
from halfbyte.card.facts import (
    is_fidelity,
)
from halfbyte.card.given import (
    NOT_MEASURED,
    RECORDS,
    UNMEASURED,
    CardInput,
    speed_records,
)
from halfbyte.card.markdown import Markdown, code, join, link, md, row, rule
from halfbyte.evals.judging.render import (
    percent,
)


def fidelity_section(given: CardInput) -> Markdown:
    """A section with the tables of `halfbyte compare --json`."""
    parts = [
        _fidelity_table(name, record, given.checkpoint.identity)
        for name, record in given.figures.items()
        if is_fidelity(record)
    ]
    if not parts:
        return md("{}: no record of fidelity was given.", UNMEASURED)
    return join("\n\n", [*parts, Markdown(phrases.FIDELITY)])


def _fidelity_table(name: str, record: Mapping[str, Any], identity: str) -> Markdown:
    path, none = f"{RECORDS}/{name}", Markdown("-")
    base = record["base"]
    head = ["model", "perplexity (95 %)", "log perplexity minus the base's", "KL mean (95 %)",
            "KL median", "KL p99", "same top token", "answers changed"]  # fmt: skip
    lines = [
        md(
            "{:,} tokens of held-out text ({}), against {}; log perplexity and KL in nats per "
            "token, differences paired token by token:",
            record["num_tokens"],
            link("record", path),
            base["name"],
        ),
        Markdown(""),
        row(head),
        rule(len(head)),
        row([base["name"], _perplexity(base, path), *[none] * 6]),
    ]
    own_names = set()
    for one in record["candidates"]:
        if one.get("checkpoint") != identity:
            continue  # another checkpoint's figures are not this card's
        flips = one.get("flips")
        changed = (
            f"{flips['lost'] + flips['won'] + flips['changed_wrong']} of {flips['items']}: "
            f"{flips['lost']} lost, {flips['won']} won"
            if flips
            else NOT_MEASURED
        )
        median, change = one.get("kl_median"), one.get("log_perplexity_change")
        own_names.add(shown := f"{one['name']}{' (declared)' if one['mode'] == 'declared' else ''}")
        cells = [
            shown,
            _perplexity(one, path),
            NOT_MEASURED
            if change is None
            else f"{change:+.4f}{_ends(one.get('log_perplexity_change_interval'), '+.4f')}",
            f"{one['kl_mean']:.4f}{_ends(one.get('kl_interval'), '.4f')}",
            NOT_MEASURED if median is None else f"{median:.4f}",
            f"{one['kl_p99']:.4f}",
            f"{percent(one['top1_agreement'], 1)} %",
            changed,
        ]
        lines.append(row(cells))
    pairs = [
        pair for pair in record.get("pairs", ()) if own_names & {pair["first"], pair["second"]}
    ]
    return join("\n", [*lines, *_fidelity_pairs(pairs)])


def _fidelity_pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Markdown]:
    """Every two candidates of which one is this checkpoint: intervals without 0 tell them apart."""
    if not pairs:
        return []
    head = ["second minus first", "KL mean (95 %)", "log perplexity (95 %)"]
    lines = [Markdown(""), row(head), rule(len(head))]
    for pair in pairs:
        kl, log = pair["kl_difference"], pair["log_perplexity_difference"]
        lines.append(
            row(
                [
                    f"{pair['second']} minus {pair['first']}",
                    f"{kl:+.5f}{_ends(pair['kl_interval'], '+.5f')}",
                    f"{log:+.4f}{_ends(pair['log_perplexity_interval'], '+.4f')}",
                ]
            )
        )
    return lines


def _perplexity(one: Mapping[str, Any], path: str) -> Markdown:
    found, interval = link(f"{one['perplexity']:.3f}", path), one.get("perplexity_interval")
    if not interval:
        return found
    return md("{} ({} to {})", found, *(f"{end:.3f}" for end in interval))


def _ends(interval: Sequence[float] | None, digits: str) -> str:
    return f" ({interval[0]:{digits}} to {interval[1]:{digits}})" if interval else ""


def speed_section(given: CardInput) -> Markdown:
    """A table for each record: what was measured, under what, how much and against what."""
    parts, none = [], Markdown("-")
    for name, record, figures in speed_records(given):
        found = link("record", f"{RECORDS}/{name}")
        lines = [
            md(
                "Measured on {} by {} ({}):",
                hardware_section(record.machine),
                code(record.command),
                found,
            ),
            Markdown(""),
            row(["what", "under", "measured", "beside it, in the same run"]),
            rule(4),
        ]
        lines += [
            row([f.name, f.conditions_text or none, f.value_text, f.against_text or none])
            for f in figures
        ]
        parts.append(join("\n", lines))
    if not parts:
        return md("{}: no record of speed was given.", UNMEASURED)
    return join("\n\n", [*parts, Markdown(phrases.SPEED)])
