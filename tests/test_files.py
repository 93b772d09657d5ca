"""Reading what a path names: other things than files at once, large ones not at all."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from halfbyte.errors import CheckpointError, UsageError, cut_middle, in_words, shown
from halfbyte.files import (
    OddFileError,
    format_bytes,
    format_gib,
    is_there,
    make_directory,
    open_regular,
    parse_json_text,
    read_bounded,
    require_directory,
)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "is a FIFO, not a regular file"),
    "folder": (Path.mkdir, "is a directory, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "circle": (lambda path: path.symlink_to(path.name), "is a link that leads back to itself"),
    "link to nothing": (lambda path: path.symlink_to("y"), "is a link to 'y', where nothing is"),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a short name, as sockets need."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("read", [open_regular, read_bounded])
def test_other_things_than_files_are_refused_at_once(
    folder: Path, what: str, read: Callable[[Path], object]
) -> None:
    make, said = ODD[what]
    make(folder / "x")
    with pytest.raises(OddFileError, match=said) as caught:
        read(folder / "x")
    assert caught.value.filename == str(folder / "x")
    assert caught.value.strerror is not None and said in caught.value.strerror


def test_a_fifo_that_takes_the_place_of_a_file_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and opening it may have become another thing."""
    os.mkfifo(folder / "x")
    (folder / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "stat", lambda _, real=os.stat: real(folder / "file"))
    with pytest.raises(OddFileError, match="is a FIFO"):
        open_regular(folder / "x")


def test_files_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with open_regular(path) as file:
        assert file.read() == b"12345"
    (tmp_path / "link").symlink_to(path)
    assert read_bounded(tmp_path / "link") == b"12345"
    with pytest.raises(OddFileError, match="more than the 4 bytes"):
        read_bounded(path, 4)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "absent")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(OddFileError, match=r"Git LFS pointer.*git lfs pull"):
        read_bounded(path)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"below: cannot be made \(Not a directory\)"):
        make_directory(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match=r"x: cannot be made"):
        make_directory(Path("/proc/x"))


@pytest.mark.parametrize("form", [format_bytes, format_gib])
def test_no_amount_is_rounded_to_nothing(form: Callable[[int], str]) -> None:
    for exponent in range(60):
        for amount in (1 << exponent, (1 << exponent) + 1, 10 ** (exponent // 4)):
            number = re.match(r"[0-9.]+", form(amount))
            assert number is not None and float(number[0]) > 0.9
    assert form(0) == "0 bytes"


def test_values_are_shown_short() -> None:
    nested: list[object] = []
    for _ in range(50_000):
        nested = [nested]
    values = ["x" * 10**6, [1] * 10**6, {"a": ["x" * 1000] * 1000}, nested, 10**20_000, -(10**5000)]
    for value in values:
        assert len(shown(value)) <= 100
    assert (shown(4096), shown("a"), shown(None), shown(0.5)) == ("4096", "'a'", "None", "0.5")
    assert shown(True) == "True" and shown({"a": 1}) == "{'a': 1}"


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    """Else a file that may be left out would count as left out."""
    (tmp_path / "x").symlink_to("x")
    assert is_there(tmp_path / "x") and not is_there(tmp_path / "y")


@pytest.mark.parametrize("what", [*ODD, "file", "nothing"])
def test_what_is_no_directory_is_named(folder: Path, what: str) -> None:
    others: dict[str, tuple[Callable[[Path], object], str]] = {
        "file": (Path.touch, "is a file"),
        "nothing": (lambda path: None, "no such"),
    }
    make, said = {**ODD, **others}[what]
    make(folder / "x")
    if what == "folder":
        require_directory(folder / "x")
        return
    with pytest.raises(CheckpointError, match=said.removesuffix(", not a regular file")):
        require_directory(folder / "x")


@pytest.mark.parametrize(
    "text, said",
    [
        (b"", "line 1, column 1: a value is missing"),
        (b"{1}", "line 1, column 2: a name in double quotes is missing"),
        (b"[1 2]", "line 1, column 4: a comma is missing"),
        (b'{"a" 1}', "line 1, column 6: a colon is missing"),
        (b"[1] 2", "line 1, column 5: something follows the end"),
        (b'["a', "line 1, column 2: a text does not end"),
        (b'["\xc3\x28"]', "byte 3 (0xc3) is not UTF-8 text"),
        (b"9" * 5000, "a number in it has thousands of digits"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"[" + b"{}," * 1_000_001 + b"1]", "it has more than 1,000,000 lists and objects"),
    ],
)
def test_json_that_is_none_is_said_in_our_words(text: bytes, said: str) -> None:
    with pytest.raises((ValueError, RecursionError)) as caught:
        parse_json_text(text)
    assert in_words(caught.value) == said


def test_what_a_library_raises_is_said_in_our_words() -> None:
    assert in_words(OSError(111, "Connection refused")) == "Connection refused"
    assert in_words(ValueError("[Errno 111] Connection refused")) == "Connection refused"
    assert in_words(KeyError("x")) == in_words(TypeError("'NoneType' object is not iterable"))
    assert in_words(ValueError("x" * 999 + "\nmore")) == "x" * 199 + "…"
    assert in_words(MemoryError()) == "it takes more memory than there is"
    with pytest.raises(UnicodeEncodeError) as caught:
        json.loads('"\\ud800"').encode()
    assert in_words(caught.value).startswith("it holds half a surrogate pair")


def test_a_long_message_is_cut_in_its_middle() -> None:
    assert str(UsageError("x" * 1000)) == "x" * 1000
    said = str(UsageError("begin " + "x" * 10**6 + " end"))
    assert said.startswith("begin x") and said.endswith("x end") and len(said) < 1000
    assert cut_middle(said) == said


def test_the_lines_of_a_list_or_a_log_are_all_said() -> None:
    lines = [f"{n}: {'why ' * 20}" for n in range(40)]
    assert str(UsageError("\n".join(lines))) == "\n".join(lines)
    said = str(UsageError("\n".join([*lines, "x" * 10**6]))).split("\n")
    assert said[:-1] == lines and len(said[-1]) < 1000
