"""Quantizing with image rows: counted by plan, resumed, part of what the bytes depend on."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from halfbyte.calibrate.blend import load_blend
from halfbyte.calibrate.draw import draw, write_rows
from halfbyte.calibrate.seeing import PictureBytes, picture_bytes
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.cli.main import main
from halfbyte.errors import CapacityError, UsageError
from halfbyte.model.tiny import tiny_config
from halfbyte.quantize.job import QuantizeConfig, validate
from halfbyte.quantize.memory import plan_memory
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe
from seeing_model import write_seeing

RECIPE = load_recipe("medium-3.5")


class _KilledError(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tower, and calibration rows of which some show pictures."""
    root = tmp_path_factory.mktemp("seeing")
    write_seeing(root / "source", layers=6)
    blend = replace(load_blend("pictures"), samples=8, tokens_per_sample=96)
    write_rows(draw(blend, root / "source"), root / "rows.safetensors")
    return root


def job(root: Path, output: Path) -> QuantizeConfig:
    return QuantizeConfig(
        root / "source",
        output,
        RECIPE,
        calibration_tokens=root / "rows.safetensors",
        with_errors=False,
    )


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def test_a_killed_run_with_pictures_goes_on_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    quantize(job(root, tmp_path / "whole"))
    for last in (1, 4):

        def kill(layer: int, _: int, last: int = last) -> None:
            if layer == last:
                raise _KilledError

        output = tmp_path / f"out{last}"
        with pytest.raises(_KilledError):
            quantize(job(root, output), kill)
        quantize(job(root, output))
        assert weights(output) == weights(tmp_path / "whole")
        assert not list(output.glob("pictures*"))


def test_image_rows_change_scales_and_are_named_in_the_record(root: Path, tmp_path: Path) -> None:
    result = quantize(job(root, tmp_path / "seen"))
    calibration = result.record["calibration"]
    assert calibration is not None and calibration["pictures"]["pictures"] > 0
    rows = load_file(root / "rows.safetensors")
    blind = {name: tensor for name, tensor in rows.items() if name.endswith("input_ids")}
    save_file(blind, tmp_path / "blind.safetensors")
    config = replace(
        job(root, tmp_path / "unseen"), calibration_tokens=tmp_path / "blind.safetensors"
    )
    plain = quantize(config).record["calibration"]
    assert plain is not None and "pictures" not in plain
    assert weights(tmp_path / "seen") != weights(tmp_path / "unseen")


def test_other_pixels_are_another_run(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(_KilledError):
        quantize(job(root, output), _kill_at_once)
    rows = load_file(root / "rows.safetensors")
    name = next(name for name in rows if ".picture" in name)
    rows[name][0, 0, 0] ^= 1
    save_file(rows, tmp_path / "rows.safetensors")
    config = replace(job(root, output), calibration_tokens=tmp_path / "rows.safetensors")
    with pytest.raises(UsageError, match="calibration"):
        quantize(config)


def _kill_at_once(_: int, __: int) -> None:
    raise _KilledError


def test_memory_counts_pixels_patches_and_the_tower(root: Path) -> None:
    validated = validate(job(root, root / "never"))
    seen = picture_bytes(validated.pictures, validated.checkpoint.config)
    assert min(seen) > 0
    assert seen.pixels == sum(i.pixels.nbytes for row in validated.pictures for i in row)
    text = tiny_config().text
    plain = plan_memory(text, longest_row_tokens=64, activation_bytes=1 << 20, budget_bytes=4 << 30)
    large = PictureBytes(pixels=1 << 30, patches=1 << 30, tower=1 << 30)
    both = plan_memory(
        text,
        longest_row_tokens=64,
        activation_bytes=1 << 20,
        budget_bytes=8 << 30,
        pictures=large,
    )
    assert both.activations_in_memory and both.peak_bytes >= plain.peak_bytes + (2 << 30)
    tight = plan_memory(
        text,
        longest_row_tokens=64,
        activation_bytes=1 << 20,
        budget_bytes=3 << 30,
        pictures=large,
    )
    assert not tight.activations_in_memory and tight.peak_bytes <= 3 << 30
    with pytest.raises(CapacityError):
        plan_memory(
            text,
            longest_row_tokens=64,
            activation_bytes=1 << 20,
            budget_bytes=2 << 30,
            pictures=large,
        )


def test_plan_says_what_pictures_take(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(root / "source"), "--recipe", "medium-3.5", "--no-timing"]
    assert main([*arguments, "--blend", "pictures", "--samples", "4"]) == 0
    assert "pixels held throughout" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "pixels held" not in capsys.readouterr().out


def test_a_text_blend_is_drawn_as_if_there_were_no_pictures(root: Path) -> None:
    config = replace(job(root, root / "never"), calibration_tokens=None)
    validated = validate(config)
    assert validated.pictures == ()
    calibration = validated.fingerprint["calibration"]
    assert set(calibration) == {"rows", "tokens", "longest", "sha256", "provenance"}
    assert "pictures" not in calibration["provenance"]
    assert Checkpoint.open(root / "source").config.vision is not None
