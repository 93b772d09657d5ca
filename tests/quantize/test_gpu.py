"""On a GPU: the same bytes of weights as on a CPU, near statistics, memory within its limit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.calibrate.moments import InputSums
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.formats.fp8 import PROFILES, Profile
from halfbyte.formats.nvfp4 import decode_nvfp4
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.gptq import encode_gptq, make_metric
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.layer import quantize_layer
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.scales import METHODS
from halfbyte.recipe.plan import make_plan
from halfbyte.recipe.schema import GptqOptions, load_recipe
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


def test_products_of_bf16_are_exact_on_matrix_units() -> None:
    """Blocks wider than one included; f32 has room for each product, sums are rounded alike."""
    x_TI = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    sums = InputSums(5000, "products", torch.device("cuda"))
    for start in range(0, 300, 128):
        sums.update(x_TI[start : start + 128].cuda())
    wanted_II = x_TI.double().T @ x_TI.double()
    found_II = sums.take_products().double().cpu()
    assert float((found_II - wanted_II).abs().max()) < 1e-3


@pytest.mark.parametrize("rows", [96, 1500])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_gptq_on_a_gpu_loses_what_it_loses_on_a_cpu(rows: int, sweeps: int) -> None:
    """All but ties of sums: there its blocks are rounded by one graph, and many rows at once."""
    generator = torch.Generator().manual_seed(rows)
    inputs_TI = torch.randn(2048, 256, generator=generator) * torch.rand(256, generator=generator)
    w_OI = 0.02 * torch.randn(rows, 256, generator=generator)
    products_II, scale = inputs_TI.T @ inputs_TI, torch.tensor(0.02 / 400)
    losses, codes = [], []
    for device in ("cpu", "cuda"):
        metric = make_metric(products_II.to(device), GptqOptions(sweeps=sweeps))
        encoded = encode_gptq(w_OI.to(device), metric, scale.to(device))
        error_OI = w_OI - decode_nvfp4(encoded, torch.float32).cpu()
        losses.append((inputs_TI @ error_OI.T).square().sum(0))
        codes.append(encoded.codes_OI2.cpu())
    assert (codes[0] == codes[1]).float().mean() > 0.98
    assert torch.allclose(losses[0], losses[1], rtol=0.05)
    assert float(losses[1].sum() / losses[0].sum()) == pytest.approx(1.0, abs=2e-3)
