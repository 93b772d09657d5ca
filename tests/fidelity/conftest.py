import shutil
from pathlib import Path

import pytest
import torch

from halfbyte.model.tiny import write_tiny_checkpoint

TOKENIZER = Path(__file__).parents[1] / "data" / "chat" / "chatml"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


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
