"""Markdown that text from outside cannot leave: `md` escapes every value that is not Markdown.

The grammar is CommonMark's with GitHub's tables, which the hub draws. A value stays on its line, in
its cell and is shown as it was written: no markup, no heading, no HTML, no link but that of a bare
address to itself.
"""

import re
import string
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

# What means something inside a line: code, emphasis, links, HTML, entities, cells, formulas. An
# underscore within a word and an ampersand before a blank are nothing but themselves.
_SIGNS = re.compile(r"[\\`*\[\]<>|$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|&(?=[#A-Za-z])")
# What means something at the beginning of a line only: headings, lists, fences, rules.
_OPENING = re.compile(r"#{1,6}(?=\s|$)|[-+=](?![0-9A-Za-z.])|(?P<number>\d{1,9})(?=[.)](?:\s|$))")
# Control characters have no place in a card, and neither has what turns the direction of text.
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class Markdown(str):
    """Text that is Markdown already, as `md` makes it."""

    __slots__ = ()


def one_line(text: str) -> str:
    """Text on one line: runs of blanks and control characters become one blank.

    Half a surrogate pair, which UTF-8 does not have, becomes a question mark.
    """
    return " ".join(_UNSEEN.sub(" ", text).encode("utf-8", "replace").decode("utf-8").split())


def escape(value: object) -> Markdown:
    """A value as Markdown that shows just its text. Markdown stays as it is."""
    if isinstance(value, Markdown):
        return value
    text = _SIGNS.sub(lambda found: "\\" + found.group(), one_line(str(value)))
    opening = _OPENING.match(text)
    if opening is None:
        return Markdown(text)
    at = opening.end("number") if opening["number"] else 0
    return Markdown(f"{text[:at]}\\{text[at:]}")


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Markdown):
            return value
        return escape(super().format_field(value, format_spec))


def md(template: str, *values: object, **named: object) -> Markdown:
    """`template.format(...)`, values escaped. The template is ours and is Markdown."""
    return Markdown(_Formatter().vformat(template, values, named))


def join(separator: str, parts: Iterable[object]) -> Markdown:
    """Parts, escaped where they are not Markdown, with our own separator between them."""
    return Markdown(separator.join(escape(part) for part in parts))


def code(value: object) -> Markdown:
    """A code span, in which nothing but its own fence means anything. Not for cells of tables."""
    text = one_line(str(value))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return Markdown(f"{fence}{pad}{text}{pad}{fence}")


def link(text: object, target: str) -> Markdown:
    """A link to a file beside the card; the target is a relative path."""
    return Markdown(f"[{escape(text)}]({quote(one_line(target))})")


def hub_link(name: str, kind: str = "") -> Markdown:
    """A link to a model on the hub, or with the kind `datasets/` to a data set."""
    return Markdown(f"[{escape(name)}](https://huggingface.co/{kind}{quote(one_line(name))})")


def row(cells: Sequence[object]) -> Markdown:
    """Write one row of a Markdown table, its cells escaped."""
    return Markdown("| " + " | ".join(escape(cell) for cell in cells) + " |")


def rule(count: int) -> Markdown:
    """The line below the head of a table."""
    return Markdown("|---" * count + "|")
