"""A model that sees, quantized without its tower: a text model, sound and served as one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe
from vllm_rules import require_vllm_reads


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    config = tiny_config(layers=3, vision=True)
    write_tiny_checkpoint(root / "fp8", config=config, dialect="mistral-fp8")
    (root / "fp8" / "preprocessor_config.json").write_text("{}")
    ids = torch.randint(20, 512, (3, 24), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")
    return root


def test_the_tower_is_left_out_and_nothing_else_changes(source: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(
        source / "fp8",
        tmp_path / "sees",
        load_recipe("nvfp4-everywhere"),
        calibration_tokens=source / "tokens.safetensors",
        with_errors=False,
    )
    quantize(config)
    quantize(replace(config, output=tmp_path / "text", has_vision=False))
    sees, text = (Checkpoint.open(tmp_path / name) for name in ("sees", "text"))
    assert text.config.vision is None and text.layout == "hf-text"
    assert text.config.text == sees.config.text
    left = [name for name in sees.names() if not name.startswith(("encoder.", "projector."))]
    assert list(text.names()) == left and len(left) < len(sees.names())
    for name in left:
        ours, theirs = (x.tensor(name).reshape(-1).view(torch.uint8) for x in (text, sees))
        assert torch.equal(ours, theirs), name
    findings = verify(tmp_path / "text", source / "fp8")
    assert findings.is_sound, findings.problems
    assert any("vision tower is left out" in str(problem) for problem in findings.problems)
    require_vllm_reads(tmp_path / "text")
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    assert raw["model_type"] == "ministral3" and "vision_config" not in raw
    assert all("vision" not in name for name in load_file(tmp_path / "text/model.safetensors"))
    step = Step(torch.arange(20, 40), torch.arange(20), DenseAttend([0, 20]))
    assert torch.equal(*(load_decoder(x).forward(step) for x in (text, sees)))
    assert load_vision(text) is None


def test_a_tower_that_is_not_there_cannot_be_left_out(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_checkpoint(tmp_path / "blind", layers=3, dialect="mistral-fp8")
    with pytest.raises(CheckpointError, match="has no vision tower to leave out"):
        Checkpoint.open(tmp_path / "blind").without_vision()
    assert main(["plan", str(tmp_path / "blind"), "--no-vision", "--no-timing"]) != 0
    assert "no vision tower to leave out" in capsys.readouterr().err


def test_a_budget_counts_without_the_tower(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ["--calibration-tokens", str(source / "tokens.safetensors")]
    paths = [str(source / "fp8"), str(tmp_path / "out"), *tokens, "--budget", "560kB"]
    assert main(["quantize", *paths]) != 0
    assert "vision tower: --no-vision" in capsys.readouterr().err
    assert main(["quantize", *paths, "--no-vision"]) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert size <= 560_000
    assert verify(tmp_path / "out", source / "fp8").is_sound
