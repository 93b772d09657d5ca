"""Program completion: a small function from its description; checked by running it."""

from random import Random
from typing import Any

from pocket.items import Item, Split, ask, draw, say

_FILTERS = (
    ("", ""),
    ("the even numbers", "x % 2 == 0"),
    ("the odd numbers", "x % 2 == 1"),
    ("the positive numbers", "x > 0"),
    ("the negative numbers", "x < 0"),
    ("the numbers greater than {k}", "x > {k}"),
    ("the numbers less than {k}", "x < {k}"),
    ("the multiples of {k}", "x % {k} == 0"),
    ("the numbers that are not {k}", "x != {k}"),
)
_MAPS = (
    ("", "x"),
    ("the squares of ", "x * x"),
    ("the doubles of ", "2 * x"),
    ("the absolute values of ", "abs(x)"),
    ("{m} times ", "{m} * x"),
    ("{m} plus each of ", "x + {m}"),
    ("the negatives of ", "-x"),
)
_FOLDS = (
    ("the sum of {what}", "sum({it})"),
    ("the largest of {what}, or 0 if there are none", "max({it}, default=0)"),
    ("the smallest of {what}, or 0 if there are none", "min({it}, default=0)"),
    ("a list of {what}", "[{inner}]"),
    ("a sorted list of {what}", "sorted({it})"),
    ("how many different values {what} have", "len(set({it}))"),
    ("a list of {what} in reverse order", "[{inner}][::-1]"),
    ("the first of {what}, or None if there are none", "next(iter([{inner}]), None)"),
    ("a sorted list of {what}, largest first", "sorted({it}, reverse=True)"),
)
_WORD_TASKS = (
    ("the words of the text that have more than {k} letters, as a list",
     "[word for word in text.split() if len(word) > {k}]"),
    ("the words of the text that begin with {c!r}, as a list",
     "[word for word in text.split() if word.startswith({c!r})]"),
    ("how many words of the text end with {c!r}",
     "sum(word.endswith({c!r}) for word in text.split())"),
    ("how often {c!r} occurs in the text", "text.count({c!r})"),
    ("the text without {c!r}", "text.replace({c!r}, '')"),
    ("the text with {c!r} in place of {d!r}", "text.replace({d!r}, {c!r})"),
    ("the first {k} letters of the text", "text[:{k}]"),
    ("the last {k} letters of the text", "text[-{k}:]"),
    ("the text repeated {k} times", "text * {k}"),
    ("the words of the text in reverse order, joined by {c!r}",
     "{c!r}.join(text.split()[::-1])"),
    ("the words of the text in alphabetical order, joined by {c!r}",
     "{c!r}.join(sorted(text.split()))"),
    ("the text in capitals without {c!r}", "text.replace({c!r}, '').upper()"),
    ("every letter number {k} of the text, from the first on", "text[::{k}]"),
)  # fmt: skip
_NAMES = ("solve", "compute", "f", "process", "answer", "work", "collect", "find")
_LETTERS = "abcdefghilmnoprstu"
PROMPT = (
    "Complete this Python function.\n\n```python\ndef {name}({argument}):\n"
    '    """Return {what}."""\n```\n\nAnswer with the whole function in one Python block.'
)
_NUMBERS: tuple[list[int], ...] = (
    [],
    [3, -1, 4, 1, -5, 9, 2, 6],
    [10, 15, 20, -7, 0, 8, 8],
    [-2, -4, -9],
    [5],
)
_TEXTS = (
    "the cat sat on the mat",
    "rain in spain stays",
    "a",
    "sun and moon and stars",
    "banana bread",
)


def _numbers(rng: Random) -> tuple[Any, ...]:
    return (
        "numbers",
        rng.randrange(len(_FILTERS)),
        rng.randrange(len(_MAPS)),
        rng.randrange(len(_FOLDS)),
        rng.randint(2, 9),
        rng.randint(2, 9),
    )


def _words(rng: Random) -> tuple[Any, ...]:
    first, second = rng.sample(_LETTERS, 2)
    return ("text", rng.randrange(len(_WORD_TASKS)), rng.randint(2, 6), first, second)


def described(parameters: tuple[Any, ...]) -> tuple[str, str, str]:
    """(argument, what it returns, the expression)."""
    if parameters[0] == "text":
        _, task, k, c, d = parameters
        what, expression = _WORD_TASKS[task]
        return "text", what.format(k=k, c=c, d=d), expression.format(k=k, c=c, d=d)
    _, filter_, map_, fold, k, m = parameters
    chosen, condition = (part.format(k=k) for part in _FILTERS[filter_])
    mapped, value = (part.format(m=m) for part in _MAPS[map_])
    what = f"{mapped}{chosen or 'the numbers'}" + (" in xs" if chosen else " of xs")
    inner = f"{value} for x in xs" + (f" if {condition}" if condition else "")
    told, expression = _FOLDS[fold]
    iterable = f"[{inner}]" if "default" in expression or "sorted" in expression else inner
    if "set(" in expression or "reverse" in expression:
        iterable = f"[{inner}]"
    return "xs", told.format(what=what), expression.format(it=iterable, inner=inner)


def programs(rng: Random, split: Split) -> Item:
    """A list or text function; its tests compare with the right expression's values."""
    parameters = draw(rng, split, _numbers if rng.random() < 0.65 else _words)
    argument, what, expression = described(parameters)
    name = rng.choice(_NAMES)
    prompt = PROMPT.format(name=name, argument=argument, what=what)
    code = f"```python\ndef {name}({argument}):\n    return {expression}\n```"
    inputs = _NUMBERS if argument == "xs" else _TEXTS
    gold = {"name": name, "argument": argument, "expression": expression, "inputs": list(inputs)}
    return Item("programs", (ask(prompt), say(code)), gold=gold)
