"""The list of launches of a decode step, made on a CPU with kernels that launch nothing."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import TextConfig
from halfbyte.kernels.cuda.library import KernelLibrary
from halfbyte.model.cuda import decode
from halfbyte.model.cuda.decode import DecodeStep
from halfbyte.model.cuda.launches import Collective, CudaModel, SharedBuffers
from halfbyte.model.cuda.load import load_cuda_draft, load_cuda_weights
from halfbyte.model.cuda.weights import CudaWeights, Products, make_cache
from halfbyte.model.rope import RotaryTable
from halfbyte.model.tiny import write_tiny_eagle
from hopper import hopper_config, write_fp8, write_mixed

CPU = torch.device("cpu")
LAYERS = hopper_config().text.num_layers


class Named(dict[str, str]):
    """Any kernel by its name."""

    def __missing__(self, name: str) -> str:
        return name


class NoLibrary(KernelLibrary):
    """Kernels are their names; as many multiprocessors as an H100 has."""

    device = CPU
    num_multiprocessors = 132

    def __init__(self) -> None:
        pass

    def linear(self, *arguments: Any) -> Any:
        return "linear", 0

    def elementwise(self, *arguments: Any) -> Any:
        return Named()

    def attention(self, *arguments: Any) -> Any:
        return "attention"

    def gather(self) -> Any:
        return "gather"


class NoLaunch:
    def __init__(self, kernel: str, *arguments: Any, overlaps: bool, cluster: int) -> None:
        self.kernel, self.overlaps = kernel, overlaps


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hopper")
    write_fp8(folder / "fp8", hopper_config())
    write_mixed(folder / "mixed", folder / "fp8", folder)
    write_tiny_eagle(folder / "eagle", hopper_config(), dialect="mistral-fp8")
    return folder / "mixed"


def kernels_of(
    weights: CudaWeights, monkeypatch: pytest.MonkeyPatch, size: int, all_reduce: Any = None
) -> list[str]:
    monkeypatch.setattr(decode, "Launch", NoLaunch)
    config: TextConfig = weights.config
    step = DecodeStep(
        CudaModel(
            NoLibrary(),
            weights,
            make_cache(config, 4, 16, CPU),
            RotaryTable(config, CPU).at,
            SharedBuffers(),
            all_reduce,
        ),
        size,
        max_context_tokens=64,
        prepare=lambda step: None,
        logits_TV=torch.zeros(size, weights.head.weight.out_features),
    )
    launches: list[Any] = step._launches
    assert all(isinstance(one, Collective) or one.overlaps for one in launches)
    return ["sum" if isinstance(one, Collective) else one.kernel for one in launches]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("size", [1, 24, 128])
def test_a_step_is_nine_launches_a_layer(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, mode: Products, size: int
) -> None:
    weights = load_cuda_weights(Checkpoint.open(mixed), CPU, mode=mode)
    kernels = kernels_of(weights, monkeypatch, size)
    assert len(kernels) == 9 * LAYERS + 4
    assert kernels[0] == "embed" and kernels[-2:] == ["linear", "gather"]
    counts = Counter(kernels)
    assert counts["linear"] == 4 * LAYERS + 1
    assert counts["attention"] == counts["rotate_and_store"] == LAYERS
    # Each product is read by the kernel behind it, never by another product.
    assert not any(a == b == "linear" for a, b in pairwise(kernels))
    norms = [kernel for kernel in kernels if "norm" in kernel]
    assert len(norms) == 2 * LAYERS + 1 and norms[0] == "norm_e4m3"
    assert all(kernel.startswith("add_norm_") for kernel in norms[1:])


def test_ranks_meet_behind_the_embedding_and_twice_a_layer(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_cuda_weights(Checkpoint.open(mixed), CPU)
    kernels = kernels_of(weights, monkeypatch, 4, all_reduce=lambda tensor: None)
    assert kernels.count("sum") == 2 * LAYERS + 1 and kernels[1] == "sum"
    alone = [kernel for kernel in kernels if kernel not in ("sum", "gather")]
    assert [*alone, "gather"] == kernels_of(weights, monkeypatch, 4)


def test_a_draft_model_begins_with_the_product_that_joins(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = load_cuda_weights(Checkpoint.open(mixed), CPU)
    draft = load_cuda_draft(Checkpoint.open_eagle(mixed.parent / "eagle"), target)
    kernels = kernels_of(draft, monkeypatch, 4)
    assert kernels[0] == "linear" and "embed" not in kernels
    assert len(kernels) == 9 * len(draft.layers) + 4
