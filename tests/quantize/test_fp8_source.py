from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.calibrate.stream import input_maxima
from halfbyte.calibrate.tokens import read_token_rows
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.verify import verify
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.modules import decoder_linears
from halfbyte.quantize import fp8_source
from halfbyte.quantize.fp8_source import make_fp8_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.set_num_threads(2)
    write_tiny_checkpoint(tmp_path / "bf16", layers=2)
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    save_file({"batch0.input_ids": ids}, tmp_path / "tokens.safetensors")
    return tmp_path


def test_activation_scales_are_the_measured_maxima(source: Path) -> None:
    tokens = source / "tokens.safetensors"
    make_fp8_source(source / "bf16", source / "fp8", calibration_tokens=tokens)
    made = Checkpoint.open(source / "fp8")
    bf16 = Checkpoint.open(source / "bf16")
    maxima = input_maxima(bf16, read_token_rows(tokens))
    for linear in decoder_linears(bf16.config):
        wanted = torch.tensor(maxima[linear.name] / 448).to(torch.bfloat16)
        assert made.tensor(f"{linear.name}.input_scale").equal(wanted)
    report = verify(source / "fp8", source / "bf16")
    assert report.is_sound, report.problems


def test_what_cannot_work_is_refused_before_any_work(source: Path) -> None:
    tokens = source / "tokens.safetensors"
    (source / "taken").mkdir()
    (source / "taken/file").write_text("x")
    with pytest.raises(UsageError, match="taken exists"):
        make_fp8_source(source / "bf16", source / "taken", calibration_tokens=tokens)
    save_file({"batch0.input_ids": torch.tensor([[512]])}, tokens)
    with pytest.raises(UsageError, match="token 512; the vocabulary ends at 511"):
        make_fp8_source(source / "bf16", source / "fp8", calibration_tokens=tokens)
    write_tiny_checkpoint(source / "quantized", layers=1, dialect="mistral-fp8")
    with pytest.raises(UsageError, match="is mistral-fp8; bf16 is needed"):
        make_fp8_source(source / "quantized", source / "fp8", calibration_tokens=tokens)
    assert not (source / "fp8").exists()
    # The target comes first: nobody waits for a calibration to hear of it.
    with pytest.raises(UsageError, match="taken exists"):
        make_fp8_source(source / "nothing", source / "taken")


def test_tokens_that_do_not_fit_are_named_by_their_source(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = source / "odd.safetensors"
    save_file({"batch0.input_ids": torch.tensor([[512]])}, tokens)
    with pytest.raises(UsageError, match="odd"):
        make_fp8_source(source / "bf16", source / "fp8", calibration_tokens=tokens)
    asked: dict[str, int] = {}

    def rows(_: Path, **sizes: int) -> list[torch.Tensor]:
        asked.update(sizes)
        return [torch.tensor([512])]

    monkeypatch.setattr(fp8_source, "builtin_rows", rows)
    with pytest.raises(UsageError, match="the builtin text"):
        make_fp8_source(source / "bf16", source / "fp8")
    # "4,096 tokens at most", says the documentation.
    assert asked["samples"] * asked["tokens_per_sample"] == 4096


def test_the_command(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calibration-tokens", str(source / "tokens.safetensors"), "--to", "mistral-fp8"]
    assert main(["import", str(source / "bf16"), str(source / "fp8"), *arguments]) == 0
    assert "Mistral FP8, from" in capsys.readouterr().out
    assert main(["import", str(source / "bf16"), str(source / "fp8"), *arguments]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
