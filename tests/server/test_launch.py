"""Starting a server: the keys of a file."""

from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.server.launch import read_keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("sk-a\nsk-b # Bob\n", ("sk-a", "sk-b")),
        ("# all of them\n\n  # indented\nsk-a\t#tab\n", ("sk-a",)),
        ("sk-a#b\n", ("sk-a#b",)),
        ("  sk-a  \r\nsk-a\r\n", ("sk-a",)),
    ],
)
def test_a_comment_is_no_part_of_a_key(tmp_path: Path, text: str, keys: tuple[str, ...]) -> None:
    (tmp_path / "keys").write_text(text)
    assert read_keys([], tmp_path / "keys") == keys


@pytest.mark.parametrize("text", ["", "# nothing\n", "   # nothing\n\n"])
def test_a_file_of_comments_holds_no_key(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UsageError, match="holds no key"):
        read_keys([], tmp_path / "keys")
