"""The vocabulary, written once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pocket.vocabulary import Vocabulary, write_tekken


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are small: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pocket") / "tekken.json"
    write_tekken(path)
    return path


@pytest.fixture(scope="session")
def vocabulary(tekken: Path) -> Vocabulary:
    return Vocabulary(tekken)
