"""Settings of every test, and what several rooms share."""

import gc
import os
import shutil
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from golden_models import put_together
from halfbyte.model.tiny import write_tiny_checkpoint

TOKENIZER = Path(__file__).parent / "data" / "chat" / "chatml"

# A machine that does something else beside the tests is no defect; `timeout` bounds each test.
# The check draws the same inputs every time, so that a change is judged by what it changed;
# `HYPOTHESIS_PROFILE=search ./check` looks for new ones.
settings.register_profile("check", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "check"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Millions of objects come and stay: nobody looks for garbage among them, now or later.

    It was a third of the time that collection takes, and half a second at every `gc.collect()`.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `golden_models.MODELS`, put together once."""
    folder = tmp_path_factory.mktemp("golden")
    return cache(lambda name: put_together(name, folder))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `bf16` and `fp8` of one random model, tokenizer included, and a text."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_checkpoint(root / "bf16", layers=2)
    write_tiny_checkpoint(root / "fp8", layers=2, dialect="mistral-fp8")
    for name in ("bf16", "fp8"):
        for file in TOKENIZER.iterdir():
            shutil.copy(file, root / name)
    words = [f"word {i} and {i * i % 97} more" for i in range(60)]
    (root / "text.txt").write_text("\n".join(words), encoding="utf-8")
    return root
