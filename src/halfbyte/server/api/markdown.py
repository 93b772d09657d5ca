"""Markdown of an answer as HTML that is safe to put into a page.

Kept libraries do the work: markdown-it-py reads CommonMark with tables, task lists and links,
latex2mathml turns formulas into MathML, Pygments colours code, nh3 lets through what is listed here
and nothing else. Raw HTML stays text, images become links, and no address but a web or mail one is
a link. What takes too long by its size stays as it was written.
"""

import html
from collections.abc import Sequence
from typing import Any

import latex2mathml.converter
import nh3
import pygments
import pygments.formatters
import pygments.lexers
import pygments.util
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.amsmath import amsmath_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.tasklists import tasklists_plugin

# One block of an answer has less, and a page sends blocks one by one. What is built to take long
# takes a second at this size, and ten at three times as much.
MAX_CHARS = 16_384
# Above these a formula stays LaTeX and code has no colours: both are read by backtracking.
_MAX_FORMULA_CHARS = 2_000
_MAX_CODE_CHARS = 20_000
_MAX_NESTING = 20

_MATHML = {
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "mover",
    "munder", "munderover", "mfrac", "msqrt", "mroot", "mtable", "mtr", "mtd", "mpadded",
    "mphantom", "menclose", "mstyle", "mmultiscripts", "mprescripts", "none", "semantics",
}  # fmt: skip
_TAGS = _MATHML | {
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre",
    "blockquote", "ul", "ol", "li", "input", "a", "span", "div", "table", "thead", "tbody", "tr",
    "th", "td",
}  # fmt: skip
_MATHML_ATTRIBUTES = {
    "display", "displaystyle", "scriptlevel", "stretchy", "fence", "form", "lspace", "rspace",
    "mathvariant", "accent", "accentunder", "minsize", "maxsize", "width", "height", "depth",
    "columnalign", "rowspacing", "columnspacing", "linethickness", "separator", "movablelimits",
    "largeop", "symmetric", "notation",
}  # fmt: skip
_ATTRIBUTES: dict[str, set[str]] = {
    **dict.fromkeys(_MATHML, _MATHML_ATTRIBUTES),
    "a": {"href", "title"},
    "code": {"class"},
    "span": {"class"},
    "div": {"class"},
    "li": {"class"},
    "ul": {"class"},
    "ol": {"class", "start"},
    "th": {"class"},
    "td": {"class"},
    "pre": {"class"},
    "input": {"type", "disabled", "checked"},
}
_CODE = pygments.formatters.HtmlFormatter(nowrap=True)
_STYLES = {"light": "friendly", "dark": "github-dark"}


def render(text: str) -> str:
    """HTML of a piece of Markdown, made of the listed tags only.

    Longer texts than MAX_CHARS, and what a library fails on, come back as escaped text.
    """
    if len(text) > MAX_CHARS:
        return _plain(text)
    try:
        made = _PARSER.render(text)
    except (ValueError, IndexError, KeyError, AttributeError, RecursionError):
        # Foreign parsers, hostile text: the answer is shown all the same.
        return _plain(text)
    cleaned: str = nh3.clean(
        made,
        tags=set(_TAGS),
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    return cleaned


def code_styles() -> str:
    """The style sheet of coloured code: light, and dark where the page or the system is."""
    sheets = {}
    for theme, style in _STYLES.items():
        formatter = pygments.formatters.HtmlFormatter(style=style, nobackground=True)
        sheets[theme] = formatter.get_style_defs
    dark = sheets["dark"]([':root:not([data-theme="light"]) .code pre'])
    return "\n".join(
        [
            sheets["light"]([".code pre"]),
            f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}",
            sheets["dark"]([':root[data-theme="dark"] .code pre']),
        ]
    )


def _plain(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _formula(latex: str, *, is_block: bool) -> str:
    if len(latex) <= _MAX_FORMULA_CHARS:
        try:
            return str(
                latex2mathml.converter.convert(latex, display="block" if is_block else "inline")
            )
        # It raises errors of many kinds for LaTeX that it does not know.
        except Exception:
            pass
    shown = f"<code>{html.escape(latex)}</code>"
    return f"<p>{shown}</p>" if is_block else shown


def _code(text: str, language: str, _attributes: str) -> str:
    """Coloured code, or an empty string, for which the parser escapes it."""
    if len(text) > _MAX_CODE_CHARS or not language:
        return ""
    try:
        lexer = pygments.lexers.get_lexer_by_name(language)
    except pygments.util.ClassNotFound:
        return ""
    return str(pygments.highlight(text, lexer, _CODE))


def _fence(_renderer: Any, tokens: Sequence[Token], index: int, options: Any, _env: Any) -> str:
    """A block of code under a bar with its language; the page adds the button."""
    token = tokens[index]
    words = token.info.split(maxsplit=1)
    language = words[0] if words else ""
    shown = _code(token.content, language, "") or html.escape(token.content)
    return (
        f'<div class="code"><div class="bar"><span>{html.escape(language)}</span></div>'
        f"<pre><code>{shown}</code></pre></div>"
    )


def _table(_renderer: Any, tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    return '<div class="table"><table>' if tokens[index].nesting == 1 else "</table></div>"


def _cell(_renderer: Any, tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    """A cell with its alignment as a class: style attributes are not allowed in the page."""
    token = tokens[index]
    style = str(token.attrs.get("style", ""))
    side = style.partition("text-align:")[2]
    return f'<{token.tag} class="{side}">' if side else f"<{token.tag}>"


def _math_inline(_renderer: Any, tokens: Sequence[Token], index: int, _o: Any, _env: Any) -> str:
    return _formula(tokens[index].content, is_block=False)


def _math_block(_renderer: Any, tokens: Sequence[Token], index: int, _o: Any, _env: Any) -> str:
    return _formula(tokens[index].content, is_block=True)


def _brackets(state: StateInline, silent: bool) -> bool:
    """An inline rule: LaTeX between \\( and \\), or \\[ and \\], as models write it."""
    start = state.pos
    opening = state.src[start : start + 2]
    closing = {"\\(": "\\)", "\\[": "\\]"}.get(opening)
    if closing is None:
        return False
    end = state.src.find(closing, start + 2, state.posMax)
    latex = state.src[start + 2 : end].strip()
    if end < 0 or not latex:
        return False
    if not silent:
        kind = "math_inline" if closing == "\\)" else "math_inline_double"
        state.push(kind, "math", 0).content = latex
    state.pos = end + 2
    return True


def _make_parser() -> MarkdownIt:
    options = {"html": False, "linkify": True, "maxNesting": _MAX_NESTING}
    parser = MarkdownIt("gfm-like", options)
    # An image would be fetched from wherever the model says; its address stays a link.
    parser.disable("image")
    parser.use(tasklists_plugin)
    parser.inline.ruler.before("escape", "brackets", _brackets)
    parser.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False)
    parser.use(amsmath_plugin)
    rules = {
        "fence": _fence,
        "code_block": _fence,
        "table_open": _table,
        "table_close": _table,
        "th_open": _cell,
        "td_open": _cell,
        "math_inline": _math_inline,
        "math_inline_double": _math_block,
        "math_block": _math_block,
        "amsmath": _math_block,
    }
    for name, rule in rules.items():
        parser.add_render_rule(name, rule)
    return parser


_PARSER = _make_parser()
