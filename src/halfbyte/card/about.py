"""Sections of a card about the model: who made it, for what, on what it runs."""

from collections.abc import Mapping

from halfbyte.card import phrases
from halfbyte.card.facts import (
    CheckpointFacts,
    count_parameters,
)
from halfbyte.card.given import (
    NOT_MEASURED,
    RECORDS,
    CardInput,
    base_link,
    candidate_of,
    record_path,
    speed_records,
)
from halfbyte.card.markdown import Markdown, code, hub_link, join, link, md
from halfbyte.figures import Machine


def model_in_short(c: CheckpointFacts) -> Markdown:
    """One paragraph on what the model is, reads and can do."""
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


def makers_section(given: CardInput) -> Markdown:
    """Who made the base model and who quantized it."""
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


def licence_section(given: CardInput) -> Markdown:
    """Under which terms the checkpoint may be used."""
    base = base_link(given)
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
        "not whose they are. {}. Read there whether commercial use is allowed.",
        base,
        stated,
    )


def use_case_section(c: CheckpointFacts) -> Markdown:
    """A section on what the model is meant for."""
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


def languages_section(given: CardInput) -> Markdown:
    """A section on the languages that the model speaks."""
    if not given.languages:
        return Markdown("Those of the base model; its own card names them.")
    return md(
        "{}, as the base model's card states them. Calibration may favour the languages of its "
        "texts.",
        ", ".join(given.languages),
    )


def output_section(c: CheckpointFacts) -> Markdown:
    """A section on what the model writes: types, format, parameters."""
    other = "none" if c.chat is None else " and ".join(
        [*(["reasoning"] if c.chat.has_thinking else []),
         *(["tool calls"] if c.chat.has_tools else [])]
    ) or "none"  # fmt: skip
    return md(
        "- **Types:** text\n- **Format:** chat completions, streamed or whole\n"
        "- **Parameters:** text (1D)\n- **Beside text:** {}",
        other,
    )


def software_section(given: CardInput) -> Markdown:
    """A section on where the checkpoint ran, from the records: nothing else is known to work."""
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
    arm = candidate_of(given)
    if arm is not None:
        health = arm.run.server.get("health") or {}
        engine = f"halfbyte {health['version']}" if "version" in health else "not recorded"
        device = health.get("engine_device", "not recorded")
        text = "- **Evaluated with:** server {}, device {} ({})"
        lines.append(md(text, engine, device, link("record", record_path(given, arm))))
    for name, record, _ in speed_records(given):
        text = "- **Speed measured on:** {}; {} ({})"
        found = link("record", f"{RECORDS}/{name}")
        versions = _versions(record.machine.versions)
        lines.append(md(text, hardware_section(record.machine), versions, found))
    return lines


def _versions(found: object) -> str:
    if not isinstance(found, Mapping):
        return ""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def hardware_section(machine: Machine) -> str:
    """The machine that something was tested on, in words."""
    if machine.gpu is not None:
        return f"{machine.gpu}, CUDA {machine.cuda or 'not recorded'}"
    cores = "cores not recorded" if machine.cores is None else f"{machine.cores} cores"
    return f"{machine.processor or 'processor not recorded'}, {cores}"


def contact_section(given: CardInput) -> Markdown:
    """A section on whom to write to with questions."""
    if given.contact:
        return md(
            "Questions, concerns and security problems of this quantization: {}.", given.contact
        )
    return Markdown("None was given; the discussions of the repository are open to all.")


def architecture_section(c: CheckpointFacts) -> Markdown:
    """A section with the model's architecture as a list."""
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


def input_section(c: CheckpointFacts) -> Markdown:
    """A section on what the model reads: types, format, limits."""
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


def version_section(given: CardInput, title: str) -> Markdown:
    """A section with the version: title, recipe and scale rules."""
    made = given.checkpoint.made_of
    recipe = made.get("recipe", {}).get("name", "unknown recipe")
    rules = made.get("profile", "not recorded")
    return md("{}, recipe {}, scale rules {}.", title, code(recipe), code(rules))
