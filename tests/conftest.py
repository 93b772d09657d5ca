"""Settings of every test, and what several rooms share."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from golden_models import put_together

# A machine that does something else beside the tests is no defect; `timeout` bounds each test.
# The check draws the same inputs every time, so that a change is judged by what it changed;
# `HYPOTHESIS_PROFILE=search ./check` looks for new ones.
settings.register_profile("check", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `golden_models.MODELS`, put together once."""
    folder = tmp_path_factory.mktemp("golden")
    return cache(lambda name: put_together(name, folder))
