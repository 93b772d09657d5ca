"""Files of JSON lines: whatever a death leaves of the last line, the lines before it stand."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from halfbyte.files import OddFileError
from halfbyte.json_lines import JsonLines, parse_line, whole_lines

_rows = st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3)


def read(path: Path) -> list[Any]:
    return [parse_line(line) for line in whole_lines(path)]


@given(st.lists(_rows, max_size=4), _rows, st.data())
def test_a_torn_line_costs_itself_alone(
    kept: list[dict[str, Any]], last: dict[str, Any], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "below" / "rows"
        assert read(path) == []
        file = JsonLines(path)
        for row in kept:
            file.append(row)
        size = path.stat().st_size
        file.append(last)
        file.close()
        assert read(path) == [*kept, last]
        end = data.draw(st.integers(size, path.stat().st_size - 1))
        os.truncate(path, end)
        assert read(path) == kept
        file = JsonLines(path)
        file.append(last)
        file.sync()
        assert read(path) == [*kept, last]
        file.close()


def test_half_characters_of_a_model_come_back(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "rows")
    file.append({"answer": "a\ud83d"})
    file.close()
    assert read(tmp_path / "rows") == [{"answer": "a\ud83d"}]


def test_something_else_than_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(OddFileError, match="is a FIFO"):
        read(tmp_path / "rows")
