"""On a GPU: the same bytes of weights as on a CPU, near statistics, memory within its limit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.formats.fp8 import PROFILES, Profile
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.layer import quantize_layer
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.scales import METHODS
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import load_recipe
from tolerances import OWN_FORWARD_SCALE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
RECIPE = load_recipe("medium-3.5")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("dialect", ["none", "mistral-fp8"])
def test_a_gpu_encodes_to_the_bytes_of_a_cpu(
    tmp_path: Path, dialect: str, method: str, profile: Profile
) -> None:
    write_tiny_checkpoint(tmp_path / "source", layers=6, dialect=dialect)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(tmp_path / "source")
    plan = make_plan(replace(RECIPE, scales=METHODS[method]), checkpoint.config)
    for layer in (0, 4):
        cpu, gpu = (
            list(quantize_layer(checkpoint, layer, plan, None, profile, torch.device(device)))
            for device in ("cpu", "cuda")
        )
        for ours, theirs in zip(cpu, gpu, strict=True):
            for name, tensor in ours.tensors.items():
                other = theirs.tensors[name].cpu()
                assert (
                    tensor.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
                ), name


@pytest.mark.parametrize("memory_gib", [5, 16])
def test_a_run_on_a_gpu_is_that_of_a_cpu_up_to_its_own_forward(
    tmp_path: Path, memory_gib: int
) -> None:
    write_tiny_checkpoint(tmp_path / "source", layers=6, dialect="mistral-fp8")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (12, 70), generator=generator)
    save_file({"batch0.input_ids": ids}, tmp_path / "tokens.safetensors")
    config = QuantizeConfig(
        tmp_path / "source",
        tmp_path / "cpu",
        RECIPE,
        calibration_tokens=tmp_path / "tokens.safetensors",
    )
    quantize(config)
    on_gpu = replace(
        config, output=tmp_path / "gpu", device="cuda", memory_bytes=memory_gib << 30,
        gpu_memory_bytes=2 << 30,
    )  # fmt: skip
    record = quantize(on_gpu).record
    assert all(layer["peak_memory_bytes"]["gpu"] < 2 << 30 for layer in record["layers"])
    ours, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("cpu", "gpu"))
    for name, tensor in ours.items():
        if name.endswith(("input_scale", "k_scale", "v_scale")):
            assert float(theirs[name]) == pytest.approx(float(tensor), rel=OWN_FORWARD_SCALE), name
        else:
            assert (
                tensor.reshape(-1)
                .view(torch.uint8)
                .equal(theirs[name].reshape(-1).view(torch.uint8))
            ), name
