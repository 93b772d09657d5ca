"""The multiple-choice prompt shape that MMLU-Pro and GPQA share."""

from collections.abc import Sequence
from typing import Literal

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_INSTRUCTIONS = {
    "aa": (
        "Answer the following multiple choice question. The last line of your response must have "
        "the form 'Answer: {letters}' (for example 'Answer: A'). Think step by step before you "
        "answer."
    ),
    "aa-boxed": (
        "Answer the following multiple choice question. The last line of your response must have "
        "the form 'Answer: \\boxed{{{letters}}}' (for example 'Answer: \\boxed{{A}}'). Think step "
        "by step before you answer."
    ),
}


def choice_prompt(question: str, options: Sequence[str], shape: Literal["aa", "aa-boxed"]) -> str:
    """Instruction, question, one option per line; letters only for options that exist."""
    letters = LETTERS[: len(options)]
    lines = [f"{letter}) {option}" for letter, option in zip(letters, options, strict=True)]
    instruction = _INSTRUCTIONS[shape].format(letters="/".join(letters))
    return f"{instruction}\n\n{question}\n\n" + "\n".join(lines)
