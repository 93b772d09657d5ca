"""Markdown for the page: what it makes, that nothing else comes through, and how long it takes."""

import time
from html.parser import HTMLParser

import hypothesis
import pytest
from hypothesis import strategies as st

from halfbyte.server.api import markdown
from halfbyte.server.api.markdown import MAX_CHARS, code_styles, render
from server.conftest import MakeBench


class Tags(HTMLParser):
    """Every tag and attribute of some HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# What breaks out of HTML, Markdown, formulas and code, in any order.
_PARTS = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        '"',
        "'",
        "<",
        ">",
        "&lt;",
        "\n",
        "](javascript:alert(1))",
        "[a",
        "![b](http://x/y.png)",
        "<http://a.b/\"onclick='x'>",
        "`",
        "```html\n",
        "\n```\n",
        "$",
        "$$",
        r"\(",
        r"\)",
        r"\[",
        r"\]",
        r"\text{<b>}",
        r"\href{x}",
        "| a | b |\n|:-:|--:|\n",
        "- [x] ",
        "> ",
        "# ",
        "&#106;avascript:",
        "\x00",
        "\u202e",
        "é",
        r"\begin{align}",
        r"\end{align}",
        r"\class{x}{y}",
        r"\style{a}{b}",
        "{",
        "}",
        "https://a.b",
    ]
)


@hypothesis.given(st.lists(_PARTS, max_size=25).map("".join))
@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_only_listed_tags_and_addresses_come_through(text: str) -> None:
    for tag, attributes in Tags(render(text)).seen:
        assert tag in markdown._TAGS
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "id")
            if name == "href":
                assert value is not None and value.startswith(("http://", "https://", "mailto:"))


@pytest.mark.parametrize(
    "text, part",
    [
        ("# a", "<h1>a</h1>"),
        ("~~a~~", "<s>a</s>"),
        ("| a |\n|--:|\n| 1 |", '<td class="right">1</td>'),
        ("- [x] a", "checkbox"),
        ("see https://a.example/b", '<a href="https://a.example/b"'),
        ("```py\nx = 1\n```", '<span class="n">x</span>'),
        ("```nosuchlanguage\nx < 1\n```", "x &lt; 1"),
        ("$a^2$", "<msup>"),
        (r"\(a^2\)", "<msup>"),
        (r"so \[ a^2 \] it is", '<math display="block">'),
        ("$$\n\\frac{1}{2}\n$$", "<mfrac>"),
        ("\\begin{align}a &= b\\end{align}", "<mtable"),
        (r"$\nosuchcommand{x}$", "nosuchcommand"),
        ("it costs $5 and $6", "it costs $5 and $6"),
    ],
)
def test_what_is_made(text: str, part: str) -> None:
    assert part in render(text)


SLOW = ["*", "`", "> ", "[", "|", "- ", "**a", "a\n", "```\n", "1. a\n\n", "$a", r"\(", "![["]
SLOW += ["\\[ x\n", "<", "http://", "_a", "[a](", "{", r"\frac", "a_", "$$", "~", "\\", "&", "#"]


@pytest.mark.parametrize("part", SLOW)
def test_what_is_built_to_take_long_does_not(part: str) -> None:
    text = (part * MAX_CHARS)[:MAX_CHARS]
    begun = time.process_time()
    render(text)
    assert time.process_time() - begun < 5
    assert "<pre>" not in render("x" * MAX_CHARS)
    assert "<pre>" in render("x" * (MAX_CHARS + 1))


def test_code_has_colours_by_theme() -> None:
    sheet = code_styles()
    assert 'data-theme="dark"' in sheet and "prefers-color-scheme" in sheet
    assert ".code pre .k" in sheet and "url(" not in sheet and "import" not in sheet


async def test_the_page_may_be_read_without_a_key_and_used_with_one(make_bench: MakeBench) -> None:
    bench = make_bench("x", 2, api_keys=("k",))
    async with bench.http() as http:
        page = await http.get("/")
        assert (
            page.status_code == 200
            and "script-src 'self'" in page.headers["content-security-policy"]
        )
        for name in ("app.js", "style.css", "code.css", "text.js"):
            assert (await http.get(f"/web/{name}")).status_code == 200
        assert (await http.get("/web/../app.py")).status_code in (401, 404)
        refused = await http.post("/web/render", json={"text": "a"})
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        headers = {"Authorization": "Bearer k"}
        made = await http.post("/web/render", json={"text": "**a**"}, headers=headers)
    assert made.json() == {"html": "<p><strong>a</strong></p>\n"}
