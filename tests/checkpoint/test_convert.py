"""Weights in f32 and f16: refused with what to do, and converted by it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.convert import convert_to_bf16
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError, FormatError, UsageError

WIDE = (torch.float32, torch.float16)


def widened(directory: Path, dtype: torch.dtype, *, only: str = "") -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16 and tensor.dim() and only in name:
            tensors[name] = tensor.to(dtype)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("dialect", ["none", "mistral-fp8"])
@pytest.mark.parametrize("only", ["", "norm"])
@pytest.mark.parametrize("dtype", WIDE)
def test_a_wide_checkpoint_says_what_to_do_and_that_works(
    make: Any,
    tmp_path: Path,
    dialect: str,
    only: str,
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make.checkpoint(tmp_path / "bf16", dialect)
    make.checkpoint(tmp_path / "wide", dialect)
    (tmp_path / "wide" / "tokenizer.json").write_text("{}")
    widened(tmp_path / "wide", dtype, only=only)
    said = r"is float(32|16) .*`halfbyte import DIR OUT` writes it in bf16"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path / "wide")
    assert main(["import", str(tmp_path / "wide"), str(tmp_path / "out")]) == 0
    assert "bf16, 6 layers" in capsys.readouterr().out
    before, after = Checkpoint.open(tmp_path / "bf16"), Checkpoint.open(tmp_path / "out")
    assert before.config == after.config and before.quantization == after.quantization
    for name in before.names():
        assert torch.equal(
            before.tensor(name).to(torch.float32), after.tensor(name).to(torch.float32)
        )
    assert verify(tmp_path / "out").is_sound
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_the_config_says_what_the_weights_are_now(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path / "wide")
    widened(tmp_path / "wide", torch.float32)
    path = tmp_path / "wide" / "config.json"
    raw = json.loads(path.read_text())
    raw["dtype"] = raw["text_config"]["dtype"] = "float32"
    raw["torch_dtype"] = "float32"
    path.write_text(json.dumps(raw))
    convert_to_bf16(tmp_path / "wide", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [said["dtype"], said["torch_dtype"], said["text_config"]["dtype"]] == ["bfloat16"] * 3
    assert said["text_config"]["hidden_size"] == raw["text_config"]["hidden_size"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38])
def test_what_bf16_cannot_hold_is_refused_by_name(make: Any, tmp_path: Path, value: float) -> None:
    make.checkpoint(tmp_path / "wide")
    widened(tmp_path / "wide", torch.float32)
    path = tmp_path / "wide" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][3, 2] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"lm_head\.weight: holds NaN or infinity"):
        convert_to_bf16(tmp_path / "wide", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["wide"]


def test_other_dtypes_and_shapes_are_no_matter_of_converting(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path / "odd")
    path = tmp_path / "odd" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float64)
    save_file(tensors, path, {"format": "pt"})
    said = r"is float64 \[64, 32\], the config asks for bfloat16 \[64, 32\]$"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=said):
        convert_to_bf16(tmp_path / "odd", tmp_path / "out")


@pytest.mark.parametrize("dialect", ["none", "mistral-fp8"])
def test_what_is_bf16_is_not_copied_for_nothing(make: Any, tmp_path: Path, dialect: str) -> None:
    make.checkpoint(tmp_path / "bf16", dialect)
    with pytest.raises(UsageError, match="is a checkpoint already"):
        convert_to_bf16(tmp_path / "bf16", tmp_path / "out")


def test_a_native_layout_is_refused(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path / "native", "none", "mistral")
    with pytest.raises(UsageError, match="is in the native layout; a hub layout is needed"):
        convert_to_bf16(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()
