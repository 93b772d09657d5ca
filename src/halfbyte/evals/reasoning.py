"""Separate what a model thought from what it answered, in each form in which servers send it."""

import re
from typing import NamedTuple

_MARK = re.compile(
    r"(?:(?<![`'\"“‘«])|(?!(?:</?think(?:ing)?>|\[/?THINK\])[`'\"”’»]))"
    r"(?:<(?P<close>/?)think(?:ing)?>|\[(?P<shut>/?)THINK\])",
    re.IGNORECASE,
)


class SplitAnswer(NamedTuple):
    """Final answer text and the reasoning before it."""

    text: str
    reasoning: str


class _Mark(NamedTuple):
    start: int
    end: int
    is_close: bool


def split_reasoning(content: str, reasoning: str = "") -> SplitAnswer:
    """Tell the answer from the thoughts in a message.

    content    text of the message, joined from its text parts
    reasoning  what the server sent apart from it (`reasoning_content`, thinking parts)

    A server that sends the thoughts apart has done this already: marks within the content are then
    quoted by the answer, and stay. Otherwise an opening mark counts at the start only; a text that
    begins so may think again later. A block that is never closed leaves an empty answer: the model
    did not come to one. A close without an open (templates that open the block themselves) ends the
    thoughts. A mark in quotes or back-ticks of its own is text.
    """
    if reasoning.strip():
        return SplitAnswer(content.strip(), reasoning.strip())
    marks = _marks(content)
    if not marks or (not marks[0].is_close and content[: marks[0].start].strip()):
        return SplitAnswer(content.strip(), "")
    if marks[0].is_close:
        marks.insert(0, _Mark(0, 0, False))
    thoughts: list[str] = []
    texts: list[str] = []
    position = 0
    for mark, following in zip(marks, (*marks[1:], None), strict=True):
        if mark.is_close or mark.start < position:
            continue
        is_open = following is None or not following.is_close
        if is_open and thoughts and not content[: mark.start].endswith("\n"):
            continue  # named in the middle of a line of the answer
        texts.append(content[position : mark.start])
        if following is None or not following.is_close:
            thoughts.append(content[mark.end :])
            return SplitAnswer("", _joined(thoughts))
        thoughts.append(content[mark.end : following.start])
        position = following.end
    texts.append(content[position:])
    return SplitAnswer("".join(texts).strip(), _joined(thoughts))


def _marks(content: str) -> list[_Mark]:
    """Marks of thinking in order, without those that stand in quotes of their own."""
    return [
        _Mark(*match.span(), bool(match["close"] or match["shut"]))
        for match in _MARK.finditer(content)
    ]


def _joined(thoughts: list[str]) -> str:
    return "\n".join(thought.strip() for thought in thoughts)
