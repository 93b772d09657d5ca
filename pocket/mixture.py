"""Which kinds there are and how often each is drawn; an item from a seed."""

from functools import partial
from random import Random

from pocket import (
    choice,
    images,
    instructions,
    integers,
    manners,
    programs,
    recall,
    structured,
    tools,
)
from pocket.items import Item, Kind, Split

# Kinds with their share of the training tokens, in percent.
SHARES: dict[str, tuple[Kind, float]] = {
    "knowledge": (choice.knowledge, 7),
    "fact": (choice.fact, 4),
    "almanac": (choice.almanac, 2),
    "hard": (choice.hard, 7),
    "recall": (recall.recall, 9),
    "long_recall": (recall.long_recall, 10),
    "integers": (integers.integers, 12),
    "drill": (integers.drill, 6),
    "programs": (programs.programs, 3),
    "instructions": (instructions.instructions, 6),
    "lists": (instructions.lists, 1),
    "images": (images.images, 11),
    "inside": (images.inside, 3),
    "look": (images.look, 12),
    "tools": (tools.tools, 5),
    "json": (structured.structured, 4),
    "system": (manners.system, 1),
    "languages": (manners.languages, 1),
    "talk": (manners.small_talk, 0.2),
}
# Held-out only: recall at fixed lengths.
AT_LENGTH: dict[str, Kind] = {
    "recall_4k": partial(recall.recall, num_tokens=4000, num_questions=1),
    "recall_8k": partial(recall.recall, num_tokens=8000, num_questions=1),
    "recall_16k": partial(recall.recall, num_tokens=15000, num_questions=1),
    "recall_32k": partial(recall.recall, num_tokens=30000, num_questions=1),
}
# The kinds that stand for the card's seven benchmarks, and those around them that are graded.
GRADED = (
    "knowledge", "hard", "recall", "programs", "integers", "instructions", "images",
    "tools", "json", "system", "languages",
)  # fmt: skip


def item(kind: str, seed: int, split: Split) -> Item:
    """The item of a kind that belongs to a seed; the same on every machine."""
    make = AT_LENGTH[kind] if kind in AT_LENGTH else SHARES[kind][0]
    return make(Random(f"{kind}/{split}/{seed}"), split)
