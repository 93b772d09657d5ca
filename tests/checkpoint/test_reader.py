import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from golden_models import MODELS
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.names import LAYOUTS, Dialect, Layout
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError
from halfbyte.modules import decoder_linears, linears

ALL = [
    (layout, dialect)
    for layout in LAYOUTS
    for dialect in ("none", "mistral-fp8", "modelopt")
    if (layout, dialect) != ("mistral", "modelopt")  # no such files exist
]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("layout", "dialect"), ALL)
def test_every_dialect_gives_the_same_canonical_tensors(
    make: Any, tmp_path: Path, layout: Layout, dialect: Dialect
) -> None:
    tensors = make.checkpoint(tmp_path, dialect, layout)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.layout == layout
    assert checkpoint.quantization.dialect == dialect
    assert checkpoint.config == (make.text_only if layout == "hf-text" else make.full)
    assert set(checkpoint.names()) == set(tensors)
    assert list(checkpoint.names()) == [
        *expected_tensors(checkpoint.config, checkpoint.quantization)
    ]
    for name, tensor in tensors.items():
        assert same_bytes(checkpoint.tensor(name), tensor), name
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.num_bytes(name) == tensor.nbytes


@pytest.mark.parametrize("dialect", ["none", "mistral-fp8", "modelopt"])
def test_decoded_weights_stay_near_the_originals(make: Any, tmp_path: Path, dialect: str) -> None:
    make.checkpoint(tmp_path, dialect)
    originals = make.weights(make.full)
    checkpoint = Checkpoint.open(tmp_path)
    # Rounding steps of random weights: none, e4m3 (2^-4 relative), e2m1 in blocks of 16.
    bound = {"bf16": 0.0, "fp8": 0.04, "nvfp4": 0.12}
    for linear in linears(make.full):
        weight = originals[f"{linear.name}.weight"].float()
        decoded = checkpoint.decoded(linear.name, torch.float32)
        error = (decoded - weight).norm() / weight.norm()
        assert error <= bound[checkpoint.format_of(linear.name)], linear.name
        assert checkpoint.decoded(linear.name).dtype == torch.bfloat16


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_rank_reads_exactly_its_share(
    checkpoints: dict[str, Checkpoint], data: st.DataObject
) -> None:
    checkpoint = checkpoints[data.draw(st.sampled_from(sorted(checkpoints)))]
    matrices = [name for name in checkpoint.names() if len(checkpoint.shape(name)) == 2]
    name = data.draw(st.sampled_from(matrices))
    whole = checkpoint.tensor(name)
    for axis, read in ((0, checkpoint.rows), (1, checkpoint.columns)):
        start = data.draw(st.integers(0, whole.shape[axis]))
        stop = data.draw(st.integers(start, whole.shape[axis]))
        assert same_bytes(read(name, start, stop), whole.narrow(axis, start, stop - start).clone())


@pytest.fixture(scope="module")
def checkpoints(make: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    opened = {}
    for layout, dialect in (("mistral", "mistral-fp8"), ("hf", "modelopt")):
        directory = tmp_path_factory.mktemp(dialect)
        make.checkpoint(directory, dialect, layout)
        opened[dialect] = Checkpoint.open(directory)
    return opened


def test_scalars_may_be_stored_with_one_element(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path, "mistral-fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    reshaped = {n: t.reshape(1) if t.ndim == 0 else t for n, t in tensors.items()}
    save_file(reshaped, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shape("decoder.0.mlp.up.weight_scale") == ()
    assert checkpoint.tensor("decoder.0.mlp.up.weight_scale").shape == ()
    assert checkpoint.scalar("decoder.0.mlp.up.input_scale") == pytest.approx(0.01, rel=0.01)
    assert checkpoint.decoded("decoder.0.mlp.up").shape == (48, 32)


def test_asking_a_matrix_for_its_value(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="must be a scalar"):
        checkpoints["modelopt"].scalar("norm.weight")
    with pytest.raises(CheckpointError, match=r"holds no tensor decoder\.99"):
        checkpoints["modelopt"].tensor("decoder.99.mlp.up.weight")


def rewrite(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


LAYERS = "model.language_model.layers"
UP = f"{LAYERS}.4.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight"), rf"1 tensors are missing: {UP}\.weight"),
        (lambda t: t.pop(f"{UP}.weight_scale_2"), r"missing: .*up_proj\.weight_scale_2"),
        (lambda t: t.pop(f"{UP}.input_scale"), r"missing: .*up_proj\.input_scale"),
        (
            lambda t: t.pop("model.language_model.layers.2.self_attn.k_proj.k_scale"),
            r"missing: .*layers\.2\.self_attn\.k_proj\.k_scale",
        ),
        (lambda t: t.pop("lm_head.weight"), r"missing: lm_head\.weight"),
        (lambda t: t.update({f"{UP}.bias": torch.zeros(48)}), r"up_proj\.bias means nothing"),
        (
            lambda t: t.update({f"{LAYERS}.0.mlp.down_proj.weight_scale_2": torch.tensor(1.0)}),
            r"down_proj\.weight_scale_2 has no place",
        ),
        (
            lambda t: t.update({f"{LAYERS}.6.input_layernorm.weight": torch.zeros(32).bfloat16()}),
            r"layers\.6\.input_layernorm\.weight has no place",
        ),
        (lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"][:, :1].contiguous()}),
         r"up_proj\.weight_scale is float8_e4m3fn \[48, 1\], the config asks for .* \[48, 2\]"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(48, 32).bfloat16()}),
         r"up_proj\.weight is bfloat16 \[48, 32\], the config asks for uint8 \[48, 16\]"),
        (lambda t: t.update({f"{UP}.input_scale": torch.tensor(1.0).bfloat16()}),
         r"input_scale is bfloat16"),
        (lambda t: t.update({"model.language_model.norm.weight": torch.zeros(32)}),
         r"norm\.weight is float32 \[32\], the config asks for bfloat16"),
    ],
)  # fmt: skip
def test_what_does_not_belong_or_is_not_there_is_named(
    make: Any, tmp_path: Path, change: Any, message: str
) -> None:
    make.checkpoint(tmp_path, "modelopt")
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_ignored_tensors_are_listed_with_the_reason(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path, "mistral-fp8", "mistral")
    path = tmp_path / "consolidated.safetensors"
    tensors = load_file(path)
    extra = "layers.0.attention.k_fake_quantizer.qscale_act"
    save_file({**tensors, extra: torch.tensor(1.0)}, path)
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.ignored) == [extra]
    assert "converter" in checkpoint.ignored[extra]


def test_a_tied_model_has_no_head(make: Any, tmp_path: Path) -> None:
    tied = ModelConfig(replace(make.text, tied_head=True), None)
    make.checkpoint(tmp_path, "modelopt", "hf-text", config=tied)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.text.tied_head
    assert "head.weight" not in checkpoint and "embedding.weight" in checkpoint


def test_hub_files_win_over_native_ones_beside_them(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path, "none", "mistral")
    make.checkpoint(tmp_path, "none", "hf")
    assert Checkpoint.open(tmp_path).layout == "hf"


def test_shards_are_joined(make: Any, tmp_path: Path) -> None:
    tensors = make.checkpoint(tmp_path, "modelopt", shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    assert {checkpoint.shard(name).name for name in tensors} == {
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    }
    for name, tensor in tensors.items():
        assert same_bytes(checkpoint.tensor(name), tensor)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "nothing")


@pytest.mark.parametrize("model", MODELS)
def test_the_references_exports_open(golden_model: Callable[[str], Path], model: str) -> None:
    folder = golden_model(model)
    source = Checkpoint.open(folder / "source")
    export = Checkpoint.open(folder / "export")
    assert export.config == source.config
    assert export.quantization.kv_cache == "fp8"
    shards = {**json.loads((folder / "versions.json").read_text())}
    assert len(export.quantization.formats) == 7 * shards["parameters"]["layers"]
    for linear in decoder_linears(source.config):
        a = source.decoded(linear.name, torch.float32)
        b = export.decoded(linear.name, torch.float32)
        assert (a - b).norm() <= 0.13 * a.norm(), linear.name
        if model.endswith("fp8") and export.format_of(linear.name) == "fp8":
            name = f"{linear.name}.weight"
            assert same_bytes(source.tensor(name), export.tensor(name))
