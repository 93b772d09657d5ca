"""No recipe is named: the fitted one is taken, and three commands say so in the same words."""

import json
from pathlib import Path

import pytest

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.cli.main import main
from sisters import SISTERS

SMALL = next(one for one in SISTERS if one.name == "ministral-3-3b")
SAID = "recipe mixed, fitted to 5 layers: FP8 in attention and in the MLPs of layers 0 and 4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fitted") / "source"
    SMALL.write(directory, layers=5)
    return directory


def test_quantize_chooses_and_says_what(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--method", "none"]) == 0
    assert SAID in capsys.readouterr().out
    kinds = [Checkpoint.open(out).format_of(f"decoder.{n}.mlp.up") for n in range(5)]
    assert kinds == ["fp8", "nvfp4", "nvfp4", "nvfp4", "fp8"]
    assert main(["verify", str(out), "--against", str(source)]) == 0


def test_plan_and_inspect_say_the_same(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(source), "--no-timing", "--context", "1024", "--method", "none"]
    for command in (plan, ["inspect", "plan", str(source)]):
        assert main(command) == 0
        assert capsys.readouterr().out.startswith(SAID)
    assert main([*plan, "--json"]) == 0
    assert SAID in json.loads(capsys.readouterr().out)["recipe_because"]
    assert main([*plan, "--json", "--recipe", "fp8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recipe_because"] is None and told["recipe_name"] == "fp8"


def test_what_is_no_checkpoint_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
