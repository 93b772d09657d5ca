"""The card that the documentation shows is the one that its commands make, and the hub reads it."""

import re
from pathlib import Path

import pytest
from tools.card_of_pocket import PAGE, page


@pytest.fixture(scope="module")
def card() -> str:
    return page().partition("````markdown\n")[2].rpartition("````")[0]


def test_the_page_is_what_the_commands_make(card: str) -> None:
    shown = PAGE.read_text(encoding="utf-8").partition("````markdown\n")[2].rpartition("````")[0]
    assert shown == card, "write it again: python -m tools.card_of_pocket"


def test_the_hubs_own_reader_takes_the_card(card: str) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="extra 'hub' is not installed")
    read = hub.ModelCard(card)
    assert read.data.license == "apache-2.0" and "nvfp4" in read.data.tags
    assert read.data.to_dict()["pipeline_tag"] == "image-text-to-text"


def test_a_card_shows_nothing_of_the_machine_that_made_it(card: str, tmp_path: Path) -> None:
    assert not re.search(r"/(tmp|home|root|work|Users)/", card)
    for section in ("Evaluation", "Speed", "Limitations", "Usage", "Records"):
        assert f"\n## {section}\n" in card
