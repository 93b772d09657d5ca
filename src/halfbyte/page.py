"""Every HTML page that a command writes: one template engine that escapes, one security policy.

Text from outside reaches a page through a template's `{{ ... }}` only, where jinja2 escapes it, or
as an attribute or text of a `Mark`, which a template draws. A page names the hash of its own style
sheet and allows nothing else: no script, nothing fetched, no form, no frame.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup


class Mark(NamedTuple):
    """One SVG element: `place` are its attributes, `text` its content, `title` shows on hover."""

    tag: str
    place: Mapping[str, str | float]
    text: str = ""
    title: str = ""


class Cell(NamedTuple):
    """One cell of a table that is more than text.

    text   a line break parts its lines
    small  a second line in small print
    kind   "" or what the cell is: strong, missing, verdict, wrap, code
    """

    text: str
    small: str = ""
    kind: str = ""


class Table(NamedTuple):
    """A table: cells are text, or a `Cell` where they are more."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""


def render_page(
    room: str, template: str, style: str, *, style_room: str | None = None, **values: Any
) -> str:
    """The text of an HTML page: a template, a style sheet and values.

    room        package that holds the template and the style sheet, as "halfbyte.card"
    template    extends "page.html", the frame of every page
    style       a CSS file; the policy admits it by its hash
    style_room  package of the style sheet, where it is not the template's
    values      what the template shows; all of it is escaped
    """
    sheet = resources.files(style_room or room).joinpath(style)
    css = Markup(sheet.read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = _environment(room).get_template(template)
    text = page.render(style=css, policy=policy, **values) + "\n"
    # Records may hold half a surrogate pair, which no UTF-8 file does.
    return text.encode("utf-8", "replace").decode("utf-8")


def drawing(width: float, height: float, marks: Sequence[Mark], *, title: str) -> Markup:
    """An SVG drawing of marks, laid over each other in their order."""
    template = _environment("halfbyte").get_template("drawing.html")
    size = f"{attribute(width)} {attribute(height)}"
    return Markup(template.render(size=size, marks=marks, title=title))


def text_mark(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> Mark:
    """Words at a place; `anchor` says whether x is their start, middle or end."""
    named = {"class": kind} if kind else {}
    return Mark("text", {**named, "x": x, "y": y, "text-anchor": anchor}, text)


def attribute(value: str | float) -> str:
    """An attribute's value: numbers to a hundredth, without zeros that say nothing."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}".rstrip("0").rstrip(".")


@cache
def _environment(room: str) -> jinja2.Environment:
    loaders = [jinja2.PackageLoader(name, "") for name in dict.fromkeys((room, "halfbyte"))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = attribute
    return environment
