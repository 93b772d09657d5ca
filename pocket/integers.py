"""Integers from 0 to 999: several steps of arithmetic, in the thought or not at all."""

from random import Random

from halfbyte.evals.tasks.aime import PROMPT
from pocket.items import Item, Split, ask, draw, effort_of, say
from pocket.words import made_up_name

Steps = tuple[tuple[str, int], ...]
_LIMIT = 9999


def _product(left: int, right: int) -> str:
    """`left * right` for a one-digit `right`, place by place."""
    parts = [int(d) * 10**p for p, d in enumerate(reversed(str(left)))]
    parts = [part for part in reversed(parts) if part]
    if len(parts) < 2:
        return f"{left} * {right} = {left * right}."
    said = [f"{part} * {right} = {part * right}" for part in parts]
    total = parts[0] * right
    for part in parts[1:]:
        said.append(f"{total} + {part * right} = {total + part * right}")
        total += part * right
    return f"{left} * {right}: " + ", ".join(said) + "."


def _quotient(left: int, right: int) -> str:
    """`left / right`, a whole quotient, digit by digit."""
    if left < 10 * right and left <= 81:
        return f"{left} / {right} = {left // right}."
    said, rest, result = [], 0, ""
    for digit in str(left):
        rest = rest * 10 + int(digit)
        quotient, over = divmod(rest, right)
        said.append(f"{rest} = {right} * {quotient} + {over}")
        rest, result = over, result + str(quotient)
    return f"{left} / {right}: " + ", ".join(said) + f", so {int(result)}."


def thought_of(start: int, steps: Steps) -> tuple[str, int]:
    """The working and its result."""
    value, lines = start, []
    for operation, number in steps:
        if operation == "+":
            lines.append(f"{value} + {number} = {value + number}.")
            value += number
        elif operation == "-":
            lines.append(f"{value} - {number} = {value - number}.")
            value -= number
        elif operation == "*":
            lines.append(_product(value, number))
            value *= number
        elif operation == "/":
            lines.append(_quotient(value, number))
            value //= number
        else:
            lines.append(f"The last three digits of {value} are {value % 1000}.")
            value %= 1000
    return " ".join(lines), value


def _steps(rng: Random, count: int) -> tuple[int, Steps]:
    start = value = rng.randint(2, 999)
    steps: list[tuple[str, int]] = []
    while len(steps) < count:
        operation = rng.choice("++--*/")
        if operation == "+":
            number = rng.randint(1, 999)
        elif operation == "-":
            if value < 2:
                continue
            number = rng.randint(1, min(value, 999))
        elif operation == "*":
            number = rng.randint(2, 9)
        else:
            fitting = [n for n in range(2, 10) if value % n == 0 and value >= n]
            if not fitting:
                continue
            number = rng.choice(fitting)
        after = {
            "+": value + number,
            "-": value - number,
            "*": value * number,
            "/": value // number,
        }
        if after[operation] > _LIMIT:
            continue
        value = after[operation]
        steps.append((operation, number))
    if value > 999:
        steps.append(("%", 1000))
    return start, tuple(steps)


_STORY = {
    "+": ("then gets {n} more", "then finds {n} more", "then buys {n} more"),
    "-": ("then gives away {n}", "then loses {n}", "then sells {n}"),
    "*": ("then has {n} times as many",),
    "/": ("then keeps one part of {n} equal parts",),
    "%": ("then keeps only the last three digits of that number",),
}


def problem(rng: Random, start: int, steps: Steps) -> str:
    """The steps as a story or as instructions."""
    if rng.random() < 0.5:
        name = made_up_name(rng)
        told = [rng.choice(_STORY[o]).format(n=n) for o, n in steps]
        return f"{name} has {start} coins, {', '.join(told)}. How many coins does {name} have now?"
    words = {"+": "add {n}", "-": "subtract {n}", "*": "multiply by {n}", "/": "divide by {n}"}
    told = [words[o].format(n=n) if o in words else "take the last three digits" for o, n in steps]
    return f"Start with {start}, {', '.join(told)}. What is the result?"


def integers(rng: Random, split: Split) -> Item:
    """Two to five steps; a thought with effort high, the bare answer with none."""
    start, steps = draw(rng, split, lambda r: _steps(r, r.randint(2, 5)))
    thought, value = thought_of(start, steps)
    effort = effort_of(rng, 0.75)
    prompt = PROMPT.format(problem=problem(rng, start, steps))
    answer = say(f"\\boxed{{{value}}}", thought if effort == "high" else None)
    return Item("integers", (ask(prompt), answer), effort, gold={"number": value})


def drill(rng: Random, split: Split) -> Item:
    """Several single steps in one conversation."""
    effort = effort_of(rng, 0.6)
    turns = []
    value = 0
    signs = {"+": "+", "-": "-", "*": "*", "/": "/"}
    for _ in range(rng.randint(3, 8)):
        start, steps = _steps(rng, 1)
        thought, value = thought_of(start, steps[:1])
        operation, number = steps[0]
        turns += [
            ask(f"What is {start} {signs[operation]} {number}?"),
            say(str(value), thought if effort == "high" else None),
        ]
    return Item("drill", tuple(turns), effort, gold={"text": str(value)})
