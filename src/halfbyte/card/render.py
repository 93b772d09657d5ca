"""Fills `template.md`: a model card for the Hugging Face hub, and the records it links to.

Every figure carries a link to the record in the card's own folder; what no record covers is stated
as not measured. Text that is the same for every checkpoint is in `phrases`.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from halfbyte.card import phrases
from halfbyte.card.facts import Arm, CheckpointFacts, columns, is_fidelity, title_of
from halfbyte.evals.compare import Comparison, write_comparison
from halfbyte.evals.records import newest
from halfbyte.evals.render import percent, points, what_would_decide
from halfbyte.evals.tasks.suite import BENCHMARKS

RECORDS = "evaluation"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NOT_MEASURED = "not measured"


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
    """Write OUT/README.md and OUT/evaluation/ with the records it links to; returns the card."""
    records = out / RECORDS
    records.mkdir(parents=True, exist_ok=True)
    for arm in given.arms:
        source = newest(arm.folder, "run", "json")
        assert source is not None, arm.folder
        shutil.copyfile(source, records / f"{arm.run.arm}.run.json")
    if given.comparison is not None:
        # The answers inside stay at home: they may repeat items that must not be published.
        write_comparison(records / "comparison.json", _without_answers(given.comparison))
    for name, figure in given.figures.items():
        (records / name).write_text(json.dumps(figure, indent=1) + "\n", encoding="utf-8")
    card = out / "README.md"
    card.write_text(render_card(given), encoding="utf-8")
    return card


def _without_answers(comparison: Comparison) -> Comparison:
    rows = {}
    for name, row in comparison.benchmarks.items():
        values = {f: getattr(row, f) for f in type(row).__dataclass_fields__}
        values["flips"] = []
        rows[name] = type(row)(**values)
    values = {f: getattr(comparison, f) for f in Comparison.__dataclass_fields__}
    values["benchmarks"] = rows
    return Comparison(**values)


def render_card(given: CardInput) -> str:
    """The card's text."""
    template = resources.files("halfbyte.card").joinpath("template.md").read_text()
    c = given.checkpoint
    title = given.title or c.folder
    return template.format(
        metadata=_metadata(given, title),
        title=title,
        intro=_intro(given),
        description=_description(given),
        licence=_licence(given),
        use_case=phrases.USE_CASE,
        release_date=given.release_date or "Not stated.",
        architecture=_architecture(c),
        input=_input(c),
        output=phrases.OUTPUT,
        software=phrases.SOFTWARE,
        version=_version(given, title),
        training_data=phrases.TRAINING_DATA,
        calibration=_calibration(c),
        evaluation_data=_evaluation_data(given),
        quantization=_quantization(c),
        usage=_usage(c, title),
        evaluation=_evaluation(given),
        speed=_figures(given, "speed", ("engine", "serving", "kernels", "latency", "speed")),
        fidelity=_fidelity(given),
        limitations=_limitations(given),
        ethics=phrases.ETHICS,
        records=_records(given),
    )


def _candidate(given: CardInput) -> Arm | None:
    return given.arms[-1] if given.arms else None


def _link(arm: Arm) -> str:
    return f"{RECORDS}/{arm.run.arm}.run.json"


def _metadata(given: CardInput, title: str) -> str:
    """The YAML block that the hub reads; results only where a score stands in a record."""
    tags = ["quantized", "fp8", "modelopt", "text-generation", "halfbyte"]
    if "nvfp4" in given.checkpoint.quantization.formats.values():
        tags.insert(1, "nvfp4")
    vision = given.checkpoint.config.vision is not None
    block: dict[str, Any] = {
        "license": given.licence,
        "library_name": "halfbyte",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": tags,
    }
    if given.licence == "other":
        block["license_name"] = "base-model-licence"
        if given.licence_link:
            block["license_link"] = given.licence_link
    if given.base_model:
        block["base_model"] = given.base_model
        block["base_model_relation"] = "quantized"
    arm = _candidate(given)
    results = _model_index(arm, given.repository) if arm else []
    if results:
        block["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True).strip()


def _model_index(arm: Arm, repository: str | None) -> list[dict[str, Any]]:
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
                "dataset": {"type": source, "name": result.title, "split": "test"},
                "metrics": [
                    {
                        "type": "accuracy",
                        "name": result.scorer,
                        "value": round(100 * result.score, 2),
                        "verified": False,
                    }
                ],
            }
        )
        if repository:
            url = f"https://huggingface.co/{repository}/blob/main/{_link(arm)}"
            found[-1]["source"] = {"name": "halfbyte run record", "url": url}
    return found


def _intro(given: CardInput) -> str:
    note = f"\n\n**Note: {given.checkpoint.note}.**" if given.checkpoint.note else ""
    base = given.base_model or "its source checkpoint"
    if given.comparison is None:
        return (
            f"A quantized version of {base}. {NOT_MEASURED.capitalize()}: its difference to it."
            f"{note}"
        )
    word = {
        "GO": "no loss beyond the margins fixed beforehand was found",
        "NO-GO": "a loss beyond the margins fixed beforehand was found",
        "INCONCLUSIVE": "the evaluation was too small to say whether it loses accuracy",
    }[given.comparison.verdict]
    return f"A quantized version of {base}: {word} ([comparison]({RECORDS}/comparison.json)).{note}"


def _description(given: CardInput) -> str:
    c = given.checkpoint
    counts: dict[str, int] = {}
    for chosen in c.quantization.formats.values():
        counts[chosen] = counts.get(chosen, 0) + 1
    shares = ", ".join(f"{count} in {name.upper()}" for name, count in sorted(counts.items()))
    return (
        f"The decoder's {len(c.quantization.formats)} linear layers are stored {shares}; the "
        f"KV cache is {c.quantization.kv_cache.upper()}; embeddings, norms, head"
        f"{', vision encoder and projector' if c.config.vision else ''} keep bfloat16. "
        f"The weight files take {c.weight_bytes / 1e9:.3f} GB. Written by halfbyte in the layout "
        "of NVIDIA Model Optimizer, readable by servers that read that layout."
    )


def _licence(given: CardInput) -> str:
    base = given.base_model or "the base model"
    return (
        f"The terms of {base} apply to these weights: quantization changes how they are stored, "
        f"not whose they are. Identifier in the metadata: `{given.licence}`."
    )


def _architecture(c: CheckpointFacts) -> str:
    t = c.config.text
    lines = [
        "- **Type:** transformer, decoder-only",
        f"- **Decoder:** {t.num_layers} layers, width {t.width}, MLP width {t.mlp_width}, "
        f"{t.num_heads} query and {t.num_kv_heads} key/value heads of {t.head_dim}",
        f"- **Vocabulary:** {t.vocab_size:,} tokens",
        f"- **Positions:** {t.max_positions:,}, rotary ({t.rope.kind}, theta {t.rope.theta:g})",
    ]
    if c.config.vision is not None:
        v = c.config.vision
        lines.append(
            f"- **Vision encoder:** {v.num_layers} layers, width {v.width}, patches of "
            f"{v.patch_size} pixels, images up to {v.image_size}"
        )
    return "\n".join(lines)


def _input(c: CheckpointFacts) -> str:
    kinds = "Text and images" if c.config.vision else "Text"
    shape = "one-dimensional text, two-dimensional RGB images" if c.config.vision else "text (1D)"
    return (
        f"- **Types:** {kinds.lower()}\n- **Format:** chat messages over the OpenAI protocol\n"
        f"- **Parameters:** {shape}\n"
        f"- **Other:** prompt and answer together at most {c.config.text.max_positions:,} tokens"
    )


def _version(given: CardInput, title: str) -> str:
    made = given.checkpoint.made_of
    recipe = made.get("recipe", {}).get("name", "unknown recipe")
    return f"{title}, recipe `{recipe}`, scale rules `{made.get('profile', 'not recorded')}`."


def _calibration(c: CheckpointFacts) -> str:
    found = c.made_of.get("calibration")
    if not found:
        return "Not recorded in the checkpoint's manifest."
    return (
        f"{found['rows']:,} samples, {found['tokens']:,} tokens, the longest {found['longest']:,}; "
        f"sha256 of the rows `{found['sha256'][:16]}` "
        "([halfbyte-manifest.json](halfbyte-manifest.json) names the rest). The data sets behind "
        "them and their licences are those of the calibration blend."
    )


def _evaluation_data(given: CardInput) -> str:
    arm = _candidate(given)
    if arm is None:
        return NOT_MEASURED.capitalize() + "."
    lines = ["| benchmark | set | licence | items scored | revision |", "|---|---|---|---|---|"]
    for name in columns(given.arms):
        r = arm.run.benchmarks.get(name)
        if r is None or r.score is None:
            known = BENCHMARKS[name]
            lines.append(
                f"| {known.title} | {known.source} | {known.licence} | {NOT_MEASURED} | - |"
            )
            continue
        origin = r.provenance.get("source", "")
        revision = r.provenance.get("revision") or "by hash, see the record"
        note = r.provenance.get("note")
        warning = f"; **{note}**" if note else ""
        lines.append(
            f"| {r.title} | {r.source} (read from {origin}){warning} | {r.licence} | "
            f"[{r.items} of {r.full_items}]({_link(arm)}) | {revision} |"
        )
    return "\n".join(lines)


def _quantization(c: CheckpointFacts) -> str:
    """Who has which format, from the checkpoint itself."""
    lines = ["| part | format | layers | linears |", "|---|---|---|---|"]
    for group, row in c.formats.items():
        for chosen, count in sorted(row.items()):
            layers = c.layers_by_format[f"{group} {chosen}"]
            lines.append(f"| {group} | {chosen.upper()} | {layers} | {count} |")
    lines.append(f"| KV cache | {c.quantization.kv_cache.upper()} | all | - |")
    kept = "embeddings, norms, head" + (", vision, projector" if c.config.vision else "")
    lines.append(f"| {kept} | BF16 | - | - |")
    scales = c.made_of.get("recipe", {}).get("scales", {})
    text = phrases.FORMATS
    if scales:
        text += (
            f" Scales: weights by {scales.get('weights')}, activations by "
            f"{scales.get('activations')} over the calibration data."
        )
    return "\n".join([*lines, "", text])


def _usage(c: CheckpointFacts, title: str) -> str:
    return phrases.USAGE.replace("TITLE", title).replace(
        "LENGTH", str(min(196_608, c.config.text.max_positions))
    )


def _evaluation(given: CardInput) -> str:
    if not given.arms:
        return f"{NOT_MEASURED.capitalize()}: no evaluation record was given to this card."
    names = columns(given.arms)
    lines = [
        "| precision | " + " | ".join(title_of(name) for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [
        f"| {arm.run.arm} | " + " | ".join(_cell(arm, name) for name in names) + " |"
        for arm in given.arms
    ]
    parts = ["\n".join(lines), _settings(given.arms[-1]), _shares(given)]
    if given.comparison is not None:
        parts.append(_comparison(given.comparison))
    return "\n\n".join(parts)


def _cell(arm: Arm, name: str) -> str:
    result = arm.run.benchmarks.get(name)
    if result is None or result.score is None:
        return NOT_MEASURED
    return (
        f"[{percent(result.score)}]({_link(arm)}) "
        f"({percent(result.low, 1)} to {percent(result.high, 1)})"
    )


def _settings(arm: Arm) -> str:
    s = arm.run.settings
    judge = (
        f"; judge {arm.run.judge['model']} ({arm.run.judge['revision']})" if arm.run.judge else ""
    )
    return (
        "Accuracy in percent with its 95 % interval over items; truncated, unextracted, empty and "
        f"refused answers count as wrong. temperature {s['temperature']}, top_p {s['top_p']}, "
        f"reasoning effort {s['reasoning_effort'] or 'not sent'}, at most {s['max_tokens']:,} "
        f"output tokens{judge}. All settings, prompts' hashes and versions: "
        f"[{arm.run.run_id}]({_link(arm)})."
    )


def _shares(given: CardInput) -> str:
    lines = [
        "| benchmark | arm | repeats | truncated | unextracted | not scored |",
        "|---" * 6 + "|",
    ]
    for name in columns(given.arms):
        for arm in given.arms:
            r = arm.run.benchmarks.get(name)
            if r is None or not r.causes:
                continue
            lines.append(
                f"| {r.title} | {arm.run.arm} | {r.repeats} | "
                f"[{percent(r.metrics.get('length_share'), 1)} %]({_link(arm)}) | "
                f"{percent(r.metrics.get('unparsed_share'), 1)} % | {len(r.missing)} |"
            )
    return "\n".join(lines)


def _comparison(comparison: Comparison) -> str:
    link = f"{RECORDS}/comparison.json"
    lines = [
        f"Difference, {comparison.candidate} minus {comparison.baseline}, paired by item, in "
        f"points ([record]({link})):",
        "",
        "| benchmark | difference (95 %) | margin | verdict | what would decide |",
        "|---|---|---|---|---|",
    ]
    for row in comparison.benchmarks.values():
        d = row.difference
        lines.append(
            f"| {row.title} | [{points(d.mean)}]({link}) ({points(d.low, 1)} to "
            f"{points(d.high, 1)}) | {percent(row.margin, 1)} | {row.verdict} | "
            f"{what_would_decide(row) or '-'} |"
        )
    m = comparison.macro
    lines.append(
        f"| macro mean | [{points(m.mean)}]({link}) ({points(m.low, 1)} to {points(m.high, 1)}) | "
        f"{percent(comparison.macro_margin, 1)} | {comparison.macro_verdict} | - |"
    )
    lines += [""] + [f"- {title_of(n)}: {why}" for n, why in comparison.left_out.items()]
    lines += [f"- {text}" for text in comparison.remarks]
    return "\n".join([*lines, "", phrases.VERDICTS])


def _fidelity(given: CardInput) -> str:
    """Tables of `halfbyte compare --json`, then other records of the subject."""
    parts = [
        _fidelity_table(name, record)
        for name, record in given.figures.items()
        if is_fidelity(record)
    ]
    listed = _figures(given, "fidelity", ("fidelity", "compare", "demo"))
    if not parts:
        return listed
    if not listed.startswith(NOT_MEASURED.capitalize()):
        parts.append(listed)
    return "\n\n".join([*parts, phrases.FIDELITY])


def _fidelity_table(name: str, record: Mapping[str, Any]) -> str:
    link = f"{RECORDS}/{name}"
    base = record["base"]
    lines = [
        f"{record['num_tokens']:,} tokens of held-out text ([record]({link})), against "
        f"{base['name']}; KL in nats per token:",
        "",
        "| model | perplexity | KL mean (95 %) | KL median | KL p99 | same top token | "
        "answers changed |",
        "|---" * 7 + "|",
        f"| {base['name']} | [{base['perplexity']:.3f}]({link}) | - | - | - | - | - |",
    ]
    for row in record["candidates"]:
        interval = row.get("kl_interval")
        spread = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        flips = row.get("flips")
        changed = (
            f"{flips['lost'] + flips['won'] + flips['changed_wrong']} of {flips['items']}: "
            f"{flips['lost']} lost, {flips['won']} won"
            if flips
            else NOT_MEASURED
        )
        median = row.get("kl_median")
        lines.append(
            f"| {row['name']}{' (declared)' if row['mode'] == 'declared' else ''} | "
            f"[{row['perplexity']:.3f}]({link}) | {row['kl_mean']:.4f}{spread} | "
            f"{NOT_MEASURED if median is None else f'{median:.4f}'} | {row['kl_p99']:.4f} | "
            f"{percent(row['top1_agreement'], 1)} % | {changed} |"
        )
    return "\n".join(lines)


def _figures(given: CardInput, subject: str, words: Sequence[str]) -> str:
    lines = []
    for name, record in given.figures.items():
        if any(word in name for word in words) and "results" in record:
            lines.append(f"- {record.get('question', name)} ([record]({RECORDS}/{name}))")
            lines += [
                f"  - {key}: [{value}]({RECORDS}/{name})"
                for key, value in record["results"].items()
                if isinstance(value, int | float | str)
            ]
    return "\n".join(lines) or f"{NOT_MEASURED.capitalize()}: no record of {subject} was given."


def _limitations(given: CardInput) -> str:
    lines = [phrases.LIMITATIONS]
    if given.checkpoint.note:
        lines.append(f"{given.checkpoint.note[0].upper()}{given.checkpoint.note[1:]}.")
    arm = _candidate(given)
    absent = [
        title_of(n) for n in columns(given.arms)
        if arm is None or n not in arm.run.benchmarks or arm.run.benchmarks[n].score is None
    ]  # fmt: skip
    if absent:
        lines.append(f"Not measured for this checkpoint: {', '.join(absent)}.")
    if arm is not None:
        small = [
            f"{r.title} ({r.items} of {r.full_items} items)"
            for r in arm.run.benchmarks.values()
            if r.score is not None and r.items < r.full_items
        ]
        noted = [
            f"{r.title}: {r.provenance['note']}."
            for r in arm.run.benchmarks.values()
            if r.score is not None and r.provenance.get("note")
        ]
        lines += noted
        if small:
            lines.append(f"Measured on a part only: {', '.join(small)}.")
    return "\n\n".join(lines)


def _records(given: CardInput) -> str:
    lines = [f"- [{arm.run.arm}]({_link(arm)}): run {arm.run.run_id}" for arm in given.arms]
    if given.comparison is not None:
        lines.append(f"- [comparison]({RECORDS}/comparison.json)")
    lines += [f"- [{name}]({RECORDS}/{name})" for name in given.figures]
    return "\n".join(lines) or "None were given to this card."
