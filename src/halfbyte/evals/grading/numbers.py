r"""Grade answers whose gold is an integer (AIME): find the box, compare, math-verify as the rest.

An integer in the box is compared as an integer here; anything else goes to math-verify in a child
process, because sympy may compute for ever on an expression such as ``9^{9^{9}}`` and
math-verify's own time limit needs the main thread.
Rules: docs/reference/scoring.md#integers.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache

from halfbyte.errors import UnsupportedError, how_to_get
from halfbyte.evals.grading.statements import FORMAL, HEADING, last_boxed, without_marks
from halfbyte.evals.types import Score, right_or_wrong, unparsed

TIME_LIMIT_S = 20
MEMORY_LIMIT_BYTES = 2 << 30
MISSING = 3  # exit code of the child: the package is not there

# What ends the number on an answer's line: punctuation, a remark, the next sentence, a closing
# brace or tag.
_LINE_NUMBER = re.compile(
    r"(?P<number>[^\n]*?\d[\d,.]*[)\]]*)\s*(?:[.,;:!}|]+(?=\s|$)\s*|[-–—](?=\s)\s*|"
    r"\()(?P<remark>[^\n]*)$"
)
_LONGEST = 4000  # characters; a longer expression is no integer with a dress
_DECORATION = " \t✅✔🎉🎯⭐\ufe0f"
_MORE = re.compile(
    r"(?:(?:or|oder|ou|o|of)?\s*(?:maybe|perhaps|possibly)\b|[,;(]|and\b|or\b|und\b|oder\b|et\b|"
    r"ou\b|y\b|o\b|e\b|en\b|of\b)*\s*[-+(\[]?\d",
    re.IGNORECASE,
)
_BETWEEN = re.compile(
    r"(?<=[\d})\]])\s*[(\[]?\s*(?:\\text\s*\{\s*)?(?:\\(?:lor|land|vee|wedge|quad)(?![A-Za-z])|"
    r"and\b|or\b|und\b|oder\b|et\b|ou\b|"
    r"to\b|maybe\b|perhaps\b|possibly\b|或|和|または|と|또는|و)\s*\}?\s*(?=[\\\-+\d({])",
    re.IGNORECASE,
)
_TWO_BOXES = re.compile(
    r"\\f?boxed\s*\{([^{}]*)\}\s*(?:,?\s*(?:and|or|und|oder|et|ou|y|o|e|en|of)\b|"
    r"[,;、或和]|または|と|또는|와|أو|و)"
    r"\s*\\f?boxed\s*\{([^{}]*)\}"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|tt|normal)?|math(?:rm|bf|sf|it|tt)|mbox|hbox|"
    r"operatorname)\s*\{([^{}]*)\}"
)
_MODULUS = re.compile(
    r"[,;]?\s*[(\[]?\s*(?:\\(?:pmod|bmod|mod|pod)|\\?\bmod(?:ulo)?\b\.?)\s*\{?\s*\d+\s*\}?\s*[)\]]?"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°|\\(?:degree|deg)\b")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|\\(?:thinspace|hspace\{[^{}]*\})|~|\s+")
_LEADING_NAME = re.compile(r"^(?:[^=\d]*(?:=|\\equiv|\\Rightarrow|\\implies|:))+")
_LEADING_WORDS = re.compile(r"^(?:the )?(?:final |correct )?answer(?: is)?[ :]*", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?![\d,])")
# Units behind the number: words, not single letters, which would be variables.
_UNIT = re.compile(
    r"(?<=\d) ?(?:(?:k?m|g|s|J|N|W)/(?:s|h|m|g|kg|min|mol)|[^\W\d_]{2,})(?:[ ^-]?[^\W\d_]*|"
    r"\^?\{?[23]\}?)*$"
)
_REMARK = re.compile(r"(?<=\d)\s*\([^()\d]*\)$")
_NO_UNIT = re.compile(
    r"\b(?:percent|per ?cent|prozent|pi|thousand|million|billion|hundred|dozen|times|plus|minus|"
    r"pour ?cent|por ?ciento|per ?cento|por ?cento|procent|remainder|factorial|choose|squared|"
    r"cubed|mod|base|degrees? (?:f|c)|or|and|to|over|half|sqrt|log|ln|sin|"
    r"cos|tan|in base|th|st|nd|rd)\b",
    re.IGNORECASE,
)
_PERCENT = re.compile(
    r"\d(?:\s|\\[,;:! ]|~)*\\?[%‰]|\b(?:per\s?cent|percent|pour\s?cent|por\s?ciento|per\s?cento|"
    r"por\s?cento|"
    r"prozent|procent)\b|퍼센트|パーセント|بالمئة|بالمائة",
    re.IGNORECASE,
)
# Not equal, a bound, another base, a division's rest, an ordinal: not that number, though an
# algebra system may read it as one.
_NOT_EQUAL = re.compile(
    r"[<>≠≤≥≥]|\\(?:n?eq?|not|[lg]eq?q?|[lg]eqslant|lt|gt)(?![A-Za-z])|\d\}?\s*_\s*\{?\s*\d|"
    r"\bremainder\b|"
    r"\d(?:st|nd|rd|th)\b|\d\s+(?:is|are)\s+(?:not|wrong|incorrect|false)\b",
    re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"\b(?:wait|actually|no|sorry|correction|hmm+|oops|hold\s+on|on\s+second\s+thought)\b",
    re.IGNORECASE,
)
_UNSAID = re.compile(
    r"\b(?:that|this|it)(?:['’]?s|\s+is|\s+was)\s+(?:wrong|incorrect|not\s+right|not\s+correct|"
    r"a\s+mistake)\b",
    re.IGNORECASE,
)
_SAID_ANEW = re.compile(
    r"\banswer\s+(?:is|must\s+be|should\s+be)\s+(?:therefore\s+|"
    r"actually\s+)?(?P<number>[-+]?\d[\d,]*)\b",
    re.IGNORECASE,
)
_LIST = re.compile(r"\d\}?\s*[,;]\s*(?:\\[,;! ]\s*)*(?:[A-Za-z]\s*=\s*)?\{?[-+]?\d")
_INTEGER = re.compile(r"([+-]?\d+)(?:\.0*)?")


def extract_number(text: str) -> str | None:
    """What the answer gives as its number: the last box, else the last ``Answer:`` line.

    The text's dress is taken off (`statements.plain`), and what follows the number on its line:
    "70, as required" is 70, but "70, 80" stays what it is.
    """
    bare = without_marks(text)
    boxed = last_boxed(bare)
    if boxed is not None:
        joined = [
            match for match in _TWO_BOXES.finditer(bare) if match[1].strip() != match[2].strip()
        ]
        # Boxes on the way are followed by others; only the last one can be one of two.
        if joined and "\\boxed" not in bare[joined[-1].end() :]:
            return f"{joined[-1][1].strip()}, {joined[-1][2].strip()}"
        return boxed.strip()
    last = max(
        (match for key in (FORMAL, HEADING) for match in key.finditer(bare)),
        key=lambda match: match.end(),
        default=None,
    )
    if last is None:
        return None
    rest = bare[last.end() :]
    line = rest.split("\n", 1)[0].strip()
    # "Wait, the answer is 80" replaces what stood there, "Wait, that is wrong" leaves nothing.
    retracted = _RETRACTED.search(rest)
    if retracted is not None:
        anew = [match["number"] for match in _SAID_ANEW.finditer(rest, retracted.start())]
        if anew:
            return anew[-1].rstrip(",")
        if _UNSAID.search(rest, retracted.start()):
            return None
    match = _LINE_NUMBER.match(line)
    if match is None or _MORE.match(match["remark"]):
        return line.rstrip(_DECORATION) or None
    number = match["number"].strip()
    return number if number[0] in "([" else number.rstrip(")]")


def read_integer(expression: str) -> int | None:
    r"""The integer that an answer writes, or None if it writes something else.

    Examples: ``070`` -> 70; ``70.0`` -> 70; ``x = 1{,}024`` -> 1024; ``\text{70}^\circ`` -> 70;
    ``70 \pmod{1000}`` -> 70; ``70\%``, ``70, 80``, ``7 0`` and ``\frac{140}{2}`` -> None.
    """
    if len(expression) > _LONGEST:
        return None
    bare = simplify(without_marks(expression))
    match = _INTEGER.fullmatch(bare)
    return int(match[1]) if match and len(match[1]) < 1000 else None


def is_several(expression: str) -> bool:
    """Whether an answer names more than one number: "70 or 80", "70, 80"."""
    bare = _SPACES.sub(" ", without_marks(expression).replace("{,}", ","))
    return bool(_BETWEEN.search(bare) or _LIST.search(_THOUSANDS.sub("0", bare)))


def simplify(expression: str) -> str:
    """Strip what does not change the number: text, degrees, separators, a modulus, a name."""
    bare = expression.replace("{,}", ",").replace("\\{", "{").replace("\\}", "}")
    if _PERCENT.search(bare) or is_several(bare):
        return bare
    # Text becomes a blank, or the digits on its two sides would become one number.
    bare = _TEXT.sub(lambda match: f" {match[1]} " if re.search(r"\d", match[1]) else " ", bare)
    bare = _SPACES.sub(" ", _DEGREES.sub("", bare))
    bare = _LEADING_WORDS.sub("", _MODULUS.sub("", bare).strip())
    bare = _LEADING_NAME.sub("", bare).strip().strip("*").rstrip(".,\\ ").strip()
    while len(bare) > 1 and bare[0] + bare[-1] in ("{}", "()", "[]"):
        bare = bare[1:-1].strip()
    remark = _REMARK.search(bare)
    if remark is not None and not _NO_UNIT.search(remark[0]):
        bare = bare[: remark.start()]
    bare = _THOUSANDS.sub(lambda match: re.sub(r"[, ]", "", match[0]), bare)
    unit = _UNIT.search(bare)
    if unit is not None and not _NO_UNIT.search(unit[0]):
        bare = bare[: unit.start()]
    return re.sub(r"^([+-]) ", r"\1", bare.strip().rstrip("."))


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
            f"grading expressions needs {missing.name or 'math-verify'}; {how_to_get('eval')}"
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
    if child.returncode == MISSING:
        raise UnsupportedError(child.stderr.strip())
    # Ended by a signal: over its processor time or memory. Any other end is a fault of ours, and a
    # fault must not turn into a wrong answer of the model.
    if child.returncode > 0:
        raise UnsupportedError(
            f"the process that compares expressions failed with exit code {child.returncode}: "
            f"{child.stderr.strip()[-300:]}"
        )
    return child.returncode == 0 and child.stdout.strip() == "true"


def check_algebra() -> None:
    """Compare one expression, as grading will. Raises UnsupportedError if it cannot be done."""
    if not equals_in_child(2, r"\frac{4}{2}"):
        raise UnsupportedError("math-verify finds 4/2 unequal to 2; reinstall 'halfbyte[eval]'")


def grade_number(
    gold: int, text: str, equals: Callable[[int, str], bool] = equals_in_child
) -> Score:
    """Score an answer against an integer gold; symbols are evaluated in a child process."""
    expression = extract_number(text)
    if expression is None or not expression.strip():
        return unparsed()
    # Seventy per cent is no integer, "unequal to 70" none either: the algebra drops such signs.
    if _PERCENT.search(expression) or _NOT_EQUAL.search(expression):
        return right_or_wrong(False, expression[:200])
    integer = read_integer(expression)
    if integer is not None:
        return right_or_wrong(integer == gold, str(integer))
    if is_several(expression):
        return unparsed(several=expression[:200])
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
        return MISSING
    except (ArithmeticError, ValueError, TypeError, MemoryError, RecursionError):
        verdict = False
    sys.stdout.write(json.dumps(verdict))
    sys.stdout.flush()
    # Sympy leaves nothing to clean up, and tearing it down costs a third of the time.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(_child())
