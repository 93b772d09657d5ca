"""A target is a folder or an address; a folder's name with a mistake in it is neither."""

from pathlib import Path

import pytest

from halfbyte.cli.main import main
from halfbyte.cli.targets import is_folder
from halfbyte.errors import UsageError

ADDRESSES = [
    "http://nosuch", "https://a.example/openai/v1", "host:8000", "host:8000/v1", "localhost",
    "localhost/v1", "127.0.0.1:8000", "[::1]:8000",
]  # fmt: skip


@pytest.mark.parametrize("target", ADDRESSES)
def test_addresses_are_addresses(target: str) -> None:
    assert not is_folder(target)


@pytest.mark.parametrize("target", ["nosuch", "mixd/", "../mixed.v2", "a/b", "model.gguf", ""])
def test_mistyped_folders_are_no_addresses(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if target:
        with pytest.raises(UsageError, match="neither a folder nor the address of a server"):
            is_folder(target)
    (tmp_path / "mixed").mkdir()
    assert is_folder("mixed") and is_folder("mixed/")


@pytest.mark.parametrize(
    "command",
    [["evaluate", "nosuch", "--suite", "quick"], ["bench", "load", "nosuch"], ["chat", "nosuch"]],
    ids=lambda command: command[0],
)
def test_commands_say_so(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert "error: nosuch is neither a " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
