"""Nothing that a record, a name or a title holds becomes markup in a page or a card."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import example, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from card.test_render import IDENTITY, checkpoint
from card.test_render import arm as card_arm
from card.test_report import write_arm
from halfbyte.card.base import Base
from halfbyte.card.facts import Arm, ChatFacts, compare_arms, read_arm
from halfbyte.card.given import CardInput, record_names
from halfbyte.card.markdown import code, link, md, one_line, row
from halfbyte.card.render import render_card, write_card
from halfbyte.card.report import render_report
from halfbyte.errors import UsageError
from halfbyte.evals.judging.comparison import Comparison

markdown_it = pytest.importorskip("markdown_it", reason="extra 'eval' brings a Markdown reader")

# What breaks out of text, attributes, style sheets, tables, links, code, lists and front matter.
PIECES = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'onload='x", "</style>",
    "</pre>", "</title>", "-->", "<!--", "]]>", "&lt;b&gt;", "&#60;i&#62;",
    "[a](javascript:alert(1))", "![x](y)", "`", "```", "~~~", "|", "\n", "\n\n", "\n---\n",
    "\n# ", "\n- ", "\n1. ", "\n> ", "\r", "*b*", "__u__", "_e_", "<b>", "{{ 7 * 7 }}",
    "{% raw %}", "{0}", "{title}", "%s", "\\", "\0", "\x1b[2J", "\u202e", "\u2028", "\ud800",
    "===", "---", "+", "#", "1.", "a", " ", "é",
)  # fmt: skip
hostile = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


class Tags(HTMLParser):
    """The tags of a page and the names of their attributes; its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def tags(page: str) -> list[tuple[str, tuple[str, ...]]]:
    # A value may hold line breaks, which a cell of the report draws as such.
    reader = Tags()
    reader.feed(page)
    reader.close()
    return [tag for tag in reader.tags if tag != ("br", ())]


# Fields that are looked up, so that any other text would not be found or not be shown.
_KEYS = {
    "benchmark",
    "name",
    "status",
    "identity",
    "checkpoint",
    "verdict",
    "macro_verdict",
    "cause",
    "format",
}


def filled(value: Any, text: Callable[[], str], name: str = "") -> Any:
    """The same with each of its texts replaced, in whatever depth; numbers and keys stay."""
    if isinstance(value, str):
        return value if name in _KEYS or not value else text()
    if isinstance(value, Path):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            f.name: filled(getattr(value, f.name), text, f.name) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    if isinstance(value, Mapping):
        return {key: filled(one, text, str(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [filled(one, text) for one in value]
    return value


def in_turn(texts: list[str]) -> Callable[[], str]:
    number = itertools.count()
    return lambda: texts[next(number) % len(texts)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Arm], Comparison]:
    folder = tmp_path_factory.mktemp("arms")
    arms = [read_arm(write_arm(folder, name, n)) for name, n in (("fp8", 12), ("mixed", 9))]
    arms = [
        dataclasses.replace(
            arm,
            run=dataclasses.replace(
                arm.run, judge={"model": "j"},
                checkpoint={"note": "n", "headers sha256": "h", "identity": IDENTITY},
                sandbox={"kind": "s"}, packages={"p": "1"},
            ),
        )
        for arm in arms
    ]  # fmt: skip
    comparison = compare_arms(arms)
    assert comparison is not None
    remarked = dataclasses.replace(comparison, remarks=["remark"], left_out={"aime2025": "why"})
    return arms, remarked


def test_every_text_field_of_the_records_is_reached(
    compared: tuple[list[Arm], Comparison],
) -> None:
    """The property below means nothing for a field that `filled` leaves alone."""
    number = iter(range(10_000))
    arms, comparison = filled(list(compared), lambda: f"T{next(number)}T")
    for one in (arms[0].run, arms[0].run.benchmarks["ifbench"], comparison):
        for name, kind in get_type_hints(type(one)).items():
            if kind is str and name not in _KEYS and getattr(one, name):
                assert re.fullmatch(r"T\d+T", getattr(one, name)), name


@settings(max_examples=25, deadline=None)
@drawn(st.lists(hostile, min_size=5, max_size=5))
def test_no_text_of_a_record_becomes_a_tag_of_the_report(
    compared: tuple[list[Arm], Comparison], texts: list[str]
) -> None:
    page, plain = (
        render_report(*filled(list(compared), in_turn(given)))
        for given in (texts, [f"x{texts.index(text)}" for text in texts])
    )
    assert tags(page) == tags(plain)
    page.encode()


def test_text_is_shown_as_it_was_written(compared: tuple[list[Arm], Comparison]) -> None:
    text = """<script>alert("1")</script> & 'it'"""
    arms, comparison = filled(list(compared), lambda: text)
    reader = Tags()
    reader.feed(render_report(arms, comparison))
    shown = "".join(reader.text)
    assert shown.count(text) > 40 and "script" not in dict(reader.tags)


def test_a_page_admits_its_own_style_and_nothing_else(
    compared: tuple[list[Arm], Comparison],
) -> None:
    reader = Tags()
    reader.feed(render_report(*compared))
    policy = next(text for text in reader.attributes if text.startswith("default-src"))
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/]{43}='; base-uri 'none'; form-action 'none'",
        policy,
    )
    assert not any(name.startswith("on") or name == "style" for _, n in reader.tags for name in n)


# --- the card


def drawn_tags(text: str) -> list[str]:
    """Kinds of tokens of Markdown as the hub reads it, with raw HTML on."""
    reader = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = []
    for token in reader.parse(text):
        found.append(token.type)
        # Runs of text are split wherever an escape stood.
        found += [
            f"  {child.type}"
            for child in token.children or ()
            if child.type not in ("text", "text_special")
        ]
    return found


@settings(max_examples=25, deadline=None)
@drawn(hostile, hostile)
def test_no_value_becomes_markdown(one: str, two: str) -> None:
    forms: tuple[Callable[[str, str], str], ...] = (
        lambda a, b: md("# {}\n\n- **Note:** {} and {}\n\n{} and\n{} again.", a, b, a, b, a),
        lambda a, b: md("{}", a),
        lambda a, b: md("x {}{} y", a, b),
        lambda a, b: md("**{}** [{}](file.json) {}", a, b, link(a, "r/x y).json")),
        lambda a, b: row([a, b, "x"]) + "\n|---|---|---|\n" + row([b, a, 1.5]),
        lambda a, b: md("a {} b {}.", code(a), code(b)),
    )
    for form in forms:
        text = form(one, two)
        # Text without any letter leaves a blank; a word stands for it.
        plain = form("word" if one_line(one) else "", "word" if one_line(two) else "")
        assert drawn_tags(text) == drawn_tags(plain), text
        text.encode()


def test_markdown_shows_what_was_written() -> None:
    text = "<b>*x* [y](z) `c` a_b _c_ a|b & &lt; 1 < 2 $x$ ~~q~~ \\ end"
    reader = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (inline,) = [token for token in reader.parse(md("x {}", text)) if token.type == "inline"]
    assert "".join(child.content for child in inline.children) == f"x {text}"
    assert md("{:.2f} {:,} {}", 1.5, 1200, "medium-3.5 a_b") == "1.50 1,200 medium-3.5 a_b"


@settings(max_examples=25, deadline=None)
@example(["<script>a</script>", "<script>a</script><b>", "<script>a</script>", "<script>"])
@drawn(st.lists(hostile, min_size=4, max_size=4))
def test_no_text_of_a_record_becomes_markup_of_the_card(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "card-arms"
    if not folder.exists():
        card_arm(folder, "fp8", 20)
        card_arm(folder, "mixed", 19, note="note")
    arms = [read_arm(folder / name) for name in ("fp8", "mixed")]
    comparison = compare_arms(arms)
    facts = dataclasses.replace(
        checkpoint(),
        note="noted",
        made_of={**checkpoint().made_of, "recipe": {"scales": {"weights": "w"}}},
    )

    figure = {
        "question": "q?", "results": {}, "checkpoint": facts.identity,
        "machine": {"processor": "p", "versions": {"torch": "1"}}, "command": "halfbyte bench",
    }  # fmt: skip

    def measured(text: Callable[[], str]) -> dict[str, object]:
        """A figure whose every free text is given."""
        against = [{"what": text(), "value": 2}]
        return {"name": text(), "value": 1.5, "unit": "ms", "topic": "decode",
                "conditions": {text(): text(), text(): 3}, "against": against}  # fmt: skip

    def build(text: Callable[[], str]) -> CardInput:
        made_of = filled(facts.made_of, text)
        named = dataclasses.replace(
            facts, note=text(), folder=text(), made_of=made_of, licence_file=text(),
            chat=ChatFacts(True, True, (text(), text())),
        )  # fmt: skip
        return CardInput(
            named, filled(arms, text), filled(comparison, text), Base(text(), text()), text(),
            "other", text(), text(), (text(), text()), text(), text(), text(),
            {"speed.json": {**filled(figure, text), "figures": [measured(text)]}},
        )  # fmt: skip

    owners = [text.partition("/")[0] for text in texts]

    def word(text: str) -> str:
        # What comes before a slash of a hub id is its owner: a card whose publisher also made the
        # base model says less, so equal owners stay equal.
        owner, slash, _ = text.partition("/")
        return f"x{owners.index(owner)}" + (f"/y{texts.index(text)}" if slash else "")

    card = render_card(build(in_turn(texts)))
    plain = render_card(build(in_turn([word(text) for text in texts])))
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found is not None
    head = found.group(1)
    block = yaml.safe_load(head)
    wanted = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", plain, re.DOTALL).group(1))  # type: ignore[union-attr]
    assert set(block) >= {"license", "library_name", "tags"} and set(block) <= set(wanted)
    body, plain_body = card[found.end() :], plain.split("\n---\n", 1)[1]
    # Fields that are empty once blanks are gone leave no emphasis; each text here has letters.
    if all(one_line(text) for text in texts):
        assert drawn_tags(body) == drawn_tags(plain_body)
    # What folds the endings is ours, and the only HTML.
    for ours in ("<details>", "<summary>How answers ended</summary>", "</details>"):
        assert body.count(ours) == 1
        body = body.replace(ours, "")
    assert "html" not in " ".join(drawn_tags(body))


NAMES = [
    "../../escaped", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\nb", "a\0b", "CON",
    "x" * 5000, "ümlaut", "中文", "<script>", "comparison.json", "fp8", "FP8", "fp8 ", "-rf",
    ".hidden", "\ud800",
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@drawn(st.lists(st.one_of(st.sampled_from(NAMES), hostile, st.text()), min_size=1, max_size=5))
def test_names_of_arms_become_names_of_files_and_differ(names: list[str]) -> None:
    class Run:
        def __init__(self, arm: str) -> None:
            self.arm = arm

    class Named:
        def __init__(self, arm: str) -> None:
            self.run = Run(arm)

    found = record_names([Named(name) for name in names])  # type: ignore[misc]
    assert len({name.lower() for name in found}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,90}\.run\.json", name) for name in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_writes_in_its_folder_only(tmp_path: Path, name: str) -> None:
    arms = [card_arm(tmp_path / "runs", one, 20) for one in ("fp8", "mixed")]
    named = [dataclasses.replace(a, run=dataclasses.replace(a.run, arm=name)) for a in arms]
    out = tmp_path / "deep" / "deeper" / "out"
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    card = write_card(out, CardInput(checkpoint(), named, compare_arms(arms)))
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert all(path.parent in (out, out / "evaluation") for path in made)
    links = set(re.findall(r"\]\((evaluation/[^)]+)\)", card.read_text()))
    assert len(links) == 3 and all((out / target).is_file() for target in links)


def test_links_in_the_folder_are_replaced_and_not_followed(tmp_path: Path) -> None:
    arms = [card_arm(tmp_path / "runs", "fp8", 20)]
    out, other = tmp_path / "out", tmp_path / "other"
    (out / "evaluation").mkdir(parents=True)
    other.write_text("kept")
    for name in ("README.md", "evaluation/fp8.run.json"):
        (out / name).symlink_to(other)
    write_card(out, CardInput(checkpoint(), arms, None))
    assert other.read_text() == "kept" and not (out / "README.md").is_symlink()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "evaluation").symlink_to(tmp_path / "runs")
    with pytest.raises(UsageError, match="is a link to"):
        write_card(tmp_path / "second", CardInput(checkpoint(), arms, None))


@pytest.mark.parametrize("name", ["comparison.json", "fp8.run.json"])
def test_a_record_cannot_take_the_place_of_a_runs(tmp_path: Path, name: str) -> None:
    arms = [card_arm(tmp_path / "runs", "fp8", 20)]
    with pytest.raises(UsageError, match=re.escape(name)):
        write_card(tmp_path / "o", CardInput(checkpoint(), arms, None, figures={name: {}}))
    assert not (tmp_path / "o").exists()
