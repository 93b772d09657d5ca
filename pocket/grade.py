"""Judges an answer against an item's gold: pure functions, and the sandbox for programs."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.evals.grading.letters import grade_letter
from halfbyte.evals.grading.numbers import extract_number, read_integer
from halfbyte.evals.grading.scripts import extract_code
from halfbyte.evals.sandbox import SandboxLimits, interpreter, run_program
from halfbyte.evals.tasks.choices import LETTERS
from pocket.instructions import failures
from pocket.items import Item

_PASSED = "all cases hold"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model gave back, already split; calls as (name, arguments as text)."""

    content: str
    thought: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def is_right(item: Item, answer: Answer) -> bool:
    """Whether the answer is right; programs run in the sandbox."""
    gold, text = item.gold, answer.content
    if "letter" in gold:
        return bool(grade_letter(gold["letter"], LETTERS[: gold["options"]], text).value == 1)
    if "number" in gold:
        found = extract_number(text)
        return found is not None and read_integer(found) == gold["number"]
    if "constraints" in gold:
        return not failures(text, gold["constraints"])
    if "expression" in gold:
        return _runs_right(text, gold)
    if "data" in gold:
        return bool(_parsed(text) == gold["data"])
    if "calls" in gold:
        made = [(name, _parsed(arguments)) for name, arguments in answer.calls]
        return made == [(name, arguments) for name, arguments in gold["calls"]]
    return not answer.calls and text.strip() == gold["text"]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def program(code: str, gold: Any) -> str:
    """Compares the function with the right expression on every input."""
    return (
        f"{code}\n\ndef _right({gold['argument']}):\n    return {gold['expression']}\n\n"
        f"for _case in {gold['inputs']!r}:\n"
        f"    assert {gold['name']}(_case) == _right(_case), _case\n"
        f"print({_PASSED!r})\n"
    )


def _runs_right(text: str, gold: Any) -> bool:
    source = program(extract_code(text), gold)
    outcome = run_program(interpreter(sys.executable), source, limits=SandboxLimits(wall_s=10))
    return outcome.exit_code == 0 and outcome.stdout.strip().endswith(_PASSED)


def accuracy(judged: Sequence[bool]) -> float:
    """Share of right answers."""
    return sum(judged) / len(judged) if judged else float("nan")
