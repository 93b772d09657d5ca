"""The serving engine on a Hopper GPU: graphs, prefill, choice on the device, determinism.

The checks are in `cuda_checks`, which also runs as a script where there is no pytest.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hopper")
    cuda_checks.write_checkpoints(directory)
    return directory


@pytest.mark.parametrize(
    ("variant", "check", "options"),
    cuda_checks.CHECKS,
    ids=[f"{v}-{c.__name__}-{len(o)}" for v, c, o in cuda_checks.CHECKS],
)
def test_check(
    folder: Path, variant: str, check: Callable[..., Any], options: dict[str, Any]
) -> None:
    check(folder / variant, **options)
