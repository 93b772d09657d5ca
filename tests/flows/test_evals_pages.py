"""Report and card from a real run, the report drawn by a real browser where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")

from PIL import Image

from evals_stub import completion, serving
from halfbyte.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    folders = []
    for arm, answer in (("fp8", "Answer: A \\boxed{42}"), ("mixed", "Answer: B \\boxed{42}")):
        folder = str(tmp_path / arm)
        with serving(lambda request, text=answer: completion(text)) as stub:  # type: ignore[misc]
            assert main(["evaluate", stub.url, "--suite", "pocket", "--out", folder]) == 0
        folders.append(folder)
    return folders


def test_two_runs_become_a_comparison_and_a_page(tmp_path: Path, runs: list[str]) -> None:
    assert main(["compare-evals", *runs, "--out", str(tmp_path / "c.json")]) == 3
    page = tmp_path / "report.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    text = page.read_text()
    assert "INCONCLUSIVE" in text and "Pocket" in text
    assert not re.search(r"(src|href)\s*=", text)
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("the page is written; no Chromium here to draw it")
    picture = tmp_path / "page.png"
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--window-size=1340,2000", f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=50)
    with Image.open(picture) as image:
        drawn = image.convert("RGB")
        assert drawn.size == (1340, 2000)
        colours = {colour for _, colour in drawn.getcolors(1 << 20) or []}
    # Text, lines, and the colours of the plots: more than a blank or unstyled page has.
    assert len(colours) > 50
    assert {(42, 91, 215), (29, 127, 74)} <= colours
