"""The sampling that a checkpoint recommends: read, bounded, or refused by name."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import CheckpointError
from halfbyte.server.defaults import SamplingDefaults, read_sampling


def read(folder: Path, told: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(told))
    return read_sampling(folder)


def test_what_is_recommended_is_taken_and_the_rest_is_the_apis(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == SamplingDefaults()
    assert astuple(SamplingDefaults()) == (1.0, 1.0, 0, 0.0, 1.0), "those of OpenAI's API"
    told = {"temperature": 0.7, "top_p": 0.95, "top_k": -1, "eos_token_id": 2, "max_length": 20}
    assert read(tmp_path, told) == SamplingDefaults(temperature=0.7, top_p=0.95, top_k=0)
    assert read(tmp_path, {"do_sample": False}) == SamplingDefaults()
    assert read(tmp_path, {"temperature": None, "top_k": 20.0}) == SamplingDefaults(top_k=20)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["0.7", True, [1], -7, 1e30, float("nan"), float("inf")])
def test_what_no_request_could_say_is_refused_with_a_way_out(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=f"{name}.*--generation-config none"):
        read(tmp_path, {name: value})


@pytest.mark.parametrize("text", ["[]", "{", "\x00", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="generation_config"):
        read_sampling(tmp_path)
