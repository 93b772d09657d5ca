"""Sections of a card about how the checkpoint was made and is served."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

from halfbyte.card import phrases
from halfbyte.card.facts import (
    MAX_MODEL_LEN,
    CheckpointFacts,
    columns,
)
from halfbyte.card.given import (
    NOT_MEASURED,
    UNMEASURED,
    CardInput,
    candidate_of,
    is_hub_id,
    member_rows,
    record_path,
)
from halfbyte.card.markdown import Markdown, code, hub_link, join, link, md, one_line, row, rule
from halfbyte.card.published import scrubbed
from halfbyte.evals.records import BenchmarkResult
from halfbyte.evals.tasks.suite import BENCHMARKS


def calibration_section(c: CheckpointFacts) -> Markdown:
    """A section on the text on which the checkpoint was calibrated."""
    found = c.made_of.get("calibration")
    if not found:
        return Markdown("Not recorded in the checkpoint's manifest.")
    blend = (found.get("provenance") or {}).get("blend")
    named = md("Blend {}: ", code(blend)) if blend else Markdown("")
    lines = [
        md(
            "{0}{1[rows]:,} samples, {1[tokens]:,} tokens, the longest {1[longest]:,}; sha256 of "
            "the rows {2}. The whole record stands in "
            "[halfbyte-manifest.json](halfbyte-manifest.json).",
            named,
            found,
            code(found["sha256"][:16]),
        )
    ]
    members = member_rows(c)
    if members:
        lines += [Markdown(""), row(["source", "revision", "samples", "tokens"]), rule(4)]
        for m in members:
            source = hub_link(m["dataset"], "datasets/") if is_hub_id(m["dataset"]) else scrubbed(
                str(m.get("name", "a local file")))  # fmt: skip
            cells = [m.get("revision") or "-", m.get("taken_rows", "-"), m.get("num_tokens", "-")]
            lines.append(row([source, *cells]))
        lines += [Markdown(""), Markdown("Each source has a licence of its own.")]
    return join("\n", lines)


def evaluation_data_section(given: CardInput) -> Markdown:
    """A section on the items on which the checkpoint was evaluated."""
    arm = candidate_of(given)
    if arm is None:
        return md("{}.", UNMEASURED)
    lines = [row(["benchmark", "set", "licence", "items scored", "revision"]), rule(5)]
    for name in columns(given.arms):
        r = arm.run.benchmarks.get(name)
        if r is None or r.score is None:
            known = BENCHMARKS.get(name)
            said = (known.title, known.source, known.licence) if known else (name, "-", "-")
            lines.append(row([*said, NOT_MEASURED, Markdown("-")]))
            continue
        revision = r.provenance.get("revision") or "by hash, see the record"
        part = "" if r.items == r.full_items else "a part of the set; "
        shown = md("{}" if are_published(r) else "**{}**", which_items(r))
        read = md("{}: {}{}", r.source, part, shown)
        scored = link(f"{r.items} of {r.full_items}", record_path(given, arm))
        lines.append(row([r.title, read, r.licence, scored, revision]))
    return join("\n", lines)


PUBLISHED = "the published items"


# Their items, or what decides on a right answer, are compared with a hash of the published ones.
_BY_CONTENT = ("ifbench", "scicode", "quick")


def are_published(result: BenchmarkResult) -> bool:
    """Whether nothing says that the items are others than those that the set's authors published.

    A revision or version says which they are; otherwise they were compared by content.
    """
    p = result.provenance
    known = p.get("revision") is not None or p.get("checked") or result.name in _BY_CONTENT
    return bool(known) and not p.get("note")


def which_items(result: BenchmarkResult) -> str:
    """Whose the items are, in half a sentence."""
    p = result.provenance
    if p.get("note"):
        return str(p["note"])
    if not are_published(result):
        return "a local copy, not compared with the published items"
    checked = p.get("checked")
    return f"the published items, compared by content ({checked})" if checked else PUBLISHED


def quantization_section(c: CheckpointFacts) -> Markdown:
    """Who has which format, from the checkpoint itself."""
    lines, none = [row(["part", "format", "layers", "linears"]), rule(4)], Markdown("-")
    for group, counts in c.formats.items():
        for chosen, count in sorted(counts.items()):
            layers = c.layers_by_format[f"{group} {chosen}"]
            lines.append(row([group, chosen.upper(), layers, count]))
    lines.append(row(["KV cache", c.quantization.kv_cache.upper(), "all", none]))
    head = "" if "head" in c.formats else ", head"
    kept = f"embeddings, norms{head}" + (", vision, projector" if c.config.vision else "")
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


def usage_section(given: CardInput, title: str) -> Markdown:
    """Commands for a shell; a title that means something to one is quoted."""
    c = given.checkpoint
    asked = {"model": title, "messages": [{"role": "user", "content": "Hello"}], **c.sampling}
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    folder, place = ".", "in the folder of this checkpoint"
    if given.repository:
        name = one_line(given.repository)
        folder = shlex.quote(name.rpartition("/")[2])
        place = f"after {code(f'hf download {shlex.quote(name)} --local-dir {folder}')}"
    length = str(min(MAX_MODEL_LEN, c.config.text.max_positions))
    words = {"FROM": place, "FOLDER": folder, "LENGTH": length, "BODY": body,
             "TITLE": shlex.quote(title)}  # fmt: skip
    filled = re.sub("|".join(words), lambda found: words[found.group()], phrases.USAGE)
    commands = Markdown(filled)
    return join("\n\n", [_sampling(c), commands, *_vllm(given, title)])


def _sampling(c: CheckpointFacts) -> Markdown:
    if not c.sampling:
        text = "Recommended sampling: the checkpoint's generation_config.json names none."
    else:
        values = ", ".join(f"{name} {value:g}" for name, value in c.sampling.items())
        text = f"Recommended sampling (generation_config.json): {values}."
    efforts = () if c.chat is None else c.chat.efforts
    if efforts:
        text += f" Reasoning efforts: {', '.join(efforts)}."
    return md("{}", text)


# Flags of our own server in front of vLLM; whoever starts vLLM alone needs none of them.
_BEHIND_OURS = ("host", "generation-config", "enable-prompt-tokens-details",
                "disable-uvicorn-access-log")  # fmt: skip


def _vllm(given: CardInput, title: str) -> list[Markdown]:
    plan = given.checkpoint.vllm
    if plan is None:
        return []
    flags = {name: value for name, value in plan.flags.items() if name not in _BEHIND_OURS}
    place = Path(one_line(given.repository)) if given.repository else Path()
    plan = replace(plan, directory=place, flags={**flags, "served-model-name": title})
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", plan.shell())), default=0))
    lines = [
        Markdown("With vLLM:"),
        Markdown(f"{fence}sh\n{plan.shell()}\n{fence}"),
        Markdown(phrases.VLLM_UNTRIED),
    ]
    return [*lines, *(md("Note: {}.", warning) for warning in plan.warnings)]
