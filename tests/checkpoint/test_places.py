"""No checkpoint is written inside another one, whichever command writes it, and nothing is left."""

import os
from pathlib import Path

import pytest

from halfbyte.checkpoint.convert import convert_to_bf16
from halfbyte.checkpoint.writer import check_target
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.fp8_source import make_fp8_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("places") / "fp8"
    write_tiny_checkpoint(directory)
    return directory


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


@pytest.mark.parametrize("place", ["out", "a/b/c", "./x/../out", ".hidden/out"])
def test_places_inside_a_checkpoint_are_refused(place: str, source: Path, tmp_path: Path) -> None:
    before = names(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source / place, link / place):
        with pytest.raises(UsageError, match="lies inside the checkpoint"):
            check_target(target)
        with pytest.raises(UsageError, match="lies inside the checkpoint"):
            make_fp8_source(source, target)
        with pytest.raises(UsageError, match="lies inside the checkpoint"):
            convert_to_bf16(source, target)
    assert names(source) == before


def test_quantize_says_so(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(source)
    assert main(["quantize", str(source), str(source / "out"), "--recipe", "fp8"]) == 2
    assert "lies inside the checkpoint" in capsys.readouterr().err
    assert names(source) == before


@pytest.mark.parametrize("beside", ["config.json", "model.safetensors", "tekken.json"])
def test_folders_that_are_no_checkpoint_may_hold_one(beside: str, tmp_path: Path) -> None:
    (tmp_path / beside).write_text("{}")
    check_target(tmp_path / "out")
    check_target(tmp_path / "a" / "b")
