"""Multiple-choice items answered in one forward pass: which option a model finds most likely.

The item's prompt is asked and the answer begun with "Answer:"; the log-probs of the option letters
at the next token are the model's opinion. No text is generated, so that thousands of items cost
minutes, and the answers of a baseline are a few numbers an item (`baseline` keeps them). What
counts is how many answers change between two models: equal accuracy can hide flips both ways.

Shapes: L letters of an item.
Source: A. Dutta et al., "Accuracy is Not All You Need", arXiv 2407.09141 (flips).
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from halfbyte.chat.tokens import load_chat
from halfbyte.engine.core import Engine
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.tasks.choices import LETTERS
from halfbyte.evals.tasks.suite import BENCHMARKS, RENAMED
from halfbyte.evals.types import Conversation, Image

BENCHMARK_NAMES = ("quick", "mmlu_pro", "gpqa_diamond")


@dataclass(frozen=True, slots=True)
class EncodedItem:
    """One multiple-choice item as tokens: its prompt and its options' letters.

    token_ids   the prompt up to and with "Answer:"
    letter_ids  the token that each option's letter would be, in order
    right       index of the right option
    """

    token_ids: tuple[int, ...]
    letter_ids: tuple[int, ...]
    right: int


@dataclass(frozen=True, slots=True)
class Flips:
    """How a candidate's answers differ from the base's, over the same items.

    lost, won      right in the base only, in the candidate only
    changed_wrong  another wrong answer
    """

    items: int
    base_right: int
    right: int
    lost: int
    won: int
    changed_wrong: int

    @property
    def changed(self) -> int:
        """Number of items whose answer is another one."""
        return self.lost + self.won + self.changed_wrong


def encode_choices(
    directory: Path, benchmark: str, data: Path | None, limit: int | None
) -> tuple[EncodedItem, ...]:
    """The multiple-choice items of a benchmark as a checkpoint's tokenizer writes them.

    Raises UsageError for a benchmark without options, CheckpointError if letters are no tokens.
    """
    if benchmark not in BENCHMARK_NAMES:
        was = f"; {RENAMED[benchmark]}" if benchmark in RENAMED else ""
        raise UsageError(f"--choices {benchmark}: there are {', '.join(BENCHMARK_NAMES)}{was}")
    chat, known, options = load_chat(directory), BENCHMARKS[benchmark], Options(data, limit)
    found = []
    for sample in known.load(options).samples:
        texts = sample.fields.get("options")
        if not texts or len(texts) < 2:
            continue
        prompt = known.prompt(sample, (), options)
        if isinstance(prompt, Conversation):
            raise UsageError(f"--choices {benchmark}: its items are conversations, not questions")
        asked = "".join(part.text for part in prompt if not isinstance(part, Image))
        letters = LETTERS[: len(texts)]
        begun = [
            chat.encode(
                [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": f"Answer: {letter}"},
                ],
                continue_final=True,
            ).token_ids
            for letter in letters
        ]
        same = list(takewhile(lambda ids: len(set(ids)) == 1, zip(*begun, strict=False)))
        letter_ids = tuple(ids[len(same)] for ids in begun if len(ids) > len(same))
        if len(set(letter_ids)) != len(letters):
            raise CheckpointError(f"{directory}: the letters {letters} are not tokens of their own")
        prefix = tuple(int(ids[0]) for ids in same)
        found.append(EncodedItem(prefix, letter_ids, letters.index(sample.gold)))
    return tuple(found)


def answer(engine: Engine, choices: Sequence[EncodedItem]) -> tuple[int, ...]:
    """The most likely option of each item, as an index; the first of equals."""
    answers = []
    for choice in choices:
        with closing(engine.score(choice.token_ids)) as chunks:
            *_, last_TV = chunks
        logits_L = last_TV[-1][list(choice.letter_ids)]
        answers.append(int(logits_L.argmax()))
    return tuple(answers)


def longest(choices: Sequence[EncodedItem]) -> int:
    """Tokens of the longest prompt; 0 for none."""
    return max((len(choice.token_ids) for choice in choices), default=0)


def count_flips(choices: Sequence[EncodedItem], base: Sequence[int], other: Sequence[int]) -> Flips:
    """Compare the answers of two models item by item.

    Example: right 0, 0, 0; base 0, 0, 1; other 0, 1, 2: one lost, one changed among wrong ones.
    """
    triples = [(c.right, b, o) for c, b, o in zip(choices, base, other, strict=True)]
    return Flips(
        items=len(triples),
        base_right=sum(b == right for right, b, _ in triples),
        right=sum(o == right for right, _, o in triples),
        lost=sum(b == right != o for right, b, o in triples),
        won=sum(o == right != b for right, b, o in triples),
        changed_wrong=sum(b != o and right not in (b, o) for right, b, o in triples),
    )
