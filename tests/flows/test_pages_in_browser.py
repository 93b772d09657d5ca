"""Pages written from hostile records, opened in a real browser: nothing in them runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from card.test_escaping import filled
from card.test_report import write_arm
from flows.browser import CHROMIUM, Browser
from halfbyte.card.facts import compare_arms, read_arm
from halfbyte.card.report import render_report
from halfbyte.page import Mark, drawing, text_mark
from halfbyte.quantize.page import render

if CHROMIUM is None:
    pytest.skip("needs Chromium (apt-get install chromium)", allow_module_level=True)

RAN = "window.ran = (window.ran || 0) + 1"
HOSTILE = (
    f'<script>{RAN}</script><img src=x onerror=\'{RAN}\'>"><svg onload="{RAN}">'
    f"' onload='{RAN}' x='"
    f'</style></title></pre></textarea><script>{RAN}</script><a href="javascript:{RAN}">x</a>'
    f'<iframe srcdoc="<script>parent.{RAN}</script>"></iframe><details open ontoggle="{RAN}">'
)
SHOWN = "document.body.textContent.includes('window.ran')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def opened(browser: Browser, folder: Path, page: str) -> None:
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    browser.errors.clear()
    browser.open(file.as_uri())
    # Whatever waits for an image that fails or a frame that loads has had its turn.
    browser.run("new Promise((done) => setTimeout(done, 200))")


def nothing_ran(browser: Browser) -> None:
    assert browser.run("window.ran === undefined")
    assert browser.run("document.querySelectorAll('script, img, iframe, a').length") == 0
    assert browser.run("document.title").startswith(("Evaluation: ", "<script>"))
    assert browser.run(SHOWN)
    assert not browser.errors


def report_page(folder: Path) -> str:
    arms = [read_arm(write_arm(folder, name, n)) for name, n in (("fp8", 12), ("mixed", 9))]
    comparison = compare_arms(arms)
    hostile: list[Any] = filled([arms, comparison], lambda: HOSTILE)
    return render_report(*hostile)


def quantization_page() -> str:
    seconds = {HOSTILE: 1.0}
    layer = {
        "seconds": seconds, "observed": {HOSTILE: 2.0}, "peak_memory_bytes": {"host": 1},
    }  # fmt: skip
    linear = {
        "name": "decoder.0.mlp.up", "format": HOSTILE, "sqnr_db": 1.0, "measured": 1.0,
        "clipped": 0.1, "zeroed": 0.1, "output_db": {HOSTILE: 3.0},
    }  # fmt: skip
    record: Any = (
        {
            "output": {"name": HOSTILE, "bytes": 2, "parts": {HOSTILE: 2}},
            "source": {
                "name": HOSTILE, "dialect": HOSTILE, "bytes": 2,
                "files": {HOSTILE: {"bytes": 1, "sha256": HOSTILE}},
            },
            "recipe": {"name": HOSTILE, "scales": {"weights": HOSTILE, "activations": HOSTILE}},
            "profile": HOSTILE, "device": HOSTILE,
            "versions": {"halfbyte": HOSTILE, "torch": HOSTILE},
            "layers": [layer, layer], "linears": [linear], "planned_memory_bytes": {},
            "calibration": {"rows": 1, "tokens": 1, "longest": 1, "sha256": HOSTILE},
        }
    )  # fmt: skip
    return render(record)


def test_no_script_of_a_record_runs_in_the_report(browser: Browser, tmp_path: Path) -> None:
    opened(browser, tmp_path, report_page(tmp_path))
    nothing_ran(browser)
    # The page's own style is the one thing that its policy lets in.
    assert browser.run("getComputedStyle(document.querySelector('section')).borderRadius") == "10px"


def test_no_script_of_a_record_runs_in_the_quantization_report(
    browser: Browser, tmp_path: Path
) -> None:
    opened(browser, tmp_path, quantization_page())
    nothing_ran(browser)
    assert browser.run("getComputedStyle(document.body).maxWidth") == "900px"


def test_the_policy_holds_even_where_markup_gets_in(browser: Browser, tmp_path: Path) -> None:
    """A page whose escaping were broken: markup is put into it behind the template's back."""
    page = report_page(tmp_path)
    broken = page.replace("<main>", f"<main>{HOSTILE}<style>main {{ width: 7px }}</style>", 1)
    opened(browser, tmp_path, broken)
    assert browser.run("document.querySelectorAll('script').length") >= 1
    assert browser.run("window.ran === undefined")
    assert browser.run("getComputedStyle(document.querySelector('main')).width") != "7px"
    assert any("Content Security Policy" in error for error in browser.errors)


def test_drawings_take_no_markup(browser: Browser, tmp_path: Path) -> None:
    place: dict[str, str | float] = {
        "class": HOSTILE,
        "x": 1,
        "y": 2,
        "width": 3,
        "height": 4,
        "fill": HOSTILE,
    }
    marks = [Mark("rect", place, title=HOSTILE), text_mark(1, 2, HOSTILE, kind=HOSTILE)]
    page = report_page(tmp_path).replace(
        "<main>", f"<main>{drawing(9, 9, marks, title=HOSTILE)}", 1
    )
    opened(browser, tmp_path, page)
    nothing_ran(browser)
