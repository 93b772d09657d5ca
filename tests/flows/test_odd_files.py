"""Odd things in the place of a file, for every command that reads files: one sentence, at once."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.cli.main import main
from halfbyte.model.tiny import write_tiny_checkpoint

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a FIFO"),
    "folder": (Path.mkdir, "is a directory"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "pointer": (lambda path: path.write_text(LFS), "is a Git LFS pointer"),
}
INSPECT, VERIFY = ["inspect", "{source}"], ["verify", "{source}"]
PLAN = ["plan", "{source}", "--recipe", "fp8"]
QUANTIZE = ["quantize", "{source}", "{out}", "--recipe", "medium-3.5", "--method", "none"]
# file -> commands that read it
READERS: dict[str, list[list[str]]] = {
    "model.safetensors": [INSPECT, VERIFY, PLAN, QUANTIZE],
    "config.json": [INSPECT, VERIFY, PLAN, QUANTIZE],
    "model.safetensors.index.json": [INSPECT, PLAN, QUANTIZE],
    "hf_quant_config.json": [INSPECT, QUANTIZE],
    "tokenizer.json": [VERIFY, QUANTIZE],
    "tekken.json": [QUANTIZE, ["blend", "builtin", "--model", "{source}"]],
    "tokenizer_config.json": [QUANTIZE],
    "chat_template.jinja": [QUANTIZE],
    "halfbyte-manifest.json": [VERIFY],
    "recipe.yaml": [["inspect", "plan", "{source}", "--recipe", "{source}/recipe.yaml"]],
    "blend.yaml": [["blend", "{source}/blend.yaml"]],
    "model.gguf": [["import", "{source}/model.gguf", "{out}"]],
    "tokens.safetensors": [
        ["quantize", "{source}", "{out}", "--recipe", "medium-3.5",
         "--calibration-tokens", "{source}/tokens.safetensors"],
    ],
}  # fmt: skip


# Folders of these names are none of ours: they are not copied, and importing looks into them.
FOLDERS = ("tokenizer_config.json", "tekken.json", "chat_template.jinja", "model.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "source"
    write_tiny_checkpoint(directory, layers=6, dialect="mistral-fp8")
    return directory


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", READERS)
def test_an_odd_thing_is_named(
    whole: Path, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    (source / name).unlink(missing_ok=True)
    make, said = ODD[kind]
    make(source / name)
    for command in READERS[name]:
        words = [word.format(source=source, out=tmp_path / "out") for word in command]
        status = main([*words, "--log-level", "error"])
        printed = capsys.readouterr()
        if kind == "folder" and name in FOLDERS:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            continue
        assert status in (1, 2), f"{words}: {printed}"
        text = printed.out + printed.err
        assert said in text, f"{words}: {text}"
        assert "Traceback" not in text and len(text) < 2000
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# What is wrong with the text of a file, and what is said of it.
WRONG: dict[str, tuple[bytes, str]] = {
    "deep": (b"[" * 100_000, "it is nested too deeply"),
    "no UTF-8": (b'name: "\xff"', "(0xff) is not UTF-8 text"),
    "digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "a number in it has thousands of digits"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["config.json", "tekken.json", "tokenizer_config.json", "r.yaml"])
def test_limits_of_our_readers_are_said_of_the_file(
    whole: Path, tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither Python's words for them nor an export that nobody can load."""
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    content, said = WRONG[kind]
    if (name, kind) == ("r.yaml", "digits"):
        said = "is no int"
    (source / name).write_bytes(content)
    command = ["quantize", str(source), str(tmp_path / "out"), "--method", "none"]
    recipe = str(source / name) if name == "r.yaml" else "medium-3.5"
    assert main([*command, "--recipe", recipe, "--log-level", "error"]) == 2
    text = capsys.readouterr().err
    assert said in text and name in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_links_go_in_a_circle_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for command in ("inspect", "verify"):
        assert main([command, str(tmp_path / "a")]) == 2
        assert "in a circle" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["verify", str(tmp_path / "file")]) == 2
    assert "is a file, not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\nerror: all is well", "a\x1b[2J", "a" * 2000, "\u202eb"])
def test_names_of_tensors_cannot_write_lines(
    whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    save_file({name: torch.ones(1)}, source / "model.safetensors")
    assert main(["inspect", str(source)]) == 2
    text = capsys.readouterr().err
    assert "a tensor is called" in text and text.count("\n") == 1 and name not in text
    assert len(text) < 300


@pytest.mark.parametrize("place", ["/proc/out", "{tmp}/file/out", "/proc/below/out"])
@pytest.mark.parametrize("command", ["quantize", "import"])
def test_an_output_that_cannot_be_made_is_a_sentence(
    whole: Path, tmp_path: Path, place: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """/proc takes no folders, as a read-only file system takes none."""
    (tmp_path / "file").touch()
    out = place.format(tmp=tmp_path)
    source = whole
    words = ["quantize", str(source), out, "--recipe", "medium-3.5", "--method", "none"]
    if command == "import":
        source = tmp_path / "bf16"
        write_tiny_checkpoint(source, layers=1)
        tokens = {"batch0.input_ids": torch.ones(1, 4, dtype=torch.int64)}
        save_file(tokens, tmp_path / "tokens.safetensors")
        words = ["import", str(source), out, "--to", "mistral-fp8"]
        words += ["--calibration-tokens", str(tmp_path / "tokens.safetensors")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "cannot be made" in said or f"{out}: {tmp_path / 'file'} is not a folder" in said


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(whole), str(tmp_path / "out"), "--recipe", "medium-3.5"]
    (tmp_path / "file").touch()
    report = ["--method", "none", "--report", str(tmp_path / "file" / "report.html")]
    with pytest.raises(SystemExit, match="2"):
        main([*command, *report])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "report.html" in said and "is not a folder" in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_the_system_refuses_is_a_sentence(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody thought of it, the command line still names the file."""
    command = ["quantize", str(whole), str(tmp_path / "out"), "--recipe", "medium-3.5"]
    report = ["--method", "none", "--report", str(tmp_path / "report.html")]

    def refuse(record: object, path: Path) -> None:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    monkeypatch.setattr("halfbyte.quantize.page.write_report", refuse)
    assert main([*command, *report]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "report.html" in said and "Not a directory" in said


@pytest.mark.slow
def test_a_whole_process_ends_soon_and_small(whole: Path, tmp_path: Path) -> None:
    """Five seconds of work and 1 GiB, interpreter and libraries included."""
    shutil.copytree(whole, tmp_path / "source")
    (tmp_path / "source" / "config.json").unlink()
    os.mkfifo(tmp_path / "source" / "config.json")
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (20, 20)); "
    run = "from halfbyte.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", limited + run, "inspect", str(tmp_path / "source")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and "is a FIFO" in done.stderr
