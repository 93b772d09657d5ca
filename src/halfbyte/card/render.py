"""Fills `template.md`: a model card for the Hugging Face hub, and the records it links to.

Every figure carries a link to the record in the card's own folder; what no record covers is stated
as not measured. Text that is the same for every checkpoint is in `phrases`; all other text is put
into Markdown by `markdown.md`, which escapes it.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from halfbyte.card import phrases
from halfbyte.card.facts import Arm, CheckpointFacts, columns, is_fidelity, title_of
from halfbyte.card.markdown import Markdown, code, join, link, md, one_line, row, rule
from halfbyte.errors import UsageError
from halfbyte.evals.compare import Comparison, write_comparison
from halfbyte.evals.records import newest
from halfbyte.evals.render import (
    level_text,
    margin_text,
    p_text,
    percent,
    points,
    unseen_lines,
    what_would_decide,
)
from halfbyte.evals.stats import Estimate
from halfbyte.evals.tasks.suite import BENCHMARKS

RECORDS = "evaluation"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NOT_MEASURED = "not measured"
_NOT_MEASURED = Markdown(NOT_MEASURED.capitalize())
_COMPARISON = "comparison.json"


@dataclass(frozen=True, slots=True)
class CardInput:
    """All a card is made of.

    figures     records of `halfbyte bench` and `halfbyte compare --json`, by file name
    repository  hub id under which the card will stand; the metadata's links need it
    """

    checkpoint: CheckpointFacts
    arms: Sequence[Arm]
    comparison: Comparison | None
    base_model: str | None = None
    title: str | None = None
    licence: str = "other"
    licence_link: str | None = None
    release_date: str | None = None
    repository: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def write_card(out: Path, given: CardInput) -> Path:
    """Write OUT/README.md and OUT/evaluation/ with the records it links to; returns the card.

    Raises UsageError if two records would have one name there.
    """
    records = out / RECORDS
    files: dict[str, bytes] = {}
    for arm, name in zip(given.arms, record_names(given.arms), strict=True):
        source = newest(arm.folder, "run", "json")
        assert source is not None, arm.folder
        files[name] = source.read_bytes()
    for name, figure in given.figures.items():
        if name in files or name == _COMPARISON:
            raise UsageError(f"--records: {name} is the name of a run's record; rename the file")
        files[name] = (json.dumps(figure, indent=1) + "\n").encode()
    card = render_card(given).encode()
    _ensure_folder(records)
    for name, content in files.items():
        _write(records / name, content)
    if given.comparison is not None:
        # The answers inside stay at home: they may repeat items that must not be published.
        _unlink(records / _COMPARISON)
        write_comparison(records / _COMPARISON, _without_answers(given.comparison))
    _write(out / "README.md", card)
    return out / "README.md"


def _ensure_folder(folder: Path) -> None:
    """Make it; one that is a link to elsewhere is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link to {folder.resolve()}; the card writes beside itself")


def _write(path: Path, content: bytes) -> None:
    _unlink(path)
    path.write_bytes(content)


def _unlink(path: Path) -> None:
    """A link at this place is replaced, not followed: what it points to belongs to others."""
    if path.is_symlink():
        path.unlink()


def record_names(arms: Sequence[Arm]) -> list[str]:
    """A file name for each arm's record: the arm's own name where that is one, else like it.

    Letters, digits, dots, hyphens and underscores of ASCII stay; all else becomes one hyphen, so
    that a name is never a path. Equal names are told apart by a number.
    """
    names: list[str] = []
    for arm in arms:
        plain = unicodedata.normalize("NFKD", arm.run.arm).encode("ascii", "ignore").decode()
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-")[:80].rstrip(".-") or "arm"
        taken = {name.lower() for name in names}
        tries = [stem, *(f"{stem}-{number}" for number in range(2, len(arms) + 2))]
        names.append(next(f"{t}.run.json" for t in tries if f"{t}.run.json".lower() not in taken))
    return names


def _without_answers(comparison: Comparison) -> Comparison:
    rows = {}
    for name, one in comparison.benchmarks.items():
        values = {f: getattr(one, f) for f in type(one).__dataclass_fields__}
        values["flips"] = []
        rows[name] = type(one)(**values)
    values = {f: getattr(comparison, f) for f in Comparison.__dataclass_fields__}
    values["benchmarks"] = rows
    return Comparison(**values)


def render_card(given: CardInput) -> str:
    """The card's text."""
    template = resources.files("halfbyte.card").joinpath("template.md").read_text()
    c = given.checkpoint
    title = one_line(given.title or c.folder)
    return md(
        template,
        metadata=Markdown(_metadata(given, title)),
        title=title,
        intro=_intro(given),
        description=_description(given),
        licence=_licence(given),
        use_case=Markdown(phrases.USE_CASE),
        release_date=given.release_date or "Not stated.",
        architecture=_architecture(c),
        input=_input(c),
        output=Markdown(phrases.OUTPUT),
        software=Markdown(phrases.SOFTWARE),
        version=_version(given, title),
        training_data=Markdown(phrases.TRAINING_DATA),
        calibration=_calibration(c),
        evaluation_data=_evaluation_data(given),
        quantization=_quantization(c),
        usage=_usage(c, title),
        evaluation=_evaluation(given),
        speed=_figures(given, "speed", ("engine", "serving", "kernels", "latency", "speed")),
        fidelity=_fidelity(given),
        limitations=_limitations(given),
        ethics=Markdown(phrases.ETHICS),
        records=_records(given),
    )


def _candidate(given: CardInput) -> Arm | None:
    return given.arms[-1] if given.arms else None


def _path(given: CardInput, arm: Arm) -> str:
    """Where the card's folder holds the record of an arm."""
    names = dict(zip(map(id, given.arms), record_names(given.arms), strict=True))
    return f"{RECORDS}/{names[id(arm)]}"


def _metadata(given: CardInput, title: str) -> str:
    """The YAML block that the hub reads; results only where a score stands in a record."""
    tags = ["quantized", "fp8", "modelopt", "text-generation", "halfbyte"]
    if "nvfp4" in given.checkpoint.quantization.formats.values():
        tags.insert(1, "nvfp4")
    vision = given.checkpoint.config.vision is not None
    block: dict[str, Any] = {
        "license": one_line(given.licence),
        "library_name": "halfbyte",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": tags,
    }
    if given.licence == "other":
        block["license_name"] = "base-model-licence"
        if given.licence_link:
            block["license_link"] = one_line(given.licence_link)
    if given.base_model:
        block["base_model"] = one_line(given.base_model)
        block["base_model_relation"] = "quantized"
    arm = _candidate(given)
    results = _model_index(given, arm) if arm else []
    if results:
        block["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True).strip()


def _model_index(given: CardInput, arm: Arm) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, result in arm.run.benchmarks.items():
        # A part of a set, or items that are not the set's, are no result of that set.
        is_whole = result.items == result.full_items and not result.provenance.get("note")
        if result.score is None or result.status != "complete" or not is_whole:
            continue
        known = BENCHMARKS.get(name)
        source = (known.source if known else result.source).split(",")[0]
        if not _HUB_ID.fullmatch(source):
            continue  # the hub lists results on sets that it knows
        found.append(
            {
                "task": {"type": "text-generation", "name": "Text generation"},
                "dataset": {"type": source, "name": one_line(result.title), "split": "test"},
                "metrics": [
                    {
                        "type": "accuracy",
                        "name": one_line(result.scorer),
                        "value": round(100 * result.score, 2),
                        "verified": False,
                    }
                ],
            }
        )
        if given.repository:
            place = f"{one_line(given.repository)}/blob/main/{_path(given, arm)}"
            url = f"https://huggingface.co/{place}"
            found[-1]["source"] = {"name": "halfbyte run record", "url": url}
    return found


def _intro(given: CardInput) -> Markdown:
    noted = given.checkpoint.note
    note = md("\n\n**Note: {}.**", noted) if noted else Markdown("")
    base = given.base_model or "its source checkpoint"
    if given.comparison is None:
        return md(
            "A quantized version of {}. {}: its difference to it.{}", base, _NOT_MEASURED, note
        )
    record = link("comparison", f"{RECORDS}/{_COMPARISON}")
    return md(
        "A quantized version of {}: {} ({}).{}", base, _finding(given.comparison), record, note
    )


def _finding(comparison: Comparison) -> str:
    """The comparison in half a sentence."""
    rows = comparison.benchmarks.values()
    origins = {row.margin_origin for row in rows}
    margins = "margins given with the comparison" if "flag" in origins else (
        "margins fixed beforehand")  # fmt: skip
    if comparison.verdict == "GO":
        return f"no loss beyond the {margins} was found"
    if comparison.verdict == "NO-GO":
        return f"a loss beyond the {margins} was found"
    if comparison.reason == "blocked":
        return "the evaluation is not complete enough to say whether it loses accuracy"
    if comparison.reason == "loss shown":
        names = ", ".join(row.title for row in rows if row.reason == "loss shown")
        return f"it loses accuracy on {names}; whether beyond the {margins} was not shown"
    return "the evaluation was too small to say whether it loses accuracy"


def _description(given: CardInput) -> Markdown:
    c = given.checkpoint
    counts: dict[str, int] = {}
    for chosen in c.quantization.formats.values():
        counts[chosen] = counts.get(chosen, 0) + 1
    shares = ", ".join(f"{count} in {name.upper()}" for name, count in sorted(counts.items()))
    return md(
        "The decoder's {} linear layers are stored {}; the KV cache is {}; embeddings, norms, head"
        "{} keep bfloat16. The weight files take {:.3f} GB. Written by halfbyte in the layout "
        "of NVIDIA Model Optimizer, readable by servers that read that layout.",
        len(c.quantization.formats),
        shares,
        c.quantization.kv_cache.upper(),
        ", vision encoder and projector" if c.config.vision else "",
        c.weight_bytes / 1e9,
    )


def _licence(given: CardInput) -> Markdown:
    base = given.base_model or "the base model"
    return md(
        "The terms of {} apply to these weights: quantization changes how they are stored, "
        "not whose they are. Identifier in the metadata: {}.",
        base,
        code(given.licence),
    )


def _architecture(c: CheckpointFacts) -> Markdown:
    t = c.config.text
    lines = [
        Markdown("- **Type:** transformer, decoder-only"),
        md(
            "- **Decoder:** {0.num_layers} layers, width {0.width}, MLP width {0.mlp_width}, "
            "{0.num_heads} query and {0.num_kv_heads} key/value heads of {0.head_dim}",
            t,
        ),
        md("- **Vocabulary:** {:,} tokens", t.vocab_size),
        md("- **Positions:** {0:,}, rotary ({1.kind}, theta {1.theta:g})", t.max_positions, t.rope),
    ]
    if c.config.vision is not None:
        v = c.config.vision
        lines.append(
            md(
                "- **Vision encoder:** {0.num_layers} layers, width {0.width}, patches of "
                "{0.patch_size} pixels, images up to {0.image_size}",
                v,
            )
        )
    return join("\n", lines)


def _input(c: CheckpointFacts) -> Markdown:
    kinds = "Text and images" if c.config.vision else "Text"
    shape = "one-dimensional text, two-dimensional RGB images" if c.config.vision else "text (1D)"
    return md(
        "- **Types:** {}\n- **Format:** chat messages over the OpenAI protocol\n"
        "- **Parameters:** {}\n"
        "- **Other:** prompt and answer together at most {:,} tokens",
        kinds.lower(),
        shape,
        c.config.text.max_positions,
    )


def _version(given: CardInput, title: str) -> Markdown:
    made = given.checkpoint.made_of
    recipe = made.get("recipe", {}).get("name", "unknown recipe")
    rules = made.get("profile", "not recorded")
    return md("{}, recipe {}, scale rules {}.", title, code(recipe), code(rules))


def _calibration(c: CheckpointFacts) -> Markdown:
    found = c.made_of.get("calibration")
    if not found:
        return Markdown("Not recorded in the checkpoint's manifest.")
    return md(
        "{0[rows]:,} samples, {0[tokens]:,} tokens, the longest {0[longest]:,}; sha256 of the rows "
        "{1} ([halfbyte-manifest.json](halfbyte-manifest.json) names the rest). The data sets "
        "behind them and their licences are those of the calibration blend.",
        found,
        code(found["sha256"][:16]),
    )


def _evaluation_data(given: CardInput) -> Markdown:
    arm = _candidate(given)
    if arm is None:
        return md("{}.", _NOT_MEASURED)
    lines = [row(["benchmark", "set", "licence", "items scored", "revision"]), rule(5)]
    for name in columns(given.arms):
        r = arm.run.benchmarks.get(name)
        if r is None or r.score is None:
            known = BENCHMARKS.get(name)
            said = (known.title, known.source, known.licence) if known else (name, "-", "-")
            lines.append(row([*said, NOT_MEASURED, Markdown("-")]))
            continue
        origin = r.provenance.get("source", "")
        revision = r.provenance.get("revision") or "by hash, see the record"
        note = r.provenance.get("note")
        warning = md("; **{}**", note) if note else Markdown("")
        read = md("{} (read from {}){}", r.source, origin, warning)
        scored = link(f"{r.items} of {r.full_items}", _path(given, arm))
        lines.append(row([r.title, read, r.licence, scored, revision]))
    return join("\n", lines)


def _quantization(c: CheckpointFacts) -> Markdown:
    """Who has which format, from the checkpoint itself."""
    lines, none = [row(["part", "format", "layers", "linears"]), rule(4)], Markdown("-")
    for group, counts in c.formats.items():
        for chosen, count in sorted(counts.items()):
            layers = c.layers_by_format[f"{group} {chosen}"]
            lines.append(row([group, chosen.upper(), layers, count]))
    lines.append(row(["KV cache", c.quantization.kv_cache.upper(), "all", none]))
    kept = "embeddings, norms, head" + (", vision, projector" if c.config.vision else "")
    lines.append(row([kept, "BF16", none, none]))
    scales = c.made_of.get("recipe", {}).get("scales", {})
    text = Markdown(phrases.FORMATS)
    if scales:
        text = md(
            "{} Scales: weights by {}, activations by {} over the calibration data.",
            text,
            scales.get("weights"),
            scales.get("activations"),
        )
    return join("\n", [*lines, Markdown(""), text])


def _usage(c: CheckpointFacts, title: str) -> Markdown:
    """Commands for a shell; a title that means something to one is quoted."""
    asked = {"model": title, "messages": [{"role": "user", "content": "Hello"}]}
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    named = phrases.USAGE.replace("LENGTH", str(min(196_608, c.config.text.max_positions)))
    return Markdown(named.replace("BODY", body).replace("TITLE", shlex.quote(title)))


def _evaluation(given: CardInput) -> Markdown:
    if not given.arms:
        return md("{}: no evaluation record was given to this card.", _NOT_MEASURED)
    names = columns(given.arms)
    lines = [row(["precision", *(title_of(name) for name in names)]), rule(len(names) + 1)]
    lines += [
        row([arm.run.arm, *(_cell(given, arm, name) for name in names)]) for arm in given.arms
    ]
    parts = [join("\n", lines), _settings(given), _shares(given)]
    if given.comparison is not None:
        parts.append(_comparison(given.comparison))
    return join("\n\n", parts)


def _cell(given: CardInput, arm: Arm, name: str) -> Markdown:
    result = arm.run.benchmarks.get(name)
    if result is None or result.score is None:
        return Markdown(NOT_MEASURED)
    return md(
        "{} ({} to {})",
        link(percent(result.score), _path(given, arm)),
        percent(result.low, 1),
        percent(result.high, 1),
    )


def _settings(given: CardInput) -> Markdown:
    arm = given.arms[-1]
    s, judge = arm.run.settings, arm.run.judge
    return md(
        "Accuracy in percent with its 95 % interval over items; truncated, unextracted, empty and "
        "refused answers count as wrong. temperature {}, top_p {}, "
        "reasoning effort {}, at most {:,} output tokens{}. All settings, prompts' hashes and "
        "versions: {}.",
        s["temperature"],
        s["top_p"],
        s["reasoning_effort"] or "not sent",
        s["max_tokens"],
        md("; judge {0[model]} ({0[revision]})", judge) if judge else Markdown(""),
        link(arm.run.run_id, _path(given, arm)),
    )


def _shares(given: CardInput) -> Markdown:
    head = ["benchmark", "arm", "repeats", "truncated", "unextracted", "not scored"]
    lines = [row(head), rule(len(head))]
    for name in columns(given.arms):
        for arm in given.arms:
            r = arm.run.benchmarks.get(name)
            if r is None or not r.causes:
                continue
            cut = f"{percent(r.metrics.get('length_share'), 1)} %"
            unread = f"{percent(r.metrics.get('unparsed_share'), 1)} %"
            linked = link(cut, _path(given, arm))
            lines.append(row([r.title, arm.run.arm, r.repeats, linked, unread, len(r.missing)]))
    return join("\n", lines)


def _comparison(comparison: Comparison) -> Markdown:
    path, none = f"{RECORDS}/{_COMPARISON}", Markdown("-")
    head = ["benchmark", f"difference ({level_text(comparison)})", "p beyond (Holm)", "margin",
            "verdict", "what would decide"]  # fmt: skip
    lines = [
        md(
            "Difference, {} minus {}, paired by item, in points ({}):",
            comparison.candidate,
            comparison.baseline,
            link("record", path),
        ),
        Markdown(""),
        row(head),
        rule(len(head)),
    ]
    for one in comparison.benchmarks.values():
        decide = what_would_decide(one) or none
        margin = margin_text(one.margin, one.margin_origin)
        cells = [_interval(one.difference, path), p_text(one.p_beyond_holm), margin, one.verdict]
        lines.append(row([one.title, *cells, decide]))
    macro = _interval(comparison.macro, path)
    margin, p = percent(comparison.macro_margin, 1), p_text(comparison.macro_p_beyond_holm)
    lines += [row(["macro mean", macro, p, margin, comparison.macro_verdict, none]), Markdown("")]
    lines += [md("- {}: {}", title_of(n), why) for n, why in comparison.left_out.items()]
    for one in comparison.benchmarks.values():
        lines += [md("- {}: {}", one.title, text) for text in (*one.stops, *one.remarks)]
    lines += [md("- {}", text) for text in (*unseen_lines(comparison), *comparison.remarks)]
    return join("\n", [*lines, Markdown(""), Markdown(phrases.VERDICTS)])


def _interval(found: Estimate, path: str) -> Markdown:
    low, high = points(found.low), points(found.high)
    return md("{} ({} to {})", link(points(found.mean), path), low, high)


def _fidelity(given: CardInput) -> Markdown:
    """Tables of `halfbyte compare --json`, then other records of the subject."""
    parts = [
        _fidelity_table(name, record)
        for name, record in given.figures.items()
        if is_fidelity(record)
    ]
    listed = _figures(given, "fidelity", ("fidelity", "compare", "demo"))
    if not parts:
        return listed
    if not listed.startswith(_NOT_MEASURED):
        parts.append(listed)
    return join("\n\n", [*parts, Markdown(phrases.FIDELITY)])


def _fidelity_table(name: str, record: Mapping[str, Any]) -> Markdown:
    path, none = f"{RECORDS}/{name}", Markdown("-")
    base = record["base"]
    head = ["model", "perplexity", "KL mean (95 %)", "KL median", "KL p99", "same top token",
            "answers changed"]  # fmt: skip
    lines = [
        md(
            "{:,} tokens of held-out text ({}), against {}; KL in nats per token:",
            record["num_tokens"],
            link("record", path),
            base["name"],
        ),
        Markdown(""),
        row(head),
        rule(len(head)),
        row([base["name"], link(f"{base['perplexity']:.3f}", path), *[none] * 5]),
    ]
    for one in record["candidates"]:
        interval = one.get("kl_interval")
        spread = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        flips = one.get("flips")
        changed = (
            f"{flips['lost'] + flips['won'] + flips['changed_wrong']} of {flips['items']}: "
            f"{flips['lost']} lost, {flips['won']} won"
            if flips
            else NOT_MEASURED
        )
        median = one.get("kl_median")
        cells = [
            f"{one['name']}{' (declared)' if one['mode'] == 'declared' else ''}",
            link(f"{one['perplexity']:.3f}", path),
            f"{one['kl_mean']:.4f}{spread}",
            NOT_MEASURED if median is None else f"{median:.4f}",
            f"{one['kl_p99']:.4f}",
            f"{percent(one['top1_agreement'], 1)} %",
            changed,
        ]
        lines.append(row(cells))
    return join("\n", lines)


def _figures(given: CardInput, subject: str, words: Sequence[str]) -> Markdown:
    lines = []
    for name, record in given.figures.items():
        if any(word in name for word in words) and "results" in record:
            path = f"{RECORDS}/{name}"
            lines.append(md("- {} ({})", record.get("question", name), link("record", path)))
            lines += [
                md("  - {}: {}", key, link(value, path))
                for key, value in record["results"].items()
                if isinstance(value, int | float | str)
            ]
    if not lines:
        return md("{}: no record of {} was given.", _NOT_MEASURED, subject)
    return join("\n", lines)


def _limitations(given: CardInput) -> Markdown:
    lines = [Markdown(phrases.LIMITATIONS)]
    if given.checkpoint.note:
        note = given.checkpoint.note
        lines.append(md("{}.", note[0].upper() + note[1:]))
    arm = _candidate(given)
    absent = [
        title_of(n) for n in columns(given.arms)
        if arm is None or n not in arm.run.benchmarks or arm.run.benchmarks[n].score is None
    ]  # fmt: skip
    if absent:
        lines.append(md("Not measured for this checkpoint: {}.", ", ".join(absent)))
    if arm is not None:
        small = [
            f"{r.title} ({r.items} of {r.full_items} items)"
            for r in arm.run.benchmarks.values()
            if r.score is not None and r.items < r.full_items
        ]
        noted = [
            md("{}: {}.", r.title, r.provenance["note"])
            for r in arm.run.benchmarks.values()
            if r.score is not None and r.provenance.get("note")
        ]
        lines += noted
        if small:
            lines.append(md("Measured on a part only: {}.", ", ".join(small)))
    return join("\n\n", lines)


def _records(given: CardInput) -> Markdown:
    lines = [
        md("- {}: run {}", link(arm.run.arm, _path(given, arm)), arm.run.run_id)
        for arm in given.arms
    ]
    if given.comparison is not None:
        lines.append(md("- {}", link("comparison", f"{RECORDS}/{_COMPARISON}")))
    lines += [md("- {}", link(name, f"{RECORDS}/{name}")) for name in given.figures]
    return join("\n", lines) if lines else Markdown("None were given to this card.")
