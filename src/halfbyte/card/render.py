"""Fills `template.md`: a model card for the Hugging Face hub, and the records it links to.

Every figure carries a link to the record in the card's own folder; what no record covers is stated
as not measured. Text that is the same for every checkpoint is in `phrases`; all other text is put
into Markdown by `markdown.md`, which escapes it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from halfbyte.card import phrases
from halfbyte.card.about import (
    architecture_section,
    contact_section,
    input_section,
    languages_section,
    licence_section,
    makers_section,
    model_in_short,
    output_section,
    software_section,
    use_case_section,
    version_section,
)
from halfbyte.card.base import HUB_ID
from halfbyte.card.facts import (
    Arm,
    columns,
    require_own_records,
    title_of,
)
from halfbyte.card.given import (
    NOT_MEASURED,
    RECORDS,
    UNMEASURED,
    CardInput,
    base_link,
    candidate_of,
    is_hub_id,
    member_rows,
    record_names,
    record_path,
)
from halfbyte.card.making import (
    are_published,
    calibration_section,
    evaluation_data_section,
    quantization_section,
    usage_section,
)
from halfbyte.card.markdown import Markdown, join, link, md, one_line, row, rule
from halfbyte.card.measured import fidelity_section, speed_section
from halfbyte.card.published import published_figures, published_run, scrubbed
from halfbyte.errors import UsageError
from halfbyte.evals.judging.comparison import Comparison, write_comparison
from halfbyte.evals.judging.render import (
    level_text,
    margin_text,
    p_text,
    percent,
    points,
    undecided,
    unseen_lines,
    what_would_decide,
)
from halfbyte.evals.judging.stats import Estimate
from halfbyte.evals.tasks.suite import BENCHMARKS

_COMPARISON = "comparison.json"


def for_the_public(given: CardInput) -> CardInput:
    """The same input without hosts, paths, keys and answers in its records.

    Raises UsageError for a record of another checkpoint.
    """
    require_own_records(given.checkpoint, given.arms, given.figures)
    comparison = given.comparison
    if comparison is not None:
        # The answers inside are not published: they may repeat items that must not be.
        comparison = scrubbed(_without_answers(comparison))
    return replace(
        given,
        arms=[replace(arm, run=published_run(arm.run)) for arm in given.arms],
        comparison=comparison,
        figures={name: published_figures(record) for name, record in given.figures.items()},
    )


def write_card(out: Path, given: CardInput) -> Path:
    """Write OUT/README.md and OUT/evaluation/ with the records it links to; returns the card.

    Raises UsageError if two records would have one name there, or measured another checkpoint.
    """
    given = for_the_public(given)
    records = out / RECORDS
    files: dict[str, bytes] = {}
    for arm, name in zip(given.arms, record_names(given.arms), strict=True):
        files[name] = (json.dumps(asdict(arm.run), indent=1, ensure_ascii=False) + "\n").encode(
            "utf-8", "replace"
        )
    for name, figure in given.figures.items():
        if name in files or name == _COMPARISON:
            raise UsageError(f"--records: {name} is the name of a run's record; rename the file")
        files[name] = (json.dumps(figure, indent=1) + "\n").encode()
    card = _render(given).encode()
    _ensure_folder(records)
    for name, content in files.items():
        _write(records / name, content)
    if given.comparison is not None:
        _unlink(records / _COMPARISON)
        write_comparison(records / _COMPARISON, given.comparison)
    _write(out / "README.md", card)
    return out / "README.md"


def _ensure_folder(folder: Path) -> None:
    """Make the folder; UsageError if it is a link to elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link to {folder.resolve()}; the card writes beside itself")


def _write(path: Path, content: bytes) -> None:
    _unlink(path)
    path.write_bytes(content)


def _unlink(path: Path) -> None:
    """Remove a link at this place, so that a file is written here and not to the link's target."""
    if path.is_symlink():
        path.unlink()


def _without_answers(comparison: Comparison) -> Comparison:
    rows = {name: replace(one, flips=[]) for name, one in comparison.benchmarks.items()}
    return replace(comparison, benchmarks=rows)


def render_card(given: CardInput) -> str:
    """The card's text. Raises UsageError for a record of another checkpoint."""
    return _render(for_the_public(given))


def _render(given: CardInput) -> str:
    template = resources.files("halfbyte.card").joinpath("template.md").read_text()
    c = given.checkpoint
    title = one_line(given.title or c.folder)
    return md(
        template,
        metadata=Markdown(_metadata(given, title)),
        title=title,
        intro=_intro(given),
        description=_description(given),
        makers=makers_section(given),
        licence=licence_section(given),
        use_case=use_case_section(c),
        languages=languages_section(given),
        release_date=given.release_date or "Not stated.",
        architecture=architecture_section(c),
        input=input_section(c),
        output=output_section(c),
        software=software_section(given),
        version=version_section(given, title),
        training_data=Markdown(phrases.TRAINING_DATA),
        calibration=calibration_section(c),
        evaluation_data=evaluation_data_section(given),
        quantization=quantization_section(c),
        usage=usage_section(given, title),
        evaluation=_evaluation(given),
        speed=speed_section(given),
        fidelity=fidelity_section(given),
        limitations=_limitations(given),
        ethics=Markdown(phrases.ETHICS),
        contact=contact_section(given),
        records=_records(given),
    )


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
        block["license_name"] = one_line(given.licence_name or "base-model-licence")
        place = given.licence_link or given.checkpoint.licence_file
        if place:
            block["license_link"] = one_line(place)
    if given.base:
        block["base_model"] = one_line(given.base.name)
        block["base_model_relation"] = "quantized"
    if given.languages:
        block["language"] = [one_line(code) for code in given.languages]
    datasets = [str(m["dataset"]) for m in member_rows(given.checkpoint) if is_hub_id(m["dataset"])]
    if datasets:
        block["datasets"] = list(dict.fromkeys(datasets))
    arm = candidate_of(given)
    results = _model_index(given, arm) if arm else []
    if results:
        block["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True).strip()


def _model_index(given: CardInput, arm: Arm) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, result in arm.run.benchmarks.items():
        # A part of a set, or items that are not the set's, are no result of that set.
        is_whole = result.items == result.full_items and are_published(result)
        if result.score is None or result.status != "complete" or not is_whole:
            continue
        known = BENCHMARKS.get(name)
        source = (known.source if known else result.source).split(",")[0]
        if not HUB_ID.fullmatch(source):
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
            place = f"{one_line(given.repository)}/blob/main/{record_path(given, arm)}"
            url = f"https://huggingface.co/{place}"
            found[-1]["source"] = {"name": "halfbyte run record", "url": url}
    return found


def _intro(given: CardInput) -> Markdown:
    noted = given.checkpoint.note
    note = md("\n\n**Note: {}.**", noted) if noted else Markdown("")
    base = base_link(given)
    if given.comparison is None:
        found = md("{}: its difference to it", UNMEASURED)
        return md("A quantized version of {}. {}.{}", base, found, note)
    record = link("comparison", f"{RECORDS}/{_COMPARISON}")
    return md(
        "A quantized version of {}: {} ({}).{}", base, _finding(given.comparison), record, note
    )


def _finding(comparison: Comparison) -> str:
    """The verdict of the comparison in half a sentence."""
    rows = comparison.benchmarks.values()
    origins = {comparison.macro_margin_origin, *(row.margin_origin for row in rows)}
    margins = "margins given with the comparison" if "flag" in origins else (
        "margins fixed beforehand")  # fmt: skip
    if comparison.verdict == "GO":
        return f"no loss beyond the {margins} was found"
    if comparison.verdict == "NO-GO":
        return f"a loss beyond the {margins} was found"
    if comparison.reason == "blocked":
        return "the evaluation is not complete enough to say whether it loses accuracy"
    names = ", ".join(undecided(comparison))
    if comparison.reason == "loss shown":
        return f"it loses accuracy on {names}; whether beyond the {margins} was not shown"
    return f"the evaluation was too small to say whether it loses accuracy on {names}"


def _description(given: CardInput) -> Markdown:
    c = given.checkpoint
    counts: dict[str, int] = {}
    for chosen in c.quantization.formats.values():
        counts[chosen] = counts.get(chosen, 0) + 1
    stored = [f"{n} {'is' if n == 1 else 'are'} stored in {f.upper()}"
              for f, n in sorted(counts.items())]  # fmt: skip
    shares = " and ".join(stored)
    has_head = "head" in c.quantization.formats
    return md(
        "{}\n\nOf the decoder's {} linear layers{}, {}. The KV cache is stored in {}; embeddings"
        "{}{} keep bfloat16. The weight files take {:.3f} GB. They were written by "
        "halfbyte in the layout of NVIDIA Model Optimizer.",
        model_in_short(c),
        len(c.quantization.formats),
        ", the output head among them" if has_head else "",
        shares,
        c.quantization.kv_cache.upper(),
        " and norms" if has_head else ", norms and head",
        ", vision encoder and projector" if c.config.vision else "",
        c.weight_bytes / 1e9,
    )


def _evaluation(given: CardInput) -> Markdown:
    if not given.arms:
        return md("{}: no evaluation record was given to this card.", UNMEASURED)
    names = columns(given.arms)
    lines = [row(["precision", *(title_of(name) for name in names)]), rule(len(names) + 1)]
    lines += [
        row([link(arm.run.arm, record_path(given, arm)), *(_cell(arm, name) for name in names)])
        for arm in given.arms
    ]
    parts = [join("\n", lines), _settings(given), _shares(given)]
    if given.comparison is not None:
        parts.append(_comparison(given.comparison))
    return join("\n\n", parts)


def _cell(arm: Arm, name: str) -> Markdown:
    result = arm.run.benchmarks.get(name)
    if result is None or result.score is None:
        return Markdown(NOT_MEASURED)
    return md(
        "{} ({} to {})",
        percent(result.score),
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
        _judge(judge),
        link(arm.run.run_id, record_path(given, arm)),
    )


def _judge(judge: Mapping[str, Any] | None) -> Markdown:
    if judge is None:
        return Markdown("")
    revision = judge.get("revision")
    known = md("revision {}", revision) if revision and revision != "not stated" else (
        Markdown("its revision was not stated"))  # fmt: skip
    return md("; judged by {} ({})", judge.get("model"), known)


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
            name_of = link(arm.run.arm, record_path(given, arm))
            lines.append(row([r.title, name_of, r.repeats, cut, unread, len(r.missing)]))
    return _folded("How answers ended", join("\n", lines))


def _folded(title: str, text: Markdown) -> Markdown:
    """Fold text away until it is clicked; blank lines let the hub read Markdown inside."""
    return md("<details>\n<summary>{}</summary>\n\n{}\n\n</details>", title, text)


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
    margin = margin_text(comparison.macro_margin, comparison.macro_margin_origin)
    p = p_text(comparison.macro_p_beyond_holm)
    lines += [row(["macro mean", macro, p, margin, comparison.macro_verdict, none]), Markdown("")]
    lines += [md("- {}: {}", title_of(n), why) for n, why in comparison.left_out.items()]
    for one in comparison.benchmarks.values():
        lines += [md("- {}: {}", one.title, text) for text in (*one.stops, *one.remarks)]
    lines += [md("- {}", text) for text in (*unseen_lines(comparison), *comparison.remarks)]
    return join("\n", [*lines, Markdown(""), Markdown(phrases.VERDICTS)])


def _interval(found: Estimate, path: str) -> Markdown:
    low, high = points(found.low), points(found.high)
    return md("{} ({} to {})", link(points(found.mean), path), low, high)


def _limitations(given: CardInput) -> Markdown:
    lines = [Markdown(phrases.LIMITATIONS)]
    if given.checkpoint.note:
        note = given.checkpoint.note
        lines.append(md("{}.", note[0].upper() + note[1:]))
    arm = candidate_of(given)
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
        md("- {}: run {}", link(arm.run.arm, record_path(given, arm)), arm.run.run_id)
        for arm in given.arms
    ]
    if given.comparison is not None:
        lines.append(md("- {}", link("comparison", f"{RECORDS}/{_COMPARISON}")))
    lines += [md("- {}", link(name, f"{RECORDS}/{name}")) for name in given.figures]
    return join("\n", lines) if lines else Markdown("None were given to this card.")
