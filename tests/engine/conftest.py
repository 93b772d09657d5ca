from pathlib import Path

import pytest
import torch

from halfbyte.model.tiny import write_tiny_checkpoint


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer model with YaRN and a position-dependent query scale."""
    directory = tmp_path_factory.mktemp("tiny") / "bf16"
    write_tiny_checkpoint(directory, layers=2)
    return directory
