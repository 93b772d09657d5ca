"""Commands that may take long: what is done and how much is left can be seen meanwhile."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.cli.main import main
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.progress import ProgressLine


def test_a_long_command_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ProgressLine, "is_due", lambda _: True)
    write_tiny_checkpoint(tmp_path / "bf16", layers=3)
    tokens = {"batch0.input_ids": torch.arange(8)[None]}
    save_file(tokens, tmp_path / "few.safetensors")
    (tmp_path / "text").write_text("Of bridges and rivers.\n")
    bf16, fp8, mixed, few = (
        str(tmp_path / name) for name in ("bf16", "fp8", "mixed", "few.safetensors")
    )
    for command, unit in (
        (["import", bf16, fp8, "--to", "mistral-fp8", "--calibration-tokens", few], "layers"),
        (["quantize", fp8, mixed, "--recipe", "nvfp4-everywhere", "--method", "none"], "layers"),
        (["verify", mixed, "--against", fp8], "tensors"),
    ):
        assert main(command) == 0, command
        shown = re.findall(
            rf"(\d+) of (\d+) {unit}.*, (\d+) %, about .* left", told := capsys.readouterr().err
        )
        assert shown, (command, told)
        assert all(int(done) < int(total) for done, total, _ in shown)
