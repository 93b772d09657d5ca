"""Settings of a checkpoint that are known to ruin a model, refused where it is loaded."""

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from engine_driver import load, prompt_of, run_alone
from halfbyte.checkpoint import verify
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.checkpoint.names import foreign_name
from halfbyte.checkpoint.written_metadata import hub_config
from halfbyte.cli.main import main
from halfbyte.config import ModelConfig, RopeConfig, TextConfig
from halfbyte.errors import CheckpointError
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

DATA = Path(__file__).parent.parent / "data" / "chat"
MISTAKE = RopeConfig(1e6, "yarn", 64.0, 4096, 4.0, 1.0, 1.0, 1.0, 0.0)
MEDIUM = ModelConfig(
    TextConfig(
        88, 12288, 96, 8, 128, 28672, 131072, 1e-5, 262144, MISTAKE, False, 1, (2,), 11
    ),
    None,
)  # fmt: skip


def write_hollow(directory: Path, config: ModelConfig) -> None:
    """A checkpoint whose only shard is a header and a hole: all names and sizes, no bytes."""
    directory.mkdir()
    header, offset = {}, 0
    for name, expected in expected_tensors(config, unquantized(config)).items():
        num_bytes = 2
        for size in expected.shape:
            num_bytes *= size
        header[foreign_name(name, "hf-text", "none")] = {
            "dtype": "BF16",
            "shape": list(expected.shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    (directory / "config.json").write_text(json.dumps(hub_config(config)))
    shutil.copy(DATA / "tekken" / "tekken.json", directory)


def test_serve_refuses_the_bad_medium_3_5_before_it_reads_a_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        write_hollow(tmp_path / "medium", MEDIUM)
    except OSError as error:  # a file system without holes
        pytest.skip(f"no file of 250 GB without its bytes here: {error}")
    stated = json.loads((tmp_path / "medium" / "config.json").read_text())["rope_parameters"]
    assert (stated["factor"], stated["original_max_position_embeddings"]) == (64.0, 4096)
    assert (stated["mscale"], stated["mscale_all_dim"]) == (1.0, 1.0)
    assert main(["serve", str(tmp_path / "medium"), "--port", "0", "--device", "cpu"]) != 0
    message = capsys.readouterr().err
    assert "mscale_all_dim is 1: this is the geometry of Mistral Medium 3.5" in message
    assert "attention factor 1.416" in message and "--accept mscale_all_dim" in message


def tiny_with(all_dim: float) -> ModelConfig:
    config = tiny_config(layers=1)
    rope = replace(config.text.rope, mscale_all_dim=all_dim)
    return replace(config, text=replace(config.text, rope=rope))


def test_the_refusal_can_be_overridden_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_with(1.0)
    write_tiny_checkpoint(tmp_path / "bad", config=config)
    write_tiny_checkpoint(tmp_path / "good", config=tiny_with(0.0))
    # Every other model of the class may say 1, and is then computed without the factor.
    as_stated = run_alone(load(tmp_path / "bad"), prompt_of(40)).logprobs
    assert as_stated != run_alone(load(tmp_path / "good"), prompt_of(40)).logprobs
    text = config.text
    geometry = (
        text.num_layers, text.width, text.num_heads, text.num_kv_heads, text.head_dim,
        text.mlp_width,
    )  # fmt: skip
    monkeypatch.setattr(verify, "_MEDIUM_35", geometry)
    with pytest.raises(CheckpointError, match="mscale_all_dim is 1"):
        load(tmp_path / "bad")
    with pytest.raises(CheckpointError, match="mscale_all_dim is 1"):
        load(tmp_path / "bad", accept=("something_else",))
    accepted = load(tmp_path / "bad", accept=("mscale_all_dim",))
    assert run_alone(accepted, prompt_of(40)).logprobs == as_stated
    load(tmp_path / "good")
