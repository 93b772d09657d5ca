"""What a generated item is, and which split its parameters belong to.

An item is a conversation whose assistant turns are what the model learns to write. The kinds make
items; `encode` turns them into tokens; `grade` judges what a model writes instead.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, TypeVar

from PIL import Image

Split = Literal["train", "test"]
Effort = Literal["none", "high"]

# One parameter set in sixteen is held out.
TEST_SHARE = 16


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One message; a user's images stand before the text."""

    role: Literal["user", "assistant", "tool"]
    content: str = ""
    images: tuple[Image.Image, ...] = ()
    thought: str | None = None
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A conversation that ends with the assistant.

    gold  what `grade` needs to judge another last turn
    """

    kind: str
    turns: tuple[Turn, ...]
    effort: Effort = "none"
    system: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    schema: Mapping[str, Any] | None = None
    gold: Mapping[str, Any] = field(default_factory=dict)


T = TypeVar("T")
Kind = Callable[[Random, Split], Item]


def split_of(key: object) -> Split:
    """The split that a parameter set belongs to; the same on every machine."""
    return "test" if zlib.crc32(repr(key).encode()) % TEST_SHARE == 0 else "train"


def draw(rng: Random, split: Split, parameters: Callable[[Random], T]) -> T:
    """Parameters of the wanted split, by trying again."""
    while True:
        found = parameters(rng)
        if split_of(found) == split:
            return found


def effort_of(rng: Random, share_of_high: float) -> Effort:
    """`high` for this share of the items."""
    return "high" if rng.random() < share_of_high else "none"


def ask(question: str, *images: Image.Image) -> Turn:
    """A user's turn."""
    return Turn("user", question, images)


def say(content: str, thought: str | None = None) -> Turn:
    """An assistant's turn of text."""
    return Turn("assistant", content, thought=thought)
