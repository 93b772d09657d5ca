"""The one letter extractor of the three multiple-choice benchmarks.

Four rules, from most to least explicit; the first that gives a letter of this item decides. There
is no last resort: a text that states no letter is unparsed, it is not guessed from.
Source: ../shared/reference/evaluations.md section 5 (rules and cases).
"""

import re

from halfbyte.evals.types import Score, right_or_wrong, unparsed

_MARKS = re.compile(r"\\[()\[\]]|[*_$]")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")

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
    for rule in (_stated_letter, _boxed_letter, _phrased_letter, _last_line_letter):
        letter = rule(cleaned)
        if letter is not None and letter in letters:
            return letter
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
    without_marks = _MARKS.sub("", text)
    return _WRAPPER.sub(r"\1", without_marks)


def _stated_letter(text: str) -> str | None:
    found = None
    for match in _STATED.finditer(text):
        letter = match["letter"].upper()
        if letter in "IA" and _PROSE_AFTER.match(text, match.end()):
            continue
        found = letter
    return found


def _boxed_letter(text: str) -> str | None:
    content = last_boxed(text, ("\\boxed",))
    match = _BOXED_LETTER.match(content) if content is not None else None
    return None if match is None else (match[1] or match[2]).upper()


def _phrased_letter(text: str) -> str | None:
    found: tuple[int, str] | None = None
    for phrase in _PHRASES:
        for match in phrase.finditer(text):
            letter = match[1]
            if letter in "IA" and _PROSE_AFTER.match(text, match.end()):
                continue
            if found is None or match.start(1) > found[0]:
                found = (match.start(1), letter)
    return None if found is None else found[1]


def _last_line_letter(text: str) -> str | None:
    lines = text.strip().splitlines()
    match = _LONE_LETTER.fullmatch(lines[-1].strip()) if lines else None
    return None if match is None else match[1].upper()
