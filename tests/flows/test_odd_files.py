"""Odd things in the place of a file, for every command that reads files: one sentence, at once."""

import errno
import json
import os
import re
import shutil
import socket
import struct
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


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def to_nothing(path: Path) -> None:
    path.symlink_to("nothing-there")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))  # addresses have 107 characters


BASELINE = ["compare", "{source}", "--baseline", "{source}/tokens.safetensors"]
CHECKPOINT = ["inspect", "{source}/ckpt"]
LINKS: list[tuple[str, Callable[[Path], object], list[str], str]] = [
    ("config.json", circle, INSPECT, "leads back to itself"),
    ("model.safetensors", circle, QUANTIZE, "leads back to itself"),
    ("hf_quant_config.json", circle, INSPECT, "leads back to itself"),
    ("tokenizer_config.json", circle, QUANTIZE, "leads back to itself"),
    ("halfbyte-manifest.json", to_nothing, VERIFY, "is a link to 'nothing-there'"),
    ("model.safetensors", to_nothing, INSPECT, "is a link to 'nothing-there'"),
    ("model.safetensors", listening, VERIFY, "is a socket"),
    ("recipe.yaml", circle, READERS["recipe.yaml"][0], "leads back to itself"),
    ("model.gguf", circle, READERS["model.gguf"][0], "leads back to itself"),
    ("model.gguf", Path.mkdir, READERS["model.gguf"][0], "is a directory, not a GGUF file"),
    ("tokens.safetensors", os.mkfifo, BASELINE, "is a FIFO"),
    ("ckpt", circle, CHECKPOINT, "leads back to itself"),
    ("ckpt", circle, ["verify", "{source}/ckpt"], "leads back to itself"),
    ("ckpt", circle, ["serve", "{source}/ckpt"], "leads back to itself"),
    ("ckpt", circle, ["evaluate", "{source}/ckpt"], "leads back to itself"),
    ("ckpt", Path.touch, CHECKPOINT, "is a file, not a directory"),
    ("ckpt", os.mkfifo, CHECKPOINT, "is a FIFO, not a directory"),
    ("ckpt", circle, ["quantize", "{source}", "{source}/ckpt"], "a link that leads nowhere"),
    ("f.json", os.mkfifo, ["card", "{out}", "--checkpoint", "{source}", "--records",
                           "{source}/f.json"], "is a FIFO"),
    ("log", os.mkfifo, ["serve", "{source}", "--access-log", "{source}/log"], "is a FIFO"),
]  # fmt: skip


@pytest.mark.parametrize("name, make, command, said", LINKS)
def test_what_a_path_leads_to_is_named(
    whole: Path,
    tmp_path: Path,
    name: str,
    make: Callable[[Path], object],
    command: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    monkeypatch.chdir(source)
    (source / name).unlink(missing_ok=True)
    make(source / name)
    assert said in sentence(command, source, capsys)


# Words of Python, of its libraries and of Rust's, which say nothing of a file.
FOREIGN = re.compile(
    r"NoneType|recursion|codec|\[Errno|invalid literal|object (is|has)|unhashable|Exceeds|argument|"
    r"Expecting|Extra data|out of range|convert|'(str|int|list|dict)'|Traceback|panicked"
)


def sentence(command: list[str], source: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that fails; one sentence, not long."""
    words = [word.format(source=source, out=source.parent / "out") for word in command]
    assert main([*words, "--log-level", "error"]) in (1, 2)
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if "error: " in line]
    assert len(lines) == 1 and len(lines[0]) < 1100, lines
    return lines[0]


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


CONFIG = ["serve", "{source}", "--config", "{source}/recipe.yaml"]
MARGINS = ["compare-evals", "{source}", "{source}", "--margins", "{source}/recipe.yaml"]
RECIPE, TOKENS = READERS["recipe.yaml"][0], READERS["tokens.safetensors"][0]
DEEP = b"[" * 100_000
CONTENTS: list[tuple[str, bytes, list[str], str]] = [
    ("config.json", DEEP, INSPECT, "nested too deeply"),
    ("config.json", b'{"a": ' + DEEP + b"]" * 100_000 + b"}", QUANTIZE, "nested too deeply"),
    ("config.json", b'{"a": ' + b"9" * 5000 + b"}", INSPECT, "thousands of digits"),
    ("config.json", b'{"a": "\xff"}', INSPECT, "byte 8 (0xff) is not UTF-8"),
    ("config.json", b"null", INSPECT, "expected, not None"),
    ("config.json", b"{} {}", INSPECT, "column 4: something follows the end"),
    ("config.json", b'{"%s": 1, "%s": 2}' % (b"k" * 9999, b"k" * 9999), INSPECT, "occurs twice"),
    ("config.json", b'{"a": [' + b"{}," * 1_100_000 + b"{}]}", INSPECT, "1,000,000 lists"),
    ("model.safetensors", header(DEEP), INSPECT, "nested too deeply"),
    ("model.safetensors", header(b'{"%s": 1}' % (b"n" * 10**6)), INSPECT, "a tensor is called"),
    ("model.safetensors", header(b""), VERIFY, "a value is missing"),
    ("tokens.safetensors", header(b"[]"), TOKENS, "JSON object was expected"),
    ("tokens.safetensors", header(DEEP), BASELINE, "nested too deeply"),
    ("model.safetensors.index.json", DEEP, PLAN, "nested too deeply"),
    ("halfbyte-manifest.json", DEEP, VERIFY, "nested too deeply"),
    ("recipe.yaml", b"[" * 1500, RECIPE, "nested too deeply"),
    ("recipe.yaml", b"- " * 5000, CONFIG, "nested too deeply"),
    ("recipe.yaml", b"a: !!int ''", RECIPE, "line 1, column 4: '' is no int"),
    ("recipe.yaml", b"a: !!bool maybe", CONFIG, "'maybe' is no bool"),
    ("recipe.yaml", b"a: !!timestamp soon", CONFIG, "'soon' is no timestamp"),
    ("recipe.yaml", b"a: !!map text", RECIPE, "'text' is no map"),
    ("recipe.yaml", "a: !!binary '\u00e9'".encode(), RECIPE, "is no binary"),
    ("recipe.yaml", b'a: "\\U7fffffff"', RECIPE, "names no character"),
    ("recipe.yaml", b"a: 1" + b"0" * 9000, RECIPE, "is no int"),
    ("recipe.yaml", b"a: 0x" + b"f" * 9000, MARGINS, "expected NAME=POINTS"),
    ("recipe.yaml", b"a: \xff", RECIPE, "byte 4 (0xff) is not UTF-8"),
    ("recipe.yaml", b"drain-seconds: .inf", CONFIG, "a number from 0 to 86,400"),
    ("recipe.yaml", b"a: 1", ["blend", "{source}/recipe.yaml"], "name is missing"),
]


@pytest.mark.parametrize("name, content, command, said", CONTENTS)
def test_odd_content_is_said_in_plain_words(
    whole: Path,
    tmp_path: Path,
    name: str,
    content: bytes,
    command: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    (source / name).write_bytes(content)
    text = sentence(command, source, capsys)
    assert said in text
    assert not FOREIGN.search(text.replace(str(tmp_path), "")), text


@pytest.mark.parametrize("value", [2**4000, "x" * 10_000, float("nan"), -2, True, [1] * 100_000])
def test_a_recommendation_that_is_none_is_shown_short(
    whole: Path, tmp_path: Path, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    (source / "generation_config.json").write_text(json.dumps({"top_k": value}))
    text = sentence(["serve", "{source}"], source, capsys)
    assert "top_k is " in text and len(text) < 500


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
