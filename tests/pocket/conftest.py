"""The vocabulary, written once."""

from pathlib import Path

import pytest
from pocket.vocabulary import Vocabulary, write_tekken


@pytest.fixture(scope="session")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pocket") / "tekken.json"
    write_tekken(path)
    return path


@pytest.fixture(scope="session")
def vocabulary(tekken: Path) -> Vocabulary:
    return Vocabulary(tekken)
