from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.fp8_source import write_fp8_source
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import FormatError, UsageError
from halfbyte.modules import decoder_linears


@pytest.mark.parametrize("layout", ["hf", "hf-old", "hf-text"])
def test_the_source_reads_back_within_one_rounding(make: Any, tmp_path: Path, layout: Any) -> None:
    make.checkpoint(tmp_path / "bf16", "none", layout)
    (tmp_path / "bf16/chat_template.jinja").write_text("template")
    source = Checkpoint.open(tmp_path / "bf16")
    amax = {x.name: 4.48 for x in decoder_linears(source.config)}
    write_fp8_source(source, amax, tmp_path / "fp8")
    made = Checkpoint.open(tmp_path / "fp8")
    assert made.quantization == make.quantization(made.config, "mistral-fp8")
    assert (made.config, made.layout) == (source.config, layout)
    assert (tmp_path / "fp8/chat_template.jinja").read_text() == "template"
    quantized = {x.name for x in decoder_linears(source.config)}
    for name in source.names():
        linear = name.removesuffix(".weight")
        if linear not in quantized:
            assert made.tensor(name).equal(source.tensor(name))
            continue
        weight, decoded = source.tensor(name).float(), made.decoded(linear, torch.float32)
        # e4m3 keeps 3 bits: half a step is 2^-4 of the value, the smallest step 2^-10 of the scale.
        scale = made.scalar(f"{linear}.weight_scale")
        assert ((decoded - weight).abs() <= weight.abs() * 2**-4 + scale * 2**-10).all()
        assert made.tensor(name).float().abs().amax() == 448.0
        for role in ("weight_scale", "input_scale"):
            assert made.dtype(f"{linear}.{role}") == torch.bfloat16
            assert made.shape(f"{linear}.{role}") == ()
        assert made.scalar(f"{linear}.input_scale") == pytest.approx(0.01, rel=2**-8)


def test_missing_maxima_and_wrong_sources_are_named(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path / "bf16")
    make.checkpoint(tmp_path / "fp8", "mistral-fp8")
    make.checkpoint(tmp_path / "native", "none", "mistral")
    source = Checkpoint.open(tmp_path / "bf16")
    amax = {x.name: 1.0 for x in decoder_linears(source.config)}
    short = {name: value for name, value in amax.items() if name != "decoder.2.mlp.up"}
    with pytest.raises(
        UsageError, match=r"no input maximum for decoder\.2\.mlp\.up \(1 " r"linears lack one"
    ):
        write_fp8_source(source, short, tmp_path / "out")
    for other, message in (("fp8", "is mistral-fp8; bf16 is needed"), ("native", "native layout")):
        with pytest.raises(UsageError, match=message):
            write_fp8_source(Checkpoint.open(tmp_path / other), amax, tmp_path / "out")
    with pytest.raises(FormatError, match=r"decoder\.3\.mlp\.down: .*largest magnitude"):
        write_fp8_source(source, {**amax, "decoder.3.mlp.down": 0.0}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named(make: Any, tmp_path: Path) -> None:
    make.checkpoint(tmp_path / "bf16")
    path = tmp_path / "bf16/model.safetensors"
    tensors = load_file(path)
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    source = Checkpoint.open(tmp_path / "bf16")
    amax = {x.name: 1.0 for x in decoder_linears(source.config)}
    with pytest.raises(FormatError, match=r"decoder\.1\.mlp\.up: "):
        write_fp8_source(source, amax, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16"]
