"""What all stories share."""

from collections.abc import Iterator

import pytest

import kept_processes


@pytest.fixture(autouse=True, scope="module")
def kept() -> Iterator[None]:
    with kept_processes.kept_processes():
        yield
