from pathlib import Path
from typing import Any

import pytest

from halfbyte.checkpoint.overview import overview
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.cli.main import main
from halfbyte.model.tiny import write_tiny_checkpoint


def test_parts_add_up_to_the_total(make: Any, tmp_path: Path) -> None:
    tensors = make.checkpoint(tmp_path, "modelopt", shards=2)
    text = overview(Checkpoint.open(tmp_path))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert f"{len(tensors)} in 2 file(s), {total:,} bytes" in text
    parts = [line for line in text.splitlines() if line.startswith("  ")]
    assert sum(int(line.split()[-2].replace(",", "")) for line in parts) == total
    assert "39 fp8, 3 nvfp4" in text and "Model Optimizer export; layout hf" in text
    assert "factor 64 over 4096, beta 4/1, mscale 1/0" in text


def test_inspect_says_what_a_directory_is(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make.checkpoint(tmp_path, "mistral-fp8", "mistral")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "Mistral FP8" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_inspect_plan_prints_the_table(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make.checkpoint(tmp_path, "mistral-fp8")
    assert main(["inspect", "plan", str(tmp_path), "--recipe", "medium-3.5"]) == 0
    assert "decoder.{0-3,5}.mlp.gate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "say `inspect DIR`"),
        (["a", "b"], "say `inspect DIR`"),
        (["{dir}", "--recipe", "fp8"], "belong to `inspect plan`"),
        (["plan", "{dir}", "--recipe", "other"], "no recipe 'other'"),
    ],
)
def test_inspect_explains_misuse(
    make: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make.checkpoint(tmp_path)
    assert main(["inspect", *(text.format(dir=tmp_path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{dir}", "{out}"], "is a checkpoint already"),
        (["nothing", "{out}"], "is neither a GGUF file nor a packaged model"),
        (["nothing.gguf", "{out}"], "no such file"),
        (["x.gguf", "{out}", "--calibration-tokens", "f"], "belongs to --to mistral-fp8"),
        (["{dir}", "{out}", "--to", "mistral-fp8", "--tokenizer", "t"], "--tokenizer belongs to"),
    ],
)
def test_import_explains_misuse(
    make: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make.checkpoint(tmp_path / "src")
    filled = [text.format(dir=tmp_path / "src", out=tmp_path / "out") for text in arguments]
    assert main(["import", *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dialect", ["none", "modelopt"])
def test_each_part_is_counted_by_what_belongs_to_it(
    make: Any, tmp_path: Path, dialect: str
) -> None:
    """Scales of the cache belong to the attention."""
    tensors = make.checkpoint(tmp_path, dialect)
    text = overview(Checkpoint.open(tmp_path))
    by_part: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = name.partition(".")[0]
        if part == "decoder":
            kinds = [kind for kind in ("attention", "mlp") if f".{kind}." in name]
            part = f"decoder {kinds[0] if kinds else 'norms'}"
        by_part[part] = by_part.get(part, 0) + tensor.nbytes
    assert {"embedding", "head", "decoder attention", "decoder mlp", "decoder norms"} <= set(
        by_part
    )
    lines = [" ".join(line.split()) for line in text.splitlines() if line.startswith("  ")]
    assert sorted(lines) == sorted(f"{part} {size:,} bytes" for part, size in by_part.items())


@pytest.mark.parametrize("has_vision", [False, True])
def test_a_tower_is_told_where_there_is_one(make: Any, tmp_path: Path, has_vision: bool) -> None:
    write_tiny_checkpoint(tmp_path / "m", layers=1, vision=has_vision)
    (line,) = [
        one for one in overview(Checkpoint.open(tmp_path / "m")).splitlines()
        if one.startswith("vision")
    ]  # fmt: skip
    assert ("none" in line) != has_vision
    assert ("patches of" in line) == has_vision
