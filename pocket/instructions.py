"""Verifiable instructions: a short text under one to three constraints, each a pure check."""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from pocket.items import Item, Split, ask, draw, say
from pocket.words import ADJECTIVES, BEINGS, THINGS, TOPICS, sentence_words

_KEYWORDS = (*ADJECTIVES, *BEINGS, *THINGS)
_ENDINGS = ("That is all.", "Thank you.", "The end.", "Good night.", "So it goes.")
Parameters = tuple[tuple[str, Any], ...]

WORDING = {
    "words": "Use exactly {v} words.",
    "sentences": "Write exactly {v} sentences.",
    "lower": "Use lower case letters only.",
    "upper": "Use capital letters only.",
    "keyword": "Include the word {v}.",
    "without": "Do not use the word {v}.",
    "ending": 'End with the sentence "{v}"',
    "quotes": "Put the whole answer in double quotes.",
    "separator": "Separate the sentences with {v} instead of spaces.",
    "bullets": "Write exactly {v} bullet points, each beginning with a dash.",
    "numbered": "Write a numbered list of exactly {v} points.",
    "title": "Begin with a title in double angle brackets, such as <<title>>.",
}


def _parameters(rng: Random) -> Parameters:
    """Constraints that can hold together."""
    form = rng.choice(("words", "sentences", "sentences", "bullets", "numbered"))
    chosen: list[tuple[str, Any]] = [
        (form, rng.randint(4, 15) if form == "words" else rng.randint(2, 5))
    ]
    extras = ["lower", "upper", "keyword", "keyword", "without", "quotes", "title"]
    if form == "sentences":
        extras += ["separator", "ending"]
    rng.shuffle(extras)
    for name in extras[: rng.randint(0, 2)]:
        taken = {found for found, _ in chosen}
        if name in taken or (name in ("lower", "upper") and taken & {"lower", "upper"}):
            continue
        if {name, *taken} >= {"separator", "ending"} or {name, *taken} >= {"words", "title"}:
            continue
        if {name, *taken} >= {"quotes", "title"} or {name, *taken} >= {"without", "ending"}:
            continue
        value: Any = None
        if name == "keyword":
            value = rng.choice(_KEYWORDS)
            if form == "words":
                # Shorter sentences have no place for every keyword.
                chosen[0] = (form, max(7, chosen[0][1]))
        elif name == "without":
            value = rng.choice(("the", "a", "was", "and", "very"))
        elif name == "separator":
            value = rng.choice(("***", "###", "---", "|"))
        elif name == "ending":
            value = rng.choice(_ENDINGS)
        chosen.append((name, value))
    return tuple(chosen)


def _with_keyword(words: list[str], keyword: str) -> list[str]:
    """The sentence with the keyword in the place of a word of its kind."""
    for group in (BEINGS, THINGS, ADJECTIVES):
        if keyword in group:
            for index, word in enumerate(words):
                if word in group:
                    return [*words[:index], keyword, *words[index + 1 :]]
    # No adjective to replace: put one before the last being or thing.
    index = next(i for i, word in enumerate(words) if word in BEINGS or word in THINGS)
    return [*words[: index - 1], _article(words[index - 1], keyword), keyword, *words[index:]]


def _article(article: str, following: str) -> str:
    if article not in ("a", "an"):
        return article
    return "an" if following[0] in "aeiou" else "a"


def _fixed_articles(words: list[str]) -> list[str]:
    return [
        _article(word, words[index + 1]) if index + 1 < len(words) else word
        for index, word in enumerate(words)
    ]


def write(rng: Random, constraints: Mapping[str, Any], topic: str) -> str:
    """A text that meets the constraints."""
    article = {"the": "a", "a": "the"}.get(constraints.get("without", ""), "")
    num_sentences = 1
    for form in ("sentences", "bullets", "numbered"):
        num_sentences = constraints.get(form, num_sentences)
    ending = constraints.get("ending")
    made = []
    for index in range(num_sentences - (1 if ending else 0)):
        length = constraints.get("words")
        keyword = constraints.get("keyword") if index == 0 else None
        while True:
            words = sentence_words(rng, length, article)
            if constraints.get("without") == "the" and "the" in words:
                continue
            if keyword:
                words = _with_keyword(words, keyword)
                if length and len(words) != length:
                    continue
            break
        words = _fixed_articles(words)
        made.append(" ".join([words[0].capitalize(), *words[1:]]) + ".")
    if ending:
        made.append(ending)
    if "bullets" in constraints:
        text = "\n".join(f"- {line}" for line in made)
    elif "numbered" in constraints:
        text = "\n".join(f"{number}. {line}" for number, line in enumerate(made, 1))
    else:
        text = (f" {constraints['separator']} " if "separator" in constraints else " ").join(made)
    if "title" in constraints:
        text = f"<<{topic}>>\n{text}"
    if "quotes" in constraints:
        text = f'"{text}"'
    if "lower" in constraints:
        text = text.lower()
    if "upper" in constraints:
        text = text.upper()
    return text


def _body(text: str, constraints: Mapping[str, Any]) -> str:
    if "quotes" in constraints:
        text = text.strip('"')
    if "title" in constraints:
        text = text.partition("\n")[2]
    return text


def holds(name: str, value: Any, text: str, constraints: Mapping[str, Any]) -> bool:
    """Whether one constraint holds."""
    body = _body(text, constraints)
    words = re.findall(r"[\w']+", body)
    lowered = [word.lower() for word in words]
    if name == "words":
        return bool(len(words) == value)
    if name == "sentences":
        return bool(len(re.findall(r"[^.!?]*\w[^.!?]*[.!?]", body)) == value)
    if name in ("bullets", "numbered"):
        lines = body.split("\n")
        marks = (
            [r"- \S"] * len(lines)
            if name == "bullets"
            else [rf"{number}\. \S" for number in range(1, len(lines) + 1)]
        )
        return len(lines) == value and all(
            re.match(mark, line) for mark, line in zip(marks, lines, strict=True)
        )
    if name == "lower":
        return text == text.lower() and bool(words)
    if name == "upper":
        return text == text.upper() and bool(words)
    if name == "keyword":
        return str(value) in lowered
    if name == "without":
        return bool(words) and str(value) not in lowered
    if name == "ending":
        return body.lower().rstrip('"').endswith(str(value).lower())
    if name == "quotes":
        return len(text) > 2 and text[0] == text[-1] == '"'
    if name == "separator":
        return bool(len(body.split(str(value))) == constraints["sentences"])
    assert name == "title", name
    return re.match(r"<<[^<>\n]+>>\n", text) is not None


def failures(text: str, constraints: Sequence[Sequence[Any]]) -> list[str]:
    """The names of the constraints that do not hold."""
    found: dict[str, Any] = {str(name): value for name, value in constraints}
    return [name for name, value in found.items() if not holds(name, value, text, found)]


def instructions(rng: Random, split: Split) -> Item:
    """A text about a topic under constraints."""
    chosen = draw(rng, split, _parameters)
    topic = rng.choice(TOPICS)
    wording = " ".join(WORDING[name].format(v=value) for name, value in chosen)
    text = write(rng, dict(chosen), topic)
    prompt = f"Write about {topic}. {wording}"
    return Item("instructions", (ask(prompt), say(text)), gold={"constraints": list(chosen)})


def _listed(rng: Random) -> tuple[str, ...]:
    task = rng.choice(("repeat", "sort", "letter", "count", "capital", "reverse"))
    words = tuple(rng.sample((*BEINGS, *THINGS, *ADJECTIVES), rng.randint(3, 6)))
    return (task, *words)


def lists(rng: Random, split: Split) -> Item:
    """Small exact tasks on words: sorting, repeating, picking by letter."""
    task, *words = draw(rng, split, _listed)
    spoken = ", ".join(words)
    if task == "repeat":
        count = rng.randint(2, 7)
        question = f"Write the word {words[0]} {count} times, separated by commas."
        answer = ", ".join([words[0]] * count)
    elif task == "sort":
        question, answer = f"Sort these words by alphabet: {spoken}", ", ".join(sorted(words))
    elif task == "letter":
        letter = rng.choice(words)[0]
        question = f"Which of these words begin with {letter}? {spoken}"
        answer = ", ".join(word for word in words if word[0] == letter)
    elif task == "count":
        question, answer = f"How many words are these? {spoken}", str(len(words))
    elif task == "capital":
        question, answer = f"Write in capitals: {spoken}", spoken.upper()
    else:
        question, answer = f"Write in reverse order: {spoken}", ", ".join(reversed(words))
    return Item("lists", (ask(question), say(answer)), gold={"text": answer})
