"""What evaluation passes around: samples, attempts, scores, and the lines that are stored.

A `Sample` is an item of a benchmark, an `Attempt` one raw answer to it, a `Score` what a grader
made of that answer. `GradedAttempt` is the stored line that joins the three; a run is its
`RunRecord` plus its records. Everything here is plain data; `records` reads and writes it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Cause = Literal[
    "ok",  # right
    "wrong",  # an answer was found and it is not the right one
    "unparsed",  # no answer could be extracted
    "empty",  # no answer text at all, or only unfinished reasoning
    "length",  # cut by the output limit
    "refused",  # the server rejected the prompt: too long, filtered, images unsupported
    "ungraded",  # the judge gave no readable verdict; missing
    "error",  # the server failed although we retried; missing
]

# These are missing, never scored; the others stay in the denominator as wrong answers.
MISSING_CAUSES: tuple[Cause, ...] = ("ungraded", "error")


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a benchmark with its gold answer.

    item_id  unique in the benchmark and the same in every run
    group    items of one group are not independent (document set, problem); item_id if alone
    stratum  a label to report by (category, subject); never used for the error
    gold     what is right, as text
    fields   what prompt and grader need, as the data set has it
    """

    item_id: str
    group: str
    stratum: str
    gold: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a prompt that is text."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a prompt, as a data URI with its true media type."""

    uri: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of several speakers, and the tools that may be called, as the protocol has them."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


# One user message, text and images in reading order; or a whole conversation.
Prompt = tuple[Text | Image, ...] | Conversation


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in an answer. `arguments` is the text that came, which need not be JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said in one step of a conversation."""

    text: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One raw answer, as it came; written before anyone grades it.

    max_tokens  output limit that this request was sent with
    ended       when the answer was there, seconds since 1970
    error  why there is no answer: the server failed (`refused` False) or rejected the prompt
    """

    benchmark: str
    item_id: str
    repeat: int
    seed: int
    prompt_sha256: str
    answer: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    latency_s: float
    error: str | None = None
    refused: bool = False
    retries: int = 0
    max_tokens: int = 0
    ended: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """What a grader says of one answer: its value and why.

    value      in [0, 1]; None when the attempt is missing (ungraded, error), never 0 for that
    extracted  the answer found in the text, None when none was
    """

    value: float | None
    extracted: str | None
    cause: Cause
    details: Mapping[str, Any] = field(default_factory=dict)


def right_or_wrong(is_right: bool, extracted: str, **details: Any) -> Score:
    """The score of an answer that was found."""
    return Score(1.0 if is_right else 0.0, extracted, "ok" if is_right else "wrong", details)


def unparsed(**details: Any) -> Score:
    """The score of a text in which no answer was found: wrong, and counted apart."""
    return Score(0.0, None, "unparsed", details)
