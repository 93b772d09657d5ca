r"""Grade answers whose gold is an integer (AIME): find the box, compare, math-verify as the rest.

An integer in the box is compared as an integer here; anything else goes to math-verify in a child
process, because sympy may compute for ever on an expression such as ``9^{9^{9}}`` and
math-verify's own time limit needs the main thread.
Source: ../shared/reference/evaluations.md section 3.5.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading.letters import last_boxed
from halfbyte.evals.types import Score, right_or_wrong, unparsed

TIME_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 2 << 30

_ANSWER_LINE = re.compile(r"answer\s*:[ \t*]*(\S[^\n]*)", re.IGNORECASE)
_TEXT_WITH_NUMBER = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*\d[^{}]*)\}")
_TEXT_WITHOUT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{[^{}]*\}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°")
_SPACES = re.compile(r"\\[,;:! ]|\\quad|~|\s+")
_LEADING_NAME = re.compile(r"^[^=\d]*=")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INTEGER = re.compile(r"([+-]?\d+)(?:\.0*)?")


def extract_number(text: str) -> str | None:
    """What the answer gives as its number: the last box, else the last ``Answer:`` line."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    lines = _ANSWER_LINE.findall(text)
    return lines[-1].strip().strip("*").strip() if lines else None


def read_integer(expression: str) -> int | None:
    r"""The integer that an answer writes, or None if it writes something else.

    Examples: ``070`` -> 70; ``70.0`` -> 70; ``x = 1{,}024`` -> 1024; ``\text{70}^\circ`` -> 70;
    ``\frac{140}{2}`` -> None.
    """
    bare = simplify(expression)
    match = _INTEGER.fullmatch(bare)
    return int(match[1]) if match else None


def simplify(expression: str) -> str:
    """Strip what does not change the number: text, dollars, degrees, separators, a name."""
    bare = expression.replace("$", "").replace("\\(", "").replace("\\)", "").replace("{,}", ",")
    bare = _TEXT_WITH_NUMBER.sub(r"\1", bare)
    bare = _TEXT_WITHOUT.sub("", bare)
    bare = _DEGREES.sub("", bare)
    bare = _SPACES.sub("", bare)
    bare = _LEADING_NAME.sub("", bare)
    bare = _THOUSANDS.sub("", bare)
    bare = bare.strip("*").rstrip(".\\")
    while len(bare) > 1 and bare[0] == "{" and bare[-1] == "}":
        bare = bare[1:-1]
    return bare


def equals_by_math_verify(gold: int, expression: str) -> bool:
    """Whether an expression is worth `gold`, by math-verify without its own time limit.

    May compute without end; `equals_in_child` bounds it. Raises UnsupportedError without
    the package.
    """
    try:
        # Optional dependency, extra `eval`; and sympy takes a second to import.
        from math_verify import parse, verify
        from sympy import Integer  # type: ignore[import-untyped]
    except ImportError as missing:
        raise UnsupportedError(
            f"grading expressions needs math-verify ({missing}); pip install 'halfbyte[eval]'"
        ) from missing
    parsed = parse(f"\\boxed{{{expression}}}", parsing_timeout=None)
    return bool(verify([Integer(gold)], parsed, timeout_seconds=None))


@lru_cache(maxsize=4096)
def equals_in_child(gold: int, expression: str) -> bool:
    """`equals_by_math_verify` in a child with bounded time and memory; over either is not equal."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "halfbyte.evals.grading.numbers"],
            input=json.dumps([gold, expression]),
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if child.returncode == 3:
        raise UnsupportedError(child.stderr.strip())
    return child.returncode == 0 and child.stdout.strip() == "true"


def grade_number(
    gold: int, text: str, equals: Callable[[int, str], bool] = equals_in_child
) -> Score:
    """Score an answer against an integer gold."""
    expression = extract_number(text)
    if expression is None or not expression.strip():
        return unparsed()
    integer = read_integer(expression)
    if integer is not None:
        return right_or_wrong(integer == gold, str(integer))
    # Without a digit no expression of a contest answer is a number; sympy need not be asked.
    if not any(character.isdigit() for character in expression):
        return right_or_wrong(False, expression[:200])
    return right_or_wrong(equals(gold, expression), expression[:200], by="math-verify")


def _child() -> int:
    """Entry point of the bounded child: [gold, expression] on stdin, true or false on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT_S, TIME_LIMIT_S))
    gold, expression = json.load(sys.stdin)
    try:
        verdict = equals_by_math_verify(gold, expression)
    except UnsupportedError as missing:
        sys.stderr.write(str(missing))
        return 3
    except (ArithmeticError, ValueError, TypeError, MemoryError, RecursionError):
        verdict = False
    sys.stdout.write(json.dumps(verdict))
    sys.stdout.flush()
    # Sympy leaves nothing to clean up, and tearing it down costs a third of the time.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(_child())
