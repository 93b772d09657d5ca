"""Fills `template.md`: a model card for the Hugging Face hub, and the records it links to.

Every figure carries a link to the record in the card's own folder; what no record covers is stated
as not measured. Text that is the same for every checkpoint is in `phrases`; all other text is put
into Markdown by `markdown.md`, which escapes it.
"""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from halfbyte.card import phrases
from halfbyte.card.base import HUB_ID, Base
from halfbyte.card.facts import (
    MAX_MODEL_LEN,
    Arm,
    CheckpointFacts,
    columns,
    count_parameters,
    is_fidelity,
    require_own_records,
    speed_figures,
    title_of,
)
from halfbyte.card.markdown import Markdown, code, hub_link, join, link, md, one_line, row, rule
from halfbyte.card.published import published_figures, published_run, scrubbed
from halfbyte.errors import UsageError
from halfbyte.evals.judging.compare import Comparison, write_comparison
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
from halfbyte.evals.records import BenchmarkResult
from halfbyte.evals.tasks.suite import BENCHMARKS
from halfbyte.figures import Figure, Machine, Record

RECORDS = "evaluation"
NOT_MEASURED = "not measured"
_NOT_MEASURED = Markdown(NOT_MEASURED.capitalize())
_COMPARISON = "comparison.json"


@dataclass(frozen=True, slots=True)
class CardInput:
    """All a card is made of.

    base        the base model and what speaks for it
    licence_name, licence_link  for the licence "other"
    languages   codes of ISO 639, as the base model's card states them
    contact     address of a page or a mailbox
    figures     records of `halfbyte bench` and `halfbyte compare --json`, by file name
    repository  hub id under which the card will stand; the metadata's links need it
    """

    checkpoint: CheckpointFacts
    arms: Sequence[Arm]
    comparison: Comparison | None
    base: Base | None = None
    title: str | None = None
    licence: str = "other"
    licence_name: str | None = None
    licence_link: str | None = None
    languages: Sequence[str] = ()
    contact: str | None = None
    release_date: str | None = None
    repository: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


def for_the_public(given: CardInput) -> CardInput:
    """The same without hosts, paths, keys and answers in its records.

    Raises UsageError for a record of another checkpoint.
    """
    require_own_records(given.checkpoint, given.arms, given.figures)
    comparison = given.comparison
    if comparison is not None:
        # The answers inside stay at home: they may repeat items that must not be published.
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
        makers=_makers(given),
        licence=_licence(given),
        use_case=_use_case(c),
        languages=_languages(given),
        release_date=given.release_date or "Not stated.",
        architecture=_architecture(c),
        input=_input(c),
        output=_output(c),
        software=_software(given),
        version=_version(given, title),
        training_data=Markdown(phrases.TRAINING_DATA),
        calibration=_calibration(c),
        evaluation_data=_evaluation_data(given),
        quantization=_quantization(c),
        usage=_usage(given, title),
        evaluation=_evaluation(given),
        speed=_speed(given),
        fidelity=_fidelity(given),
        limitations=_limitations(given),
        ethics=Markdown(phrases.ETHICS),
        contact=_contact(given),
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
        block["license_name"] = one_line(given.licence_name or "base-model-licence")
        place = given.licence_link or given.checkpoint.licence_file
        if place:
            block["license_link"] = one_line(place)
    if given.base:
        block["base_model"] = one_line(given.base.name)
        block["base_model_relation"] = "quantized"
    if given.languages:
        block["language"] = [one_line(code) for code in given.languages]
    datasets = [str(m["dataset"]) for m in _members(given.checkpoint) if _is_hub_id(m["dataset"])]
    if datasets:
        block["datasets"] = list(dict.fromkeys(datasets))
    arm = _candidate(given)
    results = _model_index(given, arm) if arm else []
    if results:
        block["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True).strip()


def _model_index(given: CardInput, arm: Arm) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, result in arm.run.benchmarks.items():
        # A part of a set, or items that are not the set's, are no result of that set.
        is_whole = result.items == result.full_items and _which_items(result) == _PUBLISHED
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
            place = f"{one_line(given.repository)}/blob/main/{_path(given, arm)}"
            url = f"https://huggingface.co/{place}"
            found[-1]["source"] = {"name": "halfbyte run record", "url": url}
    return found


def _intro(given: CardInput) -> Markdown:
    noted = given.checkpoint.note
    note = md("\n\n**Note: {}.**", noted) if noted else Markdown("")
    base = _base_link(given)
    if given.comparison is None:
        found = md("{}: its difference to it", _NOT_MEASURED)
        return md("A quantized version of {}. {}.{}", base, found, note)
    record = link("comparison", f"{RECORDS}/{_COMPARISON}")
    return md(
        "A quantized version of {}: {} ({}).{}", base, _finding(given.comparison), record, note
    )


def _base_link(given: CardInput) -> Markdown:
    return hub_link(given.base.name) if given.base else Markdown("its source checkpoint")


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
    return md(
        "{}\n\nOf the decoder's {} linear layers, {}. The KV cache is stored in {}; embeddings, "
        "norms and head{} keep bfloat16. The weight files take {:.3f} GB. They were written by "
        "halfbyte in the layout of NVIDIA Model Optimizer.",
        _model_in_short(c),
        len(c.quantization.formats),
        shares,
        c.quantization.kv_cache.upper(),
        ", vision encoder and projector" if c.config.vision else "",
        c.weight_bytes / 1e9,
    )


def _model_in_short(c: CheckpointFacts) -> Markdown:
    reads = "text and images" if c.config.vision else "text"
    able = [] if c.chat is None else [
        *(["calls tools"] if c.chat.has_tools else []),
        *(["can reason before it answers"] if c.chat.has_thinking else []),
    ]  # fmt: skip
    also = f", {' and '.join(able)}" if able else ""
    return md(
        "A dense decoder-only transformer of {} parameters ({:,}). It reads {} and answers in "
        "text{}. Its context is {:,} tokens.",
        _rounded(count_parameters(c.config)),
        count_parameters(c.config),
        reads,
        also,
        c.config.text.max_positions,
    )


def _rounded(count: int) -> str:
    """A count as people say it: 135M, 8.03B, 128B."""
    unit, name = (1e9, "B") if count >= 1e9 else (1e6, "M")
    return f"{count / unit:.3g}{name}"


def _makers(given: CardInput) -> Markdown:
    if given.base is None:
        return Markdown(
            "The base model was not stated. Whoever made it did not make this quantization."
        )
    owner = given.base.name.partition("/")[0]
    publisher = (given.repository or "").partition("/")[0]
    if publisher == owner:
        return md("Base model: {}. {}", hub_link(given.base.name), given.base.proof)
    return md(
        "Base model: {}. {}\n\nThe base model is a work of third parties. {} did not make this "
        "quantization, does not maintain it and does not vouch for it; for the base model itself, "
        "see its own card.",
        hub_link(given.base.name),
        given.base.proof,
        owner,
    )


def _licence(given: CardInput) -> Markdown:
    base = _base_link(given)
    named = given.licence_name or given.licence
    place = given.licence_link or given.checkpoint.licence_file
    where = Markdown("")
    if place:
        # A bare address links to itself.
        where = md(" ({})", place if "://" in place else link(place, place))
    if given.licence == "other" and given.licence_name is None:
        stated = Markdown("Its name was not stated for this card")
    else:
        stated = md("It is {}{}", code(named), where)
    return md(
        "The licence of {} applies to these weights: quantization changes how they are stored, "
        "not whose they are. {}. Whether commercial use is allowed, it says.",
        base,
        stated,
    )


def _use_case(c: CheckpointFacts) -> Markdown:
    uses = ["chat assistants", "code", "other text generation that the base model is made for"]
    if c.config.vision:
        uses.insert(1, "questions about images")
    if c.chat is not None and c.chat.has_tools:
        uses.insert(1, "agents that call tools")
    if c.config.text.max_positions >= 32_768:
        uses.insert(-1, f"work on documents of up to {c.config.text.max_positions:,} tokens")
    return md(
        "Developers who want to run the base model with less memory: {} and {}.",
        ", ".join(uses[:-1]),
        uses[-1],
    )


def _languages(given: CardInput) -> Markdown:
    if not given.languages:
        return Markdown("Those of the base model; its own card names them.")
    return md(
        "{}, as the base model's card states them. Calibration may favour the languages of its "
        "texts.",
        ", ".join(given.languages),
    )


def _output(c: CheckpointFacts) -> Markdown:
    other = "none" if c.chat is None else " and ".join(
        [*(["reasoning"] if c.chat.has_thinking else []),
         *(["tool calls"] if c.chat.has_tools else [])]
    ) or "none"  # fmt: skip
    return md(
        "- **Types:** text\n- **Format:** chat completions, streamed or whole\n"
        "- **Parameters:** text (1D)\n- **Beside text:** {}",
        other,
    )


def _software(given: CardInput) -> Markdown:
    """Where it ran, from the records: nothing else is known to work."""
    made = given.checkpoint.made_of.get("versions", {})
    lines = [
        md("- **Written by:** {}", _versions(made) or "a version that was not recorded"),
        Markdown(
            "- **Runtimes:** halfbyte; vLLM by the command below, and other servers that read "
            "NVIDIA Model Optimizer's checkpoint layout"
        ),
    ]
    ran = _tested(given)
    lines += ran or [md("- **Tested on:** {}, as no record names a machine", NOT_MEASURED)]
    lines.append(Markdown("- **Operating system:** Linux"))
    return join("\n\n", [join("\n", lines), Markdown(phrases.SOFTWARE)])


def _tested(given: CardInput) -> list[Markdown]:
    lines = []
    arm = _candidate(given)
    if arm is not None:
        health = arm.run.server.get("health") or {}
        engine = f"halfbyte {health['version']}" if "version" in health else "not recorded"
        device = health.get("engine_device", "not recorded")
        text = "- **Evaluated with:** server {}, device {} ({})"
        lines.append(md(text, engine, device, link("record", _path(given, arm))))
    for name, record, _ in _speed_records(given):
        text = "- **Speed measured on:** {}; {} ({})"
        found = link("record", f"{RECORDS}/{name}")
        versions = _versions(record.machine.versions)
        lines.append(md(text, _hardware(record.machine), versions, found))
    return lines


def _versions(found: object) -> str:
    if not isinstance(found, Mapping):
        return ""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _hardware(machine: Machine) -> str:
    if machine.gpu is not None:
        return f"{machine.gpu}, CUDA {machine.cuda or 'not recorded'}"
    cores = "cores not recorded" if machine.cores is None else f"{machine.cores} cores"
    return f"{machine.processor or 'processor not recorded'}, {cores}"


def _contact(given: CardInput) -> Markdown:
    if given.contact:
        return md(
            "Questions, concerns and security problems of this quantization: {}.", given.contact
        )
    return Markdown("None was given; the discussions of the repository are open to all.")


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


def _members(c: CheckpointFacts) -> list[Mapping[str, Any]]:
    """Sources of the calibration blend, as the manifest records them."""
    provenance = (c.made_of.get("calibration") or {}).get("provenance") or {}
    return [m for m in provenance.get("members") or [] if isinstance(m, Mapping) and "dataset" in m]


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None


def _calibration(c: CheckpointFacts) -> Markdown:
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
    members = _members(c)
    if members:
        lines += [Markdown(""), row(["source", "revision", "samples", "tokens"]), rule(4)]
        for m in members:
            source = hub_link(m["dataset"], "datasets/") if _is_hub_id(m["dataset"]) else scrubbed(
                str(m.get("name", "a local file")))  # fmt: skip
            cells = [m.get("revision") or "-", m.get("taken_rows", "-"), m.get("num_tokens", "-")]
            lines.append(row([source, *cells]))
        lines += [Markdown(""), Markdown("Each source has a licence of its own.")]
    return join("\n", lines)


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
        revision = r.provenance.get("revision") or "by hash, see the record"
        which = _which_items(r)
        part = "" if r.items == r.full_items else "a part of the set; "
        shown = which if which == _PUBLISHED else md("**{}**", which)
        read = md("{}: {}{}", r.source, part, shown)
        scored = link(f"{r.items} of {r.full_items}", _path(given, arm))
        lines.append(row([r.title, read, r.licence, scored, revision]))
    return join("\n", lines)


_PUBLISHED = "the published items"
# Their items, or what decides on a right answer, are compared with a hash of the published ones.
_BY_CONTENT = ("ifbench", "scicode", "pocket")


def _which_items(result: BenchmarkResult) -> str:
    """Whether the items are those that the set's authors published, in half a sentence."""
    note = result.provenance.get("note")
    if note:
        return str(note)
    pinned = result.provenance.get("revision") is not None or result.provenance.get("checked")
    if pinned or result.name in _BY_CONTENT:
        return _PUBLISHED
    return "a local copy, not compared with the published items"


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


def _usage(given: CardInput, title: str) -> Markdown:
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


def _evaluation(given: CardInput) -> Markdown:
    if not given.arms:
        return md("{}: no evaluation record was given to this card.", _NOT_MEASURED)
    names = columns(given.arms)
    lines = [row(["precision", *(title_of(name) for name in names)]), rule(len(names) + 1)]
    lines += [
        row([link(arm.run.arm, _path(given, arm)), *(_cell(arm, name) for name in names)])
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
        link(arm.run.run_id, _path(given, arm)),
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
            name_of = link(arm.run.arm, _path(given, arm))
            lines.append(row([r.title, name_of, r.repeats, cut, unread, len(r.missing)]))
    return _folded("How answers ended", join("\n", lines))


def _folded(title: str, text: Markdown) -> Markdown:
    """Shown when it is clicked; the blank lines let the hub read Markdown inside."""
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
    """Tables of `halfbyte compare --json`."""
    parts = [
        _fidelity_table(name, record, given.checkpoint.identity)
        for name, record in given.figures.items()
        if is_fidelity(record)
    ]
    if not parts:
        return md("{}: no record of fidelity was given.", _NOT_MEASURED)
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


def _speed(given: CardInput) -> Markdown:
    """A table for each record: what was measured, under what, how much and against what."""
    parts, none = [], Markdown("-")
    for name, record, figures in _speed_records(given):
        found = link("record", f"{RECORDS}/{name}")
        lines = [
            md(
                "Measured on {} by {} ({}):", _hardware(record.machine), code(record.command), found
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
        return md("{}: no record of speed was given.", _NOT_MEASURED)
    return join("\n\n", [*parts, Markdown(phrases.SPEED)])


def _speed_records(given: CardInput) -> Iterator[tuple[str, Record, list[Figure]]]:
    """File name, record and figures of every record of speed."""
    for name, raw in given.figures.items():
        if not is_fidelity(raw):
            record, figures = speed_figures(name, raw)
            if figures:
                yield name, record, figures


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
