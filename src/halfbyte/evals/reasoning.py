"""Separate what a model thought from what it answered, in each form in which servers send it."""

import re
from typing import NamedTuple

_BLOCK = re.compile(
    r"<think>(?P<a>.*?)</think>|\[THINK\](?P<b>.*?)\[/THINK\]", re.DOTALL | re.IGNORECASE
)
_OPEN = re.compile(r"<think>|\[THINK\]", re.IGNORECASE)
_CLOSE = re.compile(r"</think>|\[/THINK\]", re.IGNORECASE)


class Answer(NamedTuple):
    """Final answer text and the reasoning before it."""

    text: str
    reasoning: str


def split_reasoning(content: str, reasoning: str = "") -> Answer:
    """Take thinking blocks out of the content and add them to separately sent reasoning.

    A block that was opened and never closed leaves an empty answer: the model did not come to one.
    A close without an open (templates that open the block themselves) ends the reasoning.
    """
    thoughts = [reasoning] if reasoning else []
    thoughts += [match["a"] or match["b"] or "" for match in _BLOCK.finditer(content)]
    rest = _BLOCK.sub("", content)
    if closing := _CLOSE.search(rest):
        thoughts.append(rest[: closing.start()])
        rest = rest[closing.end() :]
    if opening := _OPEN.search(rest):
        thoughts.append(rest[opening.end() :])
        rest = ""
    return Answer(rest.strip(), "\n".join(thought.strip() for thought in thoughts))
