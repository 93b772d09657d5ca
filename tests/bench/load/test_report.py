"""The record of a run: read back as written, shown in a terminal, on a page and on a card."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.load.test_results import exchange, level
from card.test_render import IDENTITY
from card.test_render import given as card_of
from halfbyte.bench.load.client import Exchange, Manner
from halfbyte.bench.load.page import render
from halfbyte.bench.load.report import (
    Asked,
    LoadRecord,
    comparison,
    format_load,
    format_load_comparison,
    read_load,
    write_load,
)
from halfbyte.bench.load.results import summarise_level
from halfbyte.bench.load.run import LevelExchange, Measured
from halfbyte.bench.load.traffic import Profile, Trace
from halfbyte.card.facts import read_figures
from halfbyte.card.render import write_card
from halfbyte.errors import UsageError

MACHINE = {"processor": "8x NVIDIA H200"}
HEALTH = {"version": "0.1.0", "engine_device": "cuda", "host": "secret.internal"}


def users_level(profile: Profile, users: int, pace: float = 0.1) -> Measured:
    samples = [
        LevelExchange(
            user, 0, exchange(0.0, *(1 + pace * n for n in range(5)), prompt=100, cached=50)
        )
        for user in range(users)
    ]
    return Measured(level(profile, users), 0.0, 3.0, samples, late_ms=[0.1, 0.3])


def beside_level() -> Measured:
    streams = [
        LevelExchange(n, 0, exchange(0.0, *(t / 10 for t in range(1, 100))), "stream")
        for n in (0, 1)
    ]
    long = LevelExchange(2, 0, exchange(5.0, 7.0, 7.1, prompt=990, answer=2), "long")
    return Measured(level("beside", 2), 0.0, 10.0, [*streams, long], alone=(1.0, 3.9))


def some_levels(pace: float = 0.1) -> list[Measured]:
    failed = Exchange(0.0, 1.0, error="status 429", detail="queue full")
    crowd = users_level("fixed", 4, pace)
    crowd.samples.append(LevelExchange(3, 0, failed))
    crowd.skip("the session had failed", 2)
    return [
        users_level("fixed", 1, pace), crowd, users_level("agents", 2, pace), beside_level()
    ]  # fmt: skip


def written(
    path: Path, measured: list[Measured] | None = None, *, model: str = "mixed",
    checkpoint: str | None = IDENTITY, cut: tuple[str, ...] = (), seed: int = 1,
    notes: tuple[str, ...] = (), machine: dict[str, Any] | None = MACHINE,
) -> LoadRecord:  # fmt: skip
    levels = some_levels() if measured is None else measured
    return write_load(
        path, levels, Trace(seed, tuple(one.level for one in levels), cut),
        Asked(model, checkpoint, 8192, HEALTH, machine), Manner({}, notes=notes),
        command="halfbyte bench load http://gpu7.internal:8000",
    )  # fmt: skip


def test_a_record_gives_back_what_was_measured(tmp_path: Path) -> None:
    run = written(tmp_path / "r.json", notes=("it takes no tools",), cut=("agents: shorter",))
    for found, one in zip(run.levels, some_levels(), strict=True):
        expected = summarise_level(one)
        assert found.title == expected.title
        assert found.failures == expected.failures
        assert found.output_rate == pytest.approx(expected.output_rate, abs=1e-5)
        for name in ("first_token", "gaps", "per_token", "alone", "beside"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or mine.most == pytest.approx(theirs.most, abs=1e-3)
    assert (run.notes, run.cut) == (("it takes no tools",), ("agents: shorter",))
    assert run.samples(run.levels[0], "gap, ms") == pytest.approx([100.0] * 4)
    assert dict(run.facts)["server"] == "version 0.1.0, device cuda"
    assert "secret" not in (tmp_path / "r.json").read_text()


def test_a_terminal_is_told_all_of_it(tmp_path: Path) -> None:
    measured = some_levels()
    measured[2].end = "interrupted"
    text = format_load(written(tmp_path / "r.json", measured, cut=("agents: shorter",)))
    assert re.search(r"fixed lengths, 1 user +1 of 1 +1,000 / 1,000 +100 / 100 / 100 ", text)
    assert "fixed lengths, 4 users: 1 failed, status 429: queue full" in text
    assert "fixed lengths, 4 users: 2 not asked, the session had failed" in text
    assert "2 agents: was interrupted" in text
    assert "made smaller: agents: shorter" in text
    assert re.search(r"a long prompt beside 2 streams +1 of 1 +2,000 / 2,000 ", text)


def test_levels_that_were_not_begun_are_said(tmp_path: Path) -> None:
    levels = some_levels()
    trace = Trace(1, tuple(one.level for one in levels))
    asked = Asked("m", None, None, {}, None)
    run = write_load(tmp_path / "r.json", levels[:1], trace, asked, Manner({}), command="c")
    assert "3 of 4 levels were not begun" in format_load(run)


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    new = written(tmp_path / "a.json", some_levels(pace=0.05))
    old = written(tmp_path / "b.json", some_levels(pace=0.1))
    found = comparison(new, old)
    assert found.warnings == []
    assert len(found.rows) == len(new.record.figures) > 10
    gap = next(row for row in found.rows if row.figure.name == "time between tokens, median")
    assert gap.cells[2:] == ("50.0 ms", "100 ms", "0.50x")
    assert "0.50x" in format_load_comparison(new, old)
    assert "0.50x" in render(new, old)
    same = comparison(new, new)
    assert {row.cells[-1] for row in same.rows} <= {"1.00x", "–"}


def test_what_makes_two_runs_incomparable_is_said(tmp_path: Path) -> None:
    new = written(tmp_path / "a.json")
    other = written(
        tmp_path / "b.json", [users_level("fixed", 7)], machine={"processor": "CPU X", "cores": 2}
    )
    said = " ".join(comparison(new, other).warnings)
    assert "did not send the same traffic" in said
    assert "8x NVIDIA H200 here, CPU X, 2 cores there" in said
    assert "No figure was measured under the same conditions" in said


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.in_svg_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "title":
            self.titles.append(data)


def test_a_page_stands_alone_and_every_point_says_its_value(tmp_path: Path) -> None:
    page = _Page()
    page.feed(render(written(tmp_path / "r.json")))
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    titles = " ".join(page.titles)
    assert "tokens/s at 4 users" in titles
    assert "longest gap of any stream" in titles
    assert page.tags.count("circle") > 20
    # As wide as a telephone's page, so that words keep their size there.
    assert set(re.findall(r'viewBox="0 0 (\d+) ', render(read_load(tmp_path / "r.json")))) == {
        "360"
    }


@given(hostile=st.text(min_size=1, max_size=30) | st.sampled_from(["<script>alert(1)</script>",
       '"><img src=x onerror=alert(1)>', "</style>", "{{ 7 * 7 }}", "\ud800"]))  # fmt: skip
@settings(max_examples=40)
def test_names_and_a_servers_words_never_become_markup(
    tmp_path_factory: pytest.TempPathFactory, hostile: str
) -> None:
    safe = hostile.encode("utf-8", "replace").decode()
    measured = [users_level("fixed", 1)]
    measured[0].samples.append(
        LevelExchange(0, 0, Exchange(0.0, 1.0, error="status 400", detail=safe))
    )
    path = tmp_path_factory.mktemp("r") / "r.json"
    page = _Page()
    page.feed(render(written(path, measured, model=safe, notes=(safe,))))
    assert not {"script", "img", "iframe"} & set(page.tags)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(name="serving"),
        lambda r: r["results"].pop("levels"),
        lambda r: r["results"].update(levels=[{}]),
        lambda r: r["results"].update(levels=3),
        lambda r: r["results"]["levels"][0].update(profile="x"),
        lambda r: r["results"]["levels"][0].update(gaps={"p50": "a"}),
        lambda r: r["results"]["levels"][0].update(output_rate="fast"),
        lambda r: r["results"]["levels"][0].update(extra=1),
        lambda r: r["results"].update(trace=None),
        lambda r: r.update(figures=[{"name": "x"}]),
    ],
)
def test_a_damaged_record_is_refused_by_a_sentence(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "r.json"
    written(path)
    record = copy.deepcopy(json.loads(path.read_text()))
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"r\.json"):
        read_load(path)


def test_a_card_shows_the_speed_of_its_own_checkpoint_with_units(tmp_path: Path) -> None:
    written(tmp_path / "speed.json")
    figures = read_figures([tmp_path / "speed.json"])
    out = tmp_path / "card"
    section = write_card(out, card_of(tmp_path, figures=figures)).read_text()
    speed = section.split("## Speed")[1].split("\n## ")[0]
    assert "Measured on 8x NVIDIA H200" in speed
    assert "| output | users 4, prompt tokens 10, answer tokens 4 | 6.67 tokens/s | - |" in speed
    assert "| prompt found in the prefix cache | agents 2" in speed
    assert (
        "streams 2, beside a prompt of 1,000 tokens | 100 ms | streams alone: 100 ms (1.00x) |"
        in speed
    )
    assert "gpu7" not in speed + (out / "evaluation" / "speed.json").read_text()


@pytest.mark.parametrize(
    "checkpoint, said",
    [("tensors:" + "0" * 64, "measured another checkpoint"), (None, "does not say which")],
)
def test_a_card_refuses_the_speed_of_another(
    tmp_path: Path, checkpoint: str | None, said: str
) -> None:
    written(tmp_path / "speed.json", checkpoint=checkpoint)
    figures = read_figures([tmp_path / "speed.json"])
    with pytest.raises(UsageError, match=said):
        write_card(tmp_path / "card", card_of(tmp_path, figures=figures))


def test_a_run_that_measured_nothing_stands_on_no_card(tmp_path: Path) -> None:
    failed = Exchange(0.0, 1.0, error="stalled")
    written(tmp_path / "s.json", [Measured(level(), 0.0, 1.0, [LevelExchange(0, 0, failed)])])
    with pytest.raises(UsageError, match="holds no speed of a model"):
        write_card(
            tmp_path / "card", card_of(tmp_path, figures=read_figures([tmp_path / "s.json"]))
        )
