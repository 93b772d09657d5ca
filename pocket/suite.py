"""The seven kinds as benchmarks of `halfbyte evaluate --suite pocket`: items, prompts, grades.

`halfbyte.evals.tasks.pocket` calls these; asking, records and verdicts are its runner's. An item is
asked with the effort that the run asks for, whatever the generator drew for it.
"""

import base64
import io
from typing import Any

from PIL import Image as Picture

from halfbyte.evals import sandbox
from halfbyte.evals.grading.letters import grade_letter
from halfbyte.evals.grading.numbers import extract_number, read_integer
from halfbyte.evals.grading.scripts import extract_code
from halfbyte.evals.tasks.choices import LETTERS
from halfbyte.evals.types import Image, Sample, Score, Text, right_or_wrong, unparsed
from pocket.grade import Answer, is_right
from pocket.instructions import failures
from pocket.items import Item
from pocket.mixture import item

KINDS = ("knowledge", "hard", "recall", "programs", "integers", "instructions", "images")
# Items of different seeds have different numbers, however many are asked for.
_NUMBERS_A_SEED = 10**6
# Of twenty items of recall three are long: minutes on two cores, where all of them would be hours.
_LENGTHS = {9: "recall_4k", 14: "recall_4k", 19: "recall_8k"}


def samples(kind: str, count: int, seed: int) -> tuple[Sample, ...]:
    """`count` held-out items of a kind; a larger count begins with the items of a smaller one.

    Raises UnsupportedError if the answers are programs and cannot be run apart.
    """
    if kind == "programs":
        sandbox.isolation()
    numbers = range(seed * _NUMBERS_A_SEED, seed * _NUMBERS_A_SEED + count)
    return tuple(_sample(kind, number) for number in numbers)


def _sample(kind: str, number: int) -> Sample:
    source = _LENGTHS.get(number % 20, kind) if kind == "recall" else kind
    found = item(source, number, "test")
    name = f"{kind}-{number}"
    (question,) = (turn for turn in found.turns if turn.role == "user")
    fields = {
        "item": found,
        # What identifies the item in the record's hash.
        "asked": {"text": question.content, "pictures": list(question.images)},
    }
    return Sample(name, name, _stratum(source, found), _gold(found), fields)


def _stratum(source: str, found: Item) -> str:
    if "scene" in found.gold:
        return str(found.gold["scene"])
    return source if source.startswith("recall_") else ""


def _gold(found: Item) -> str:
    gold = found.gold
    if "constraints" in gold:
        return "; ".join(
            f"{name} {value}" if value else name for name, value in gold["constraints"]
        )
    return str(next(gold[key] for key in ("letter", "number", "expression", "text") if key in gold))


def prompt(sample: Sample) -> tuple[Text | Image, ...]:
    """The item's one question, its pictures before the text."""
    asked = sample.fields["asked"]
    return (*(Image(_data_uri(picture)) for picture in asked["pictures"]), Text(asked["text"]))


def _data_uri(picture: Picture.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def grade(sample: Sample, text: str) -> Score:
    """Score the text of an answer; thoughts are not looked at."""
    found: Item = sample.fields["item"]
    gold: Any = found.gold
    if "letter" in gold:
        return grade_letter(gold["letter"], LETTERS[: gold["options"]], text)
    if "number" in gold:
        number = read_integer(extract_number(text) or "")
        return (
            unparsed() if number is None else right_or_wrong(number == gold["number"], str(number))
        )
    details: dict[str, Any] = {}
    shown = text.strip()[:200]
    if "constraints" in gold and (broken := failures(text, gold["constraints"])):
        details["broken"] = broken
    if "expression" in gold:
        shown = extract_code(text)[:400]
        if not shown.strip():
            return unparsed()
    return right_or_wrong(is_right(found, Answer(text)), shown, **details)
