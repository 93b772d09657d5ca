"""The journal: torn lines do not count, changed inputs are named."""

from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.quantize.journal import Journal, differences

MADE_OF = {"source": {"model.safetensors": {"bytes": 10}}, "profile": "ieee"}


def test_entries_come_back_and_more_can_follow(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert not journal.exists()
    journal.start(MADE_OF)
    journal.append({"step": 0})
    journal.close()
    for count in (1, 2):
        journal = Journal(tmp_path / "journal")
        assert journal.resume(MADE_OF) == [{"step": n} for n in range(count)]
        journal.append({"step": count})
        journal.close()


def test_a_torn_line_is_an_unfinished_step(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.start(MADE_OF)
    journal.append({"step": 0})
    journal.close()
    whole = path.read_bytes()
    for cut in range(1, len(b'{"step": 0}\n') + 1):
        path.write_bytes(whole[:-cut])
        journal = Journal(path)
        assert journal.exists()
        assert journal.resume(MADE_OF) == []
        journal.append({"step": 0})
        journal.close()
        assert path.read_bytes() == whole
    path.write_bytes(whole[:5])
    assert not Journal(path).exists()


@pytest.mark.parametrize(
    "now, said",
    [
        ({**MADE_OF, "profile": "cuda"}, 'profile was "ieee", is "cuda"'),
        (
            {"source": {"model.safetensors": {"bytes": 11}}, "profile": "ieee"},
            "source.model.safetensors.bytes was 10, is 11",
        ),
        ({"source": {}, "profile": "ieee"}, "source.model.safetensors is gone"),
        ({**MADE_OF, "more": 1}, "more is new"),
    ],
)
def test_another_job_is_refused_with_the_difference(
    tmp_path: Path, now: dict[str, object], said: str
) -> None:
    journal = Journal(tmp_path / "journal")
    journal.start(MADE_OF)
    journal.close()
    with pytest.raises(UsageError) as caught:
        Journal(tmp_path / "journal").resume(now)
    assert said in str(caught.value)
    assert "--restart" in str(caught.value)


def test_equal_values_differ_nowhere() -> None:
    assert list(differences(MADE_OF, {"profile": "ieee", "source": MADE_OF["source"]})) == []


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"[]", b"3", b"{}", b'{"entry": {"step": 0}}', b'{"sha256": "00"}',
        b'{"entry": {"step": 1}, "sha256": "00"}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_line_that_no_run_wrote_ends_in_a_sentence(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.start(MADE_OF)
    journal.append({"step": 0})
    journal.close()
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(UsageError, match="line 2 is not as an unfinished run wrote it"):
        Journal(path).resume(MADE_OF)


def test_values_of_another_kind_differ() -> None:
    for before, now in (({"a": 1}, [1]), ([1], {"a": 1}), ({"a": {"b": 1}}, {"a": 3}), (None, {})):
        said = list(differences(before, now, "x"))
        assert len(said) == 1 and " was " in said[0], (before, now)
    assert list(differences({"a": [1]}, {"a": [1]})) == []
