"""What the exporter writes beside the weights: how to sample, and the hashes of everything."""

import hashlib
import json
from pathlib import Path

import pytest
from pocket.model import initial_weights, pocket_config
from transformers import GenerationConfig

from halfbyte.server.defaults import read_sampling
from pocket import export

SMALL: dict[str, int] = {
    "layers": 1, "width": 128, "mlp_width": 128, "vision_layers": 1, "vision_width": 128,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tekken: Path) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    record = folder / "record.json"
    record.write_text("{}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "ITEMS_A_KIND", 1)
        config = pocket_config(**SMALL)
        weights = initial_weights(config, 3, "cpu")
        export.export(weights, tekken, folder / "fp8", config=config, record=record)
    return folder / "fp8"


def test_a_request_that_does_not_say_is_answered_greedily(exported: Path) -> None:
    assert read_sampling(exported).temperature == 0.0
    assert not GenerationConfig.from_pretrained(exported).do_sample
    told = json.loads((exported / "generation_config.json").read_text())
    assert told["eos_token_id"] == [2]


def hashes_hold(directory: Path) -> None:
    told = json.loads((directory / "SHA256.json").read_text())
    files = {path.name: path for path in directory.iterdir() if path.name != "SHA256.json"}
    assert told == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in files.items()}


def test_hashes_name_every_file_as_it_is(exported: Path) -> None:
    assert (exported / "training.json").is_file()
    hashes_hold(exported)


def test_hashes_written_again_do_not_count_themselves(exported: Path) -> None:
    export.write_hashes(exported)
    hashes_hold(exported)


def test_the_committed_model_is_the_one_its_hashes_name() -> None:
    hashes_hold(ROOT / "pocket" / "model")
