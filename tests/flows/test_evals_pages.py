"""Report and card from real runs, both drawn by a real browser where there is one."""

import gc
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")

import torch
from PIL import Image
from safetensors.torch import save_file

from evals_stub import completion, serving
from flows.browser import CHROMIUM
from halfbyte.cli.main import main
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _collect_while_its_warnings_are_filtered() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    folders = []
    for arm, answer in (("fp8", "Answer: A \\boxed{42}"), ("mixed", "Answer: B \\boxed{42}")):
        folder = str(tmp_path / arm)
        with serving(lambda request, text=answer: completion(text)) as stub:  # type: ignore[misc]
            assert main(["evaluate", stub.url, "--suite", "quick", "--out", folder]) == 0
        folders.append(folder)
    return folders


def test_two_runs_become_a_comparison_and_a_page(tmp_path: Path, runs: list[str]) -> None:
    assert main(["compare-evals", *runs, "--out", str(tmp_path / "c.json")]) == 3
    page = tmp_path / "report.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    text = page.read_text()
    assert "INCONCLUSIVE" in text and "Quick" in text
    assert not re.search(r"(src|href)\s*=", text)
    colours = draw(tmp_path, page)
    # Text, lines, and the colours of the plots: more than a blank or unstyled page has.
    assert len(colours) > 50
    assert {(42, 91, 215), (29, 127, 74)} <= colours


def test_card_becomes_the_checkpoints_readme_and_verify_accepts_it(
    tmp_path: Path, runs: list[str]
) -> None:
    markdown = pytest.importorskip("markdown_it", reason="comes with extra 'eval'")
    write_tiny_checkpoint(tmp_path / "source", layers=6, dialect="mistral-fp8")
    mixed, tokens = tmp_path / "small-mixed", tmp_path / "tokens.safetensors"
    save_file({"batch0.input_ids": torch.arange(64).reshape(2, 32)}, tokens)
    recipe = load_recipe("medium-3.5")
    quantize(QuantizeConfig(tmp_path / "source", mixed, recipe, calibration_tokens=tokens))
    command = ["card", str(mixed), "--base-model", "some/base", "--runs"]
    assert main([*command, *runs]) == 2  # nobody said what answered at the address
    own = str(tmp_path / "own")
    with serving(lambda request: completion("Answer: B \\boxed{42}")) as stub:
        asked = ["evaluate", stub.url, "--suite", "quick", "--out", own]
        assert main([*asked, "--checkpoint", str(mixed)]) == 0
    assert main([*command, runs[0], own]) == 0
    assert main(["verify", str(mixed)]) == 0
    _, _, body = (mixed / "README.md").read_text().split("---\n", 2)
    # The hub draws tables and headings much like this.
    html = markdown.MarkdownIt("commonmark").enable("table").render(body)
    assert html.count("<table>") >= 4 and "<h2>Post-training quantization</h2>" in html
    assert "|---" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    page = tmp_path / "card.html"
    style = "body{font:16px sans-serif} td,th{border:1px solid rgb(1,2,3)} a{color:rgb(9,105,218)}"
    page.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{html}")
    assert {(1, 2, 3), (9, 105, 218)} <= draw(tmp_path, page)


def draw(folder: Path, page: Path) -> set[Any]:
    """The colours of a page as a browser draws it."""
    if CHROMIUM is None:
        pytest.skip("the page is written; no Chromium here to draw it")
    picture = folder / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--window-size=1340,2000",
        f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=50)
    with Image.open(picture) as image:
        drawn = image.convert("RGB")
        assert drawn.size == (1340, 2000)
        # Where letters are smoothed their colour seldom occurs pure; lines and marks have theirs.
        return {colour for _, colour in drawn.getcolors(1 << 20) or []}
