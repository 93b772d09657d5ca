"""What a quantization is asked to run on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import CapacityError, UsageError
from halfbyte.quantize import job
from halfbyte.recipe.schema import load_recipe


def config(device: str, gpu_memory_bytes: int | None = None) -> job.QuantizeConfig:
    recipe = load_recipe("medium-3.5")
    return job.QuantizeConfig(
        Path("in"), Path("out"), recipe, device=device, gpu_memory_bytes=gpu_memory_bytes
    )


@pytest.mark.parametrize(
    "device, has_gpu, found",
    [
        ("cpu", True, False),
        ("cpu", False, False),
        ("cuda", True, True),
        ("cuda:1", True, True),
        ("cuda", False, CapacityError),
        ("meta", True, CapacityError),
        ("gpu", True, UsageError),
    ],
)
def test_a_device_is_there_or_refused(
    device: str, has_gpu: bool, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if isinstance(found, bool):
        assert job._is_gpu(config(device)) is found
    else:
        with pytest.raises(found, match=f"device '?{device}"):
            job._is_gpu(config(device))


def test_gpu_memory_is_no_matter_of_processors() -> None:
    with pytest.raises(UsageError, match="--gpu-memory needs --device cuda"):
        job._is_gpu(config("cpu", 2**30))
