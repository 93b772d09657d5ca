"""Long recall: facts spread over documents, one or two of which answer the question."""

from collections.abc import Sequence
from random import Random

from halfbyte.evals.tasks.aa_lcr import PROMPT
from pocket.items import Item, Split, ask, effort_of, say, split_of
from pocket.words import COLOURS, THINGS, made_up_name, sentence

# A sentence of filler is about so many tokens.
SENTENCE_TOKENS = 14
_OFFICES = (
    "north",
    "south",
    "east",
    "west",
    "harbour",
    "bridge",
    "garden",
    "tower",
    "station",
    "mill",
)


def _digits(rng: Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _needles(rng: Random, count: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    """(sentences to hide, questions as question, thought, answer)."""
    hidden: list[str] = []
    questions: list[tuple[str, str, str]] = []
    offices = rng.sample(_OFFICES, min(len(_OFFICES), max(2, count)))
    numbers = {}
    for office in offices:
        numbers[office] = _digits(rng, 4)
        told = f"The number of the {office} office is {numbers[office]}."
        hidden.append(told)
        asked = f"What is the number of the {office} office?"
        questions.append((asked, told, numbers[office]))
    seen: set[str] = set()
    for _ in range(count):
        name = made_up_name(rng)
        colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
        if name in seen or f"{colour} {thing}" in seen:
            continue
        seen |= {name, f"{colour} {thing}"}
        office, code = rng.choice(offices), _digits(rng, 4)
        works, opens = (
            f"{name} works in the {office} office.",
            f"The code of the {colour} {thing} is {code}.",
        )
        owns = f"The {colour} {thing} belongs to {name}."
        hidden += [works, opens, owns]
        number = f"The number of the {office} office is {numbers[office]}."
        questions += [
            (f"What is the code of the {colour} {thing}?", opens, code),
            (f"In which office does {name} work?", works, office),
            (f"To whom does the {colour} {thing} belong?", owns, name),
            (
                f"What is the number of the office in which {name} works?",
                f"{works} {number}",
                numbers[office],
            ),
            (
                f"In which office does the owner of the {colour} {thing} work?",
                f"{owns} {works}",
                office,
            ),
        ]
    return hidden, questions


def _documents(rng: Random, hidden: Sequence[str], num_tokens: int) -> str:
    """Filler with the hidden sentences at random places, split into documents."""
    num_filler = max(0, num_tokens // SENTENCE_TOKENS - len(hidden))
    # Long fillers repeat a stock of sentences: making each anew would starve training.
    stock = [sentence(rng) for _ in range(min(num_filler, 300))]
    lines = [rng.choice(stock) for _ in range(num_filler)] if stock else []
    for told in hidden:
        lines.insert(rng.randint(0, len(lines)), told)
    size = rng.randint(15, 40)
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    return "\n\n".join(
        f"Document {number}\n{' '.join(part)}" for number, part in enumerate(parts, 1)
    )


def recall(
    rng: Random,
    split: Split,
    num_tokens: int | None = None,
    num_questions: int | None = None,
    two_hops: bool | None = None,
) -> Item:
    """Questions about documents of about `num_tokens`; drawn between 150 and 2,000 if None."""
    if num_tokens is None:
        num_tokens = int(150 * 13 ** rng.random())
    if num_questions is None:
        num_questions = rng.randint(3, 12) if split == "train" else 1
    while True:
        hidden, questions = _needles(rng, max(1, min(10, num_tokens // 120)))
        if split_of(hidden[0]) == split:
            break
    if two_hops is not None:
        questions = [q for q in questions if (q[1].count(".") == 2) is two_hops]
    chosen = rng.sample(questions, min(num_questions, len(questions)))
    effort = effort_of(rng, 0.7)
    turns = []
    for index, (question, thought, answer) in enumerate(chosen):
        prompt = question
        if index == 0:
            prompt = PROMPT.replace("{context}", _documents(rng, hidden, num_tokens)).replace(
                "{question}", question
            )
        turns += [ask(prompt), say(answer, thought if effort == "high" else None)]
    return Item("recall", tuple(turns), effort, gold={"text": chosen[-1][2]})


def long_recall(rng: Random, split: Split) -> Item:
    """The same over 2,000 to 30,000 tokens, many questions a document."""
    num_tokens = int(2000 * 15.0 ** rng.random())
    return recall(rng, split, num_tokens, rng.randint(8, 28) if split == "train" else 1)
