"""The one letter extractor of the three multiple-choice benchmarks.

Four rules, from most to least explicit; the first that gives a letter of this item decides. There
is no last resort: a text that states no letter is unparsed, it is not guessed from.
Source: ../shared/reference/evaluations.md section 5 (rules and cases).
"""

import re

from halfbyte.evals.types import Score, right_or_wrong, unparsed

_MARKS = re.compile(r"\\[()\[\]]|[*_$]")
_WRAPPER = re.compile(r"\\(?:text(?:bf|rm|it|sf)?|math(?:rm|bf|sf))\s*\{([^{}]*)\}")
# The example in an echoed instruction: "(for example 'Answer: A')".
_ECHO = re.compile(r"\(for example[\s'\"`]*answer:[^)\n]*\)", re.IGNORECASE)

# "Answer: (B)", but neither the echoed "A/B/C/D" nor "Answer: I think".
_STATED = re.compile(
    r"answer\s*:\s*[(\[{]?\s*(?:\\boxed\s*\{\s*)?[(\[]?\s*"
    r"(?P<letter>[a-z])(?![a-z0-9])(?!\s*/\s*[a-z](?![a-z0-9]))",
    re.IGNORECASE,
)
_PROSE_AFTER = re.compile(r" +[a-z]")
_BOXED_LETTER = re.compile(r"\s*(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*(?:$|[).:,]))")
# Upper case only: in prose a lower-case "(b)" names a part of the question as often as an option.
# "The answer is (C) is incorrect" states no answer.
_NOT_DENIED = r"(?!\)?\s+is\s+(?:incorrect|wrong|not)\b)"
_PHRASES = (
    re.compile(
        r"(?i:answer\s+is\s*:?\s+(?:(?:option|choice)\s+)?(?:\\boxed\s*\{\s*)?)"
        rf"\(?\s*([A-Z])(?![A-Za-z0-9'’]){_NOT_DENIED}"
    ),
    re.compile(r"(?<![A-Za-z0-9])\(?([A-Z])\)?\s+is\s+the\s+correct\s+(?:answer|option|choice)\b"),
    re.compile(r"(?i:correct\s+(?:option|answer|choice)\s*:\s*)\(?\s*([A-Z])(?![A-Za-z0-9'’])"),
)
_LONE_LETTER = re.compile(r"[(\[{]?\s*([A-Za-z])\s*[)\]}]?\s*\.?")


def extract_letter(text: str, letters: str) -> str | None:
    """The option letter that a final answer states, or None.

    text     the final answer only, reasoning already removed
    letters  the valid letters of this item, such as "ABCD"

    Example: ``extract_letter("**Answer:** (b)", "ABCD") == "B"``;
    ``extract_letter("Answer: J", "ABCD") is None``.
    """
    cleaned = _clean(text)
    for rule in (_stated_letters, _boxed_letters, _phrased_letters, _last_line_letters):
        # Within a rule the last letter that the item has wins.
        valid = [letter for letter in rule(cleaned) if letter in letters]
        if valid:
            return valid[-1]
    return None


def grade_letter(gold: str, letters: str, text: str) -> Score:
    """Score an answer to a multiple-choice item by letter equality."""
    letter = extract_letter(text, letters)
    return unparsed() if letter is None else right_or_wrong(letter == gold.upper(), letter)


def last_boxed(text: str, commands: tuple[str, ...] = ("\\boxed", "\\fbox")) -> str | None:
    r"""Content of the last closed ``\boxed{...}``; braces are counted, not matched greedily."""
    best: tuple[int, str] | None = None
    for command in commands:
        for match in re.finditer(re.escape(command) + r"\s*\{", text):
            content = _balanced(text, match.end())
            if content is not None and (best is None or match.start() > best[0]):
                best = (match.start(), content)
    return None if best is None else best[1]


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for position in range(start, len(text)):
        character = text[position]
        if character in "{}" and (position == 0 or text[position - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start:position]
    return None


def _clean(text: str) -> str:
    without_marks = _ECHO.sub("", _MARKS.sub("", text))
    return _WRAPPER.sub(r"\1", without_marks)


def _is_word(letter: str, text: str, end: int) -> bool:
    """Whether an A or I goes on as prose: "I think", "a function"."""
    return letter in "IA" and _PROSE_AFTER.match(text, end) is not None


def _stated_letters(text: str) -> list[str]:
    found = [(match["letter"].upper(), match.end()) for match in _STATED.finditer(text)]
    return [letter for letter, end in found if not _is_word(letter, text, end)]


def _boxed_letters(text: str) -> list[str]:
    content = last_boxed(text, ("\\boxed",))
    match = _BOXED_LETTER.match(content) if content is not None else None
    return [] if match is None else [(match[1] or match[2]).upper()]


def _phrased_letters(text: str) -> list[str]:
    found = [
        (match.start(1), match[1])
        for phrase in _PHRASES
        for match in phrase.finditer(text)
        if not _is_word(match[1], text, match.end())
    ]
    return [letter for _, letter in sorted(found)]


def _last_line_letters(text: str) -> list[str]:
    lines = text.strip().splitlines()
    match = _LONE_LETTER.fullmatch(lines[-1].strip()) if lines else None
    return [] if match is None else [match[1].upper()]
