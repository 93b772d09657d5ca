"""Shares of image rows that static scales cut off: in the record, on the page, as a warning."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.calibrate.blend import load_blend
from halfbyte.calibrate.draw import draw, write_rows
from halfbyte.calibrate.tokens import read_rows
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.quantize.clipping import (
    SATURATES_BEYOND,
    checkpoint_clipping,
    clipped_words,
    worst,
)
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.page import render, write_report
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.record import QuantizationRecord
from halfbyte.recipe.schema import load_recipe
from seeing_model import write_seeing

LAYERS, LOUD = 6, "decoder.1.mlp.down"


class _KilledError(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source one of whose scales is far too small for any row, and rows with pictures."""
    root = tmp_path_factory.mktemp("clipping")
    write_seeing(root / "source", layers=LAYERS)
    shard = next((root / "source").glob("*.safetensors"))
    tensors = load_file(shard)
    name = "model.language_model.layers.1.mlp.down_proj.activation_scale"
    assert name in tensors, sorted(tensors)[:5]
    tensors[name] = tensors[name] / 64
    save_file(tensors, shard, {"format": "pt"})
    blend = replace(load_blend("pictures"), samples=8, tokens_per_sample=96)
    write_rows(draw(blend, root / "source"), root / "rows.safetensors")
    return root


def config_of(root: Path, output: Path, recipe: str = "medium-3.5") -> QuantizeConfig:
    return QuantizeConfig(
        root / "source",
        output,
        load_recipe(recipe),
        calibration_tokens=root / "rows.safetensors",
    )


@pytest.fixture(scope="module")
def record(root: Path) -> QuantizationRecord:
    return quantize(config_of(root, root / "out")).record


def test_the_record_holds_what_each_scale_clips(record: QuantizationRecord) -> None:
    clipping = {one["name"]: one for one in record["clipping"]}
    assert len(clipping) == LAYERS * 7
    for layer in record["layers"]:
        by_kind = layer["observed_by_kind"]
        for tap, magnitude in layer["observed"].items():
            assert max(by_kind["text"][tap], by_kind["image"][tap]) == magnitude
    for one in clipping.values():
        # Scales of all rows clip none of them; scales of text rows clip no text.
        assert one["clipped"]["chosen"] == {
            kind: {"tokens": 0.0, "values": 0.0} for kind in ("text", "image")
        }
        assert one["clipped"]["text"]["text"]["tokens"] == 0
        times = 6 if one["format"] == "nvfp4" else 1
        limit = SATURATES_BEYOND * one["scales"]["text"] * times
        is_clipped = one["largest"]["image"] > limit
        assert (one["clipped"]["text"]["image"]["tokens"] > 0) == is_clipped
    loud = clipping[LOUD]["clipped"]["source"]
    assert loud["image"]["tokens"] > 0.5 and 0 < loud["image"]["values"] < loud["image"]["tokens"]


def test_the_page_shows_kinds_only_where_pictures_were_run(
    root: Path, record: QuantizationRecord, tmp_path: Path
) -> None:
    page, data = write_report(record, tmp_path / "report.html")
    text = page.read_text("utf-8")
    assert "Text and image rows" in text and "image tokens clipped by the source" in text
    assert json.loads(data.read_text("utf-8"))["clipping"] == list(record["clipping"])
    ids = {n: t for n, t in load_file(root / "rows.safetensors").items() if n.endswith("input_ids")}
    save_file(ids, tmp_path / "text.safetensors")
    config = replace(
        config_of(root, tmp_path / "out"), calibration_tokens=tmp_path / "text.safetensors"
    )
    plain = quantize(config).record
    assert "clipping" not in plain and "observed_by_kind" not in plain["layers"][0]
    assert "Text and image rows" not in render(plain)


def test_a_source_that_clips_is_named_with_shares_and_remedies(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def kill(layer: int, _: int) -> None:
        if layer == 2:
            raise _KilledError

    config = config_of(root, tmp_path / "out")
    with pytest.raises(_KilledError):
        quantize(config, kill)
    # The resumed run speaks of layers that it did not run itself.
    with caplog.at_level(logging.WARNING, "halfbyte"):
        quantize(config)
    (said,) = [r.getMessage() for r in caplog.records if "clip image rows" in r.getMessage()]
    assert "the source's own FP8 input scales" in said and str(root / "source") in said
    assert LOUD in said and "% of image tokens (text" in said
    assert (
        "--blend pictures" in said and "headroom" in said and "--fp8-activations per-token" in said
    )


def test_a_finished_checkpoint_is_judged_by_its_own_scales(
    root: Path, record: QuantizationRecord
) -> None:
    rows, pictures = read_rows(root / "rows.safetensors")
    source = checkpoint_clipping(Checkpoint.open(root / "source"), rows, pictures)
    stated = {one["name"]: one for one in source}
    assert worst(source, "chosen")[0]["name"] == LOUD
    for one in record["clipping"]:
        if one["format"] == "fp8":
            assert stated[one["name"]]["clipped"]["chosen"] == one["clipped"]["source"]
    made = checkpoint_clipping(Checkpoint.open(root / "out"), rows, pictures)
    assert {one["name"] for one in made} == {
        one["name"] for one in record["clipping"] if one["format"] == "fp8"
    }
    assert clipped_words(made, "chosen", "these") is None
    assert checkpoint_clipping(Checkpoint.open(root / "out"), rows, ()) == []


def test_headroom_leaves_room_and_nothing_is_clipped(root: Path, tmp_path: Path) -> None:
    recipe = load_recipe("fp8")
    scales = replace(recipe.scales, activations="headroom")
    config = replace(config_of(root, tmp_path / "out"), recipe=replace(recipe, scales=scales))
    for one in quantize(config).record["clipping"]:
        largest = max(one["largest"].values())
        assert one["scales"]["chosen"] * 448 == pytest.approx(2 * largest, rel=1e-6)
        assert one["clipped"]["chosen"]["image"]["tokens"] == 0


def test_kinds_do_not_change_a_byte(root: Path, record: QuantizationRecord) -> None:
    """Scales are those of all rows together, whatever is told apart beside."""
    scales = {
        one["name"]: one["scales"]["chosen"] for one in record["clipping"] if one["format"] == "fp8"
    }
    observed = {layer["layer"]: layer["observed"] for layer in record["layers"]}
    for name, scale in scales.items():
        layer, short = int(name.split(".")[1]), name.split(".", 2)[2]
        tap = {
            "attention.q": "attention.input", "attention.k": "attention.input",
            "attention.v": "attention.input", "attention.o": "attention.o.input",
            "mlp.gate": "mlp.input", "mlp.up": "mlp.input", "mlp.down": "mlp.down.input",
        }[short]  # fmt: skip
        assert scale == float(torch.tensor(observed[layer][tap]) / torch.tensor(448.0))
