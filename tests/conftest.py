"""Settings of every test, and what several rooms share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from golden_models import put_together

# A machine that does something else beside the tests is no defect; `timeout` bounds each test.
settings.register_profile("halfbyte", deadline=None)
settings.load_profile("halfbyte")


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `golden_models.MODELS`, put together once."""
    folder = tmp_path_factory.mktemp("golden")
    return cache(lambda name: put_together(name, folder))
