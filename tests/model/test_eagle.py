"""The EAGLE draft model's arithmetic, and which directories are one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig, TextConfig
from halfbyte.errors import CheckpointError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.eagle import EagleHead
from halfbyte.model.load import load_eagle
from halfbyte.model.rope import frequencies
from halfbyte.model.tiny import tiny_config, write_tiny_eagle
from tolerances import EAGLE_LAYERS

TARGET = tiny_config(layers=2)
TEXT = TARGET.text


def drafted(directory: Path, **options: Any) -> EagleHead:
    write_tiny_eagle(directory, TARGET, **options)
    return load_eagle(Checkpoint.open_eagle(directory), TEXT)


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embedded, hidden = torch.randn(2, count, TEXT.width, generator=generator).bfloat16()
    return embedded, hidden, torch.arange(count)


def in_float64(
    checkpoint: Checkpoint, config: TextConfig, embedded: Tensor, hidden: Tensor
) -> Tensor:
    """The draft model written out again in float64, from the names in the file."""
    files = load_file(checkpoint.directory / "consolidated.safetensors")
    weights = {name: tensor.double() for name, tensor in files.items()}
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    count = len(embedded)

    def norm(x: Tensor, name: str) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
        weight: Tensor = weights[f"{name}.weight"]
        return scaled * weight

    def rotated(x_TNH: Tensor) -> Tensor:
        """Native pairs lie side by side."""
        angles = torch.arange(count).double()[:, None] * frequencies(config.rope, size)
        factor = config.rope.attention_factor
        cos, sin = angles.cos()[:, None] * factor, angles.sin()[:, None] * factor
        first, second = x_TNH[..., 0::2], x_TNH[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return pairs.flatten(-2)

    periods = torch.arange(count) // config.rope.original_max_positions
    scale_T = 1 + config.rope.llama_4_scaling_beta * torch.log1p(periods.double())
    x = torch.cat((embedded, hidden), -1).double() @ weights["eagle_linear.weight"].T
    for layer in range(config.num_layers):
        at = f"layers.{layer}"
        normed = norm(x, f"{at}.attention_norm")
        q, k, v = (
            (normed @ weights[f"{at}.attention.{name}.weight"].T).view(count, -1, size)
            for name in ("wq", "wk", "wv")
        )
        q, k = rotated(q) * scale_T[:, None, None], rotated(k)
        group = heads // kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qnh,knh->nqk", q, k) / size**0.5
        scores += torch.full((count, count), -torch.inf).double().triu(1)
        attended = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).flatten(1)
        x = x + attended @ weights[f"{at}.attention.wo.weight"].T
        normed = norm(x, f"{at}.ffn_norm")
        gate, up, down = (weights[f"{at}.feed_forward.w{i}.weight"] for i in (1, 3, 2))
        x = x + (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return norm(x, "norm")


def test_head_computes_what_its_file_says(tmp_path: Path) -> None:
    """The embedding comes before the hidden state, rows are in native order, norms in place."""
    head = drafted(tmp_path / "eagle", seed=3)
    embedded, hidden, positions = inputs(90)
    found = head(embedded, hidden, positions, DenseAttend([0, 90]))
    checkpoint = Checkpoint.open_eagle(tmp_path / "eagle")
    wanted = in_float64(checkpoint, checkpoint.config.text, embedded, hidden)
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < EAGLE_LAYERS, f"relative error {error}"
    swapped = in_float64(checkpoint, checkpoint.config.text, hidden, embedded)
    assert (found.double() - swapped).norm() / swapped.norm() > 0.5


def test_fp8_head_is_its_bf16_twin_to_a_code(tmp_path: Path) -> None:
    quantized = drafted(tmp_path / "fp8", dialect="mistral-fp8")
    checkpoint = Checkpoint.open_eagle(tmp_path / "fp8")
    assert checkpoint.format_of("eagle.fuse") == "fp8"
    decoded = {
        f"{name}.weight": checkpoint.decoded(name)
        for name in ("eagle.fuse", *(f"decoder.{i}.{m}" for i in range(2) for m in LINEARS))
    }
    twin = drafted(tmp_path / "bf16", replaced=decoded)
    assert quantized.num_weight_bytes < 0.6 * twin.num_weight_bytes
    embedded, hidden, positions = inputs(20)
    found, wanted = (
        head(embedded, hidden, positions, DenseAttend([0, 20])).double()
        for head in (quantized, twin)
    )
    assert (found - wanted).norm() / wanted.norm() < EAGLE_LAYERS


LINEARS = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


def test_bf16_fuse_beside_fp8_layers_is_read(tmp_path: Path) -> None:
    write_tiny_eagle(tmp_path / "eagle", TARGET, dialect="mistral-fp8")
    path = tmp_path / "eagle" / "consolidated.safetensors"
    files = load_file(path)
    fuse = files.pop("eagle_linear.weight").bfloat16()
    del files["eagle_linear.qscale_weight"], files["eagle_linear.qscale_act"]
    save_file({**files, "eagle_linear.weight": fuse}, path)
    checkpoint = Checkpoint.open_eagle(tmp_path / "eagle")
    assert checkpoint.format_of("eagle.fuse") == "bf16"
    assert checkpoint.format_of("decoder.1.mlp.up") == "fp8"
    load_eagle(checkpoint, TEXT)


def test_own_embedding_and_head_are_left_alone(tmp_path: Path) -> None:
    write_tiny_eagle(tmp_path / "eagle", TARGET)
    path = tmp_path / "eagle" / "consolidated.safetensors"
    table = torch.zeros(TEXT.vocab_size, TEXT.width, dtype=torch.bfloat16)
    save_file(
        {**load_file(path), "tok_embeddings.weight": table, "output.weight": table.clone()}, path
    )
    checkpoint = Checkpoint.open_eagle(tmp_path / "eagle")
    assert set(checkpoint.ignored) == {"tok_embeddings.weight", "output.weight"}
    load_eagle(checkpoint, TEXT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eagle_linear.weight": None}, "no eagle_linear.weight among 19 tensors"),
        ({"layers.1.attention.wk.weight": None}, "1 tensors are missing: layers.1.attention.wk"),
        ({"extra.weight": torch.zeros(3)}, "extra.weight means nothing"),
        ({"layers.2.ffn_norm.weight": torch.zeros(128).bfloat16()}, "has no place in the model"),
        ({"eagle_linear.weight": torch.zeros(128, 128).bfloat16()}, r"asks for .* \[128, 256\]"),
    ],
)
def test_what_is_no_eagle_head_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    write_tiny_eagle(tmp_path / "eagle", TARGET)
    path = tmp_path / "eagle" / "consolidated.safetensors"
    files = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in files.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open_eagle(tmp_path / "eagle")


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no params\.json, so it is not an EAGLE head"):
        Checkpoint.open_eagle(tmp_path)
    write_tiny_eagle(tmp_path / "eagle", TARGET)
    path = tmp_path / "eagle" / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eagle_depth": 3}))
    with pytest.raises(CheckpointError, match="eagle_depth = 3"):
        Checkpoint.open_eagle(tmp_path / "eagle")


def test_head_of_another_model_is_refused(tmp_path: Path) -> None:
    other = ModelConfig(replace(TEXT, width=64), None)
    write_tiny_eagle(tmp_path / "eagle", other)
    with pytest.raises(CheckpointError, match="width 64 does not fit the model's 128"):
        load_eagle(Checkpoint.open_eagle(tmp_path / "eagle"), TEXT)
    wordy = ModelConfig(replace(TEXT, vocab_size=1024), None)
    write_tiny_eagle(tmp_path / "wordy", wordy)
    with pytest.raises(CheckpointError, match="vocab_size 1024 does not fit the model's 512"):
        load_eagle(Checkpoint.open_eagle(tmp_path / "wordy"), TEXT)
