"""The report: everything in the record is on the page, nothing is fetched, nothing breaks it."""

import base64
import copy
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte.cli.main import main
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.charts import HeatCell, colour, heatmap, lines, stacked
from halfbyte.quantize.page import render
from halfbyte.quantize.record import peak_memory_bytes

LAYERS = 6


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command has written a report."""
    root = tmp_path_factory.mktemp("report")
    write_tiny_checkpoint(root / "fp8", layers=LAYERS, dialect="mistral-fp8")
    ids = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")
    command = ["quantize", str(root / "fp8"), str(root / "out"), "--recipe", "medium-3.5"]
    command += ["--calibration-tokens", str(root / "tokens.safetensors"), "--log-level", "error"]
    assert main([*command, "--report", str(root / "report.html")]) == 0
    return root


@pytest.fixture
def record(report: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((report / "report.json").read_text())
    return loaded


class Reader(HTMLParser):
    """Checks that tags nest, and collects what might fetch something, and titles of marks."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.titles: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.fetches.append(tag)
        self.fetches += [name for name, _ in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.titles if self.open and self.open[-1] == "title" else self.text).append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_shows_every_linear_layer_and_range_and_fetches_nothing(
    report: Path, record: Any
) -> None:
    page = (report / "report.html").read_text()
    reader = read(page)
    assert reader.fetches == [] and "url(" not in page and "@import" not in page
    for linear in record["linears"]:
        assert any(title.startswith(f"{linear['name']}: ") for title in reader.titles)
    for layer in record["layers"]:
        for tap, value in layer["observed"].items():
            assert f"{tap}, layer {layer['layer']}: {value:.4g} " in reader.titles
    text = " ".join(reader.text)
    assert record["calibration"]["sha256"] in text
    assert all(facts["sha256"] in text for facts in record["source"]["files"].values())
    assert all(part in text for part in record["output"]["parts"])
    assert render(record) == page


def test_errors_are_shown_by_linear_and_by_format(record: Any) -> None:
    page = render(record)
    reader = read(page)
    for linear in record["linears"]:
        said = "nothing lost" if linear["sqnr_db"] is None else f"{linear['sqnr_db']:.2f} dB"
        assert f"{linear['name']}: {linear['format']}, {said}" in reader.titles
        assert linear["measured"] == 1, "small weights are measured whole"
    found = sorted(x["sqnr_db"] for x in record["linears"] if x["format"] == "nvfp4")
    assert found[0] < found[-1]
    shown = f"{found[0]:.2f} {sum(found) / len(found):.2f} {found[-1]:.2f}"
    assert shown in re.sub(r"\s+", " ", " ".join(reader.text)), shown


def test_methods_are_compared_by_the_means_of_each_format(record: Any) -> None:
    made: dict[str, list[float]] = {}
    for number, linear in enumerate(record["linears"]):
        linear["output_db"] = {"max": 100.0 + number}
        made.setdefault(linear["format"], []).append(100.0 + number)
        if linear["format"] == "nvfp4":
            linear["output_db"]["chosen"] = 7.0
    said = re.sub(r"\s+", " ", " ".join(read(render(record)).text))
    for chosen, values in made.items():
        extra = "7.00" if chosen == "nvfp4" else "–"
        assert f"{chosen} {sum(values) / len(values):.2f} {extra}" in said


def test_a_record_holds_the_memory_that_was_planned_and_taken(
    record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record["planned_memory_bytes"].keys() == {"host"}
    mib = 1 << 20
    for layer in record["layers"]:
        assert 50 * mib < layer["peak_memory_bytes"]["host"] < 1 << 40
    taken = peak_memory_bytes(torch.device("cpu"))["host"]
    monkeypatch.setattr("halfbyte.quantize.record.held", lambda: None)
    # Elsewhere the system's other count stands in, which may begin with who started us.
    assert peak_memory_bytes(torch.device("cpu"))["host"] > taken // 4


def test_names_from_outside_cannot_become_markup(record: Any) -> None:
    hostile = copy.deepcopy(record)
    hostile["output"]["name"] = '"><script>alert(1)</script>'
    hostile["recipe"]["name"] = "<b>&amp;"
    member = {
        "name": "<i>x", "dataset": "<u>y", "origin": "hub", "revision": "<s>", "taken_rows": 1,
        "requested_rows": 2, "num_tokens": 3,
        "splits": [{"name": "<em>z", "read": {"rows": 4, "sha256": "ab" * 32}, "rows": [1, 2]}],
    }  # fmt: skip
    hostile["calibration"]["provenance"] = {"blend": "<q>", "members": [member]}
    reader = read(render(hostile))
    assert reader.fetches == []
    text = " ".join(reader.text)
    for part in ("<script>", "<b>&amp;", "<i>x", "<u>y", "<s>", "<em>z", "<q>"):
        assert part in text


MARKUP = st.lists(
    st.sampled_from(
        ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x", "</style>",
         "</title></svg>", "<!--", "]]>", "&lt;", "{{ 1 }}", "{0}", "\0", "\ud800", "\n", "a"]
    ),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip


def filled(value: Any, text: str, name: str = "") -> Any:
    """A record with each of its texts replaced, and names of kinds of work and of files, too.

    Names of linears stay: the page takes the layer's number from them.
    """
    if isinstance(value, str):
        return value if value.startswith("decoder.") else text
    if isinstance(value, dict):
        renamed = name in ("seconds", "files", "parts", "observed", "output_db")
        return {
            (text + key if renamed else key): filled(one, text, key) for key, one in value.items()
        }
    if isinstance(value, list):
        return [filled(one, text, name) for one in value]
    return value


def tags(page: str) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, [name for name, _ in attrs]))

    Tags().feed(page)
    return found


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(MARKUP)
def test_no_text_of_a_record_becomes_a_tag(record: Any, text: str) -> None:
    member = {
        "name": "m", "dataset": "d", "origin": "o", "revision": "r", "taken_rows": 1,
        "requested_rows": 2, "num_tokens": 3,
        "splits": [{"name": "s", "read": {"rows": 4, "sha256": "ab"}, "rows": [1, 2]}],
    }  # fmt: skip
    record["calibration"]["provenance"] = {"blend": "b", "members": [member]}
    page, plain = (render(filled(record, given)) for given in (text, "x"))
    assert tags(page) == tags(plain) and len(tags(page)) > 100
    page.encode()


def test_the_page_admits_its_own_style_and_nothing_else(record: Any) -> None:
    page = render(record)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert policy in html.unescape(page)


def test_a_run_without_data_or_errors_still_has_a_report(record: Any) -> None:
    bare: Any = {**record, "linears": [], "calibration": None}
    bare["layers"] = [{**layer, "observed": {}} for layer in record["layers"]]
    text = " ".join(read(render(bare)).text)
    assert "Errors were not measured" in text and "data-free" in text and "pinned" in text


def test_charts_survive_equal_missing_and_extreme_values() -> None:
    cells = {"q": [HeatCell(None, "none"), HeatCell(3.0, "three")], "k": [HeatCell(3.0, "equal")]}
    assert heatmap(cells, title="t", unit="dB").count("<rect class") == 3
    assert "nothing was lost" in heatmap({"q": [HeatCell(None, "x")]}, title="t", unit="dB")
    assert heatmap({}, title="t", unit="") == "" == lines({}, title="t", unit="", logarithmic=True)
    drawn = lines({"a": [1e-30, None, 1e30, 0.0], "b": [2.0]}, title="t", unit="", logarithmic=True)
    assert "nan" not in drawn and "inf" not in drawn and drawn.count("<circle") == 3
    assert lines({"a": [None]}, title="t", unit="", logarithmic=False) == ""
    assert "nan" not in lines({"a": [0.0, 0.0]}, title="t", unit="", logarithmic=False)
    assert stacked({"a": [0.0]}, title="t", unit="s").count("<rect") == 2
    assert colour(-1) == colour(0) == "#440154" and colour(2) == colour(1) == "#fde725"
