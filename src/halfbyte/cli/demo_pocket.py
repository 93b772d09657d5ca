"""The demo's second half: Pocket, the repository's own small model, sees, thinks and calls tools.

It is quantized, its arms are compared on its own answers, and the mixed one is served and asked
four questions. Model and items stand in `pocket/` of a checkout; without it `run_demo` says so.
"""

import base64
import importlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.cli.demo_tools import CALIBRATION, Narrator, quantized, serving, size_of, weight_bytes
from halfbyte.errors import UnsupportedError
from halfbyte.evals.tasks.pocket import generator

# Conversations of each kind whose right answers are scored by every arm.
_COMPARED_ITEMS = 3
_RECIPES = {"mixed": "medium-3.5", "nvfp4": "nvfp4-everywhere"}
_LABELS = {"fp8": "FP8", "mixed": "mixed", "nvfp4": "NVFP4 everywhere"}


@dataclass(frozen=True)
class Pocket:
    """What a checkout has of Pocket: its folder, and its modules by name."""

    folder: Path

    @property
    def model(self) -> Path:
        """The folder of the FP8 checkpoint, which the demo quantizes."""
        return self.folder / "model"

    def module(self, name: str) -> Any:
        """Import a module of the generator's package by its name."""
        return importlib.import_module(f"pocket.{name}")


def find_pocket() -> Pocket | None:
    """Pocket of the checkout that this package runs from; None if there is none."""
    try:
        folder = Path(generator().__file__).parent
    except UnsupportedError:
        return None
    return Pocket(folder) if (folder / "model" / "config.json").is_file() else None


def quantize_arms(pocket: Pocket, out: Path, narrator: Narrator) -> dict[str, Path]:
    """Both arms below `out`; returns all three by name, the FP8 source first."""
    arms = {"fp8": pocket.model}
    for arm, recipe in _RECIPES.items():
        arms[arm] = out / arm
        quantized(pocket.model, arms[arm], recipe, CALIBRATION, narrator)
    sizes = ", ".join(f"{_LABELS[arm]} {size_of(folder)}" for arm, folder in arms.items())
    narrator.say(f"      {sizes}")
    return arms


def compare_arms(
    pocket: Pocket, arms: Mapping[str, Path], narrator: Narrator
) -> dict[str, dict[str, float]]:
    """KL divergence from FP8 on right answers of held-out items, pictures included."""
    compare, mixture = pocket.module("compare"), pocket.module("mixture")
    vocabulary = pocket.module("vocabulary").Vocabulary(pocket.model / "tekken.json")
    encoder = pocket.module("encode").Encoder(vocabulary)
    conversations = [
        encoder.encode(mixture.item(kind, number, "test"))
        for kind in mixture.GRADED
        if kind != "recall"  # its prompts are long, its answers short
        for number in range(_COMPARED_ITEMS)
    ]
    opened = importlib.import_module("halfbyte.checkpoint.reader").Checkpoint.open
    logits = {}
    for arm, folder in arms.items():
        logits[arm] = compare.answer_logits(opened(folder), conversations, "weight_only")
    found = {}
    narrator.say("      against FP8       KL, nats a token  99th percentile  same first choice")
    for arm in _RECIPES:
        row = found[arm] = compare.divergence(logits["fp8"], logits[arm])
        mean, tail, same = row["kl_mean"], row["kl_p99"], 100 * row["top1_agreement"]
        narrator.say(f"      {_LABELS[arm]:<16}{mean:>18.6f}{tail:>17.5f}{same:>17.1f} %")
    narrator.say(f"      over {row['tokens']:,} tokens of {len(conversations)} right answers")
    return found


def ask_pocket(pocket: Pocket, served: Path, out: Path, narrator: Narrator) -> list[dict[str, Any]]:
    """Serve an arm and ask for what only such a model can do; the picture is left in `out`."""
    try:
        from openai import OpenAI  # optional: the extra `demo`
    except ImportError as error:
        message = "the demo asks through the openai client; install halfbyte[demo]"
        raise UnsupportedError(message) from error
    with (
        serving(served, narrator) as url,
        closing(
            OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60.0, max_retries=0)
        ) as client,
    ):
        asker = Asker(client, client.models.list().data[0].id, pocket.module("mixture"), narrator)
        answers = four_questions(asker, out / "picture.png")
        narrator.say(
            f"      The page of `halfbyte serve {served}` does the same by hand: + adds a picture, "
            "Effort brings a thought, Settings hold tools and a schema."
        )
    return answers


@dataclass(frozen=True)
class Asker:
    """Asks the served model greedily and prints what comes back."""

    client: Any
    model: str
    mixture: Any
    narrator: Narrator

    def item(self, kind: str, fits: Any) -> Any:
        """The first held-out item of a kind that fits."""
        found = (self.mixture.item(kind, number, "test") for number in range(1000))
        return next(one for one in found if fits(one))

    def ask(self, messages: list[Any], effort: str = "none", **more: Any) -> Any:
        response = self.client.chat.completions.create(
            model=self.model, messages=messages, temperature=0, max_tokens=300,
            reasoning_effort=effort, **more,
        )  # fmt: skip
        return response.choices[0].message

    def say(self, question: str, message: Any, right: str = "") -> dict[str, Any]:
        """Print a question with what was thought, called and answered; returns it all."""
        thought = getattr(message, "reasoning_content", None) or ""
        calls = [f"{c.function.name}({c.function.arguments})" for c in message.tool_calls or ()]
        self.narrator.say(f"      > {' '.join(question.split())}")
        for name, text in (("thinks", thought), *(("calls", call) for call in calls)):
            if text:
                self.narrator.say(f"        ({name}) {text}")
        if message.content:
            known = f"   (right: {right})" if right else ""
            self.narrator.say(f"        {message.content}{known}")
        return {
            "question": question, "thought": thought, "calls": calls,
            "answer": message.content or "", "right": right,
        }  # fmt: skip


def four_questions(asker: Asker, picture: Path) -> list[dict[str, Any]]:
    """A picture, which is written to `picture`, a thought, a tool's round trip, a schema."""
    return [
        _about_a_picture(asker, picture),
        _with_a_thought(asker),
        _through_a_tool(asker),
        _by_a_schema(asker),
    ]


def _about_a_picture(asker: Asker, file: Path) -> dict[str, Any]:
    one = asker.item("images", lambda one: one.gold["scene"] == "chart" and one.effort == "high")
    (picture,), question = one.turns[0].images, one.turns[0].content
    picture.save(file, format="PNG")
    asker.narrator.say(f"      [{file}, {picture.width} x {picture.height}]")
    uri = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    answer = asker.ask([{"role": "user", "content": parts}], "high")
    return asker.say(question, answer, f"Answer: {one.gold['letter']}")


def _with_a_thought(asker: Asker) -> dict[str, Any]:
    one = asker.item("integers", lambda one: one.effort == "high")
    question = one.turns[0].content
    answer = asker.ask([{"role": "user", "content": question}], "high")
    return asker.say(question, answer, one.turns[-1].content)


def _through_a_tool(asker: Asker) -> dict[str, Any]:
    one = asker.item(
        "tools", lambda one: [c[0] for c in one.gold.get("calls", ())] == ["get_price"]
    )
    question = one.turns[0].content
    messages: list[Any] = [{"role": "user", "content": question}]
    called = asker.ask(messages, tools=list(one.tools))
    found = asker.say(question, called)
    messages.append(called)
    result = json.dumps({"amount": 437})
    for call in called.tool_calls or ():
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = asker.ask(messages, tools=list(one.tools))
    return found | {"after": asker.say(f"tool: {result}", answer)}


def _by_a_schema(asker: Asker) -> dict[str, Any]:
    one = asker.item("json", lambda one: one.schema is not None and len(one.gold["data"]) == 3)
    question = one.turns[0].content
    schema = {"name": "data", "schema": one.schema, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    answer = asker.ask([{"role": "user", "content": question}], response_format=form)
    return asker.say(question, answer)


def pocket_summary(
    arms: Mapping[str, Path], divergence: Mapping[str, Any], answers: list[dict[str, Any]]
) -> dict[str, Any]:
    """The part of summary.json on Pocket: bytes by arm, divergence, answers."""
    sizes = {arm: weight_bytes(folder) for arm, folder in arms.items()}
    return {"bytes": sizes, "against fp8": dict(divergence), "answers": answers}
