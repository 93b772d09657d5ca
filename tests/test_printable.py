"""What a model, a server or a file says reaches the terminal as text and as nothing else."""

import io
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import log
from halfbyte.cli.main import main
from halfbyte.printable import own_stream, printable, printable_output

# Title, clipboard, cursor, colour, device answers, both escapes of C1, backspace, overwriting.
SEQUENCES = (
    "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x1b\\", "\x1b[2J\x1b[1;1H", "\x1b[31mred\x1b[0m",
    "\x1b[6n", "\x1bP+q544e\x1b\\", "\x9b2J", "\x9d0;title\x9c", "\x90q\x9c", "safe\rEVIL",
    "ab\b\bcd", "\x0b\x0c\x0e\x0f", "\x7f", "\0", "\x1bc", "\u202etxt.exe", "\u2066x\u2069",
    "\u2028", "\x85", "\ud800",
)  # fmt: skip
said = st.lists(
    st.one_of(st.sampled_from(SEQUENCES), st.text(max_size=5), st.characters(max_codepoint=0xFF)),
    max_size=12,
).map("".join)
anything = st.one_of(said, st.text(alphabet=st.characters()))


def obeyed(text: str) -> list[str]:
    """Characters that a terminal would act upon, by what Unicode says of them."""
    overriding = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "B")
    return [
        character
        for character in text
        if character not in "\n\t"
        and (
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(character) in overriding
        )
    ]


@given(anything)
def test_nothing_is_left_to_obey(text: str) -> None:
    shown = printable(text)
    assert not obeyed(shown)
    shown.encode("utf-8")
    assert printable(shown) == shown


@given(st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp"))))
def test_plain_text_stays_as_it_is(text: str) -> None:
    for kept in (text, f"{text}\n\t{text}"):
        assert printable(kept) == kept


@pytest.mark.parametrize(
    "text", ["مرحبا\u200f!", "👩\u200d👩\u200d👧", "می\u200cخواهم", "é\u0301", "ꙮ 中文"]
)
def test_scripts_and_emoji_keep_their_marks_and_joiners(text: str) -> None:
    assert printable(text) == text


@given(said, st.integers(0, 200))
def test_a_stream_may_be_cut_anywhere(text: str, at: int) -> None:
    assert printable(text[:at]) + printable(text[at:]) == printable(text)


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_every_command_prints_printable_text(
    sequence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors on stderr, tables on stdout: both pass the one place."""
    name = sequence.replace("\0", "").replace("\ud800", "")
    assert main(["inspect", str(tmp_path / f"no{name}such")]) == 2
    assert main([f"nosuch{name}"]) == 2
    out, err = capsys.readouterr()
    assert "error" in err and not obeyed(out + err)
    with printable_output():
        print("table", sequence)
        sys.stdout.writelines([sequence])
        logging.getLogger("x").handlers.clear()
    out, _ = capsys.readouterr()
    assert "table" in out and not obeyed(out)


def test_our_own_control_sequences_reach_the_stream() -> None:
    stream = io.StringIO()
    before = sys.stdout
    try:
        sys.stdout = stream
        with printable_output():
            own_stream(sys.stdout).write("\x1b[2m")
            assert not sys.stdout.isatty() and own_stream(own_stream(sys.stdout)) is stream
            with printable_output():  # a command within a command filters once
                print("\x1b")
    finally:
        sys.stdout = before
    assert stream.getvalue() == "\x1b[2m\\x1b\n"


def test_log_lines_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    kept = log.logger.handlers[:], log.logger.level, log.logger.propagate
    try:
        log.configure()
        log.logger.warning("the server says %s", "\x1b]0;title\x07")
    finally:
        log.logger.handlers[:], log.logger.level, log.logger.propagate = kept
    assert "the server says \\x1b]0;title\\x07" in capsys.readouterr().err
