"""Lines of progress: rewritten on a terminal, now and then in a log, with the time left."""

import io

import pytest

from halfbyte.progress import ProgressLine, TimeLeft, clock, say_next


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [0.0]
    monkeypatch.setattr("halfbyte.progress.time.monotonic", lambda: time[0])
    return time


def test_a_log_gets_a_line_every_ten_seconds_and_a_terminal_rewrites_its(now: list[float]) -> None:
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        now[0] = 0.0
        left = TimeLeft("layers", stream)
        for done in range(1, 41):
            now[0] = float(done)
            left(done, 40)
    lines = log.getvalue().splitlines()
    # The first layer began the clock; at layer 10 nine more took nine seconds.
    assert lines[0] == "10 of 40 layers, 25 %, about 0:00:30 left"
    assert len(lines) == 3
    shown = terminal.getvalue()
    assert shown.count("\n") == 0
    assert shown.count("\r") > 35
    assert shown.endswith("\r\x1b[2K")


def test_what_was_done_before_does_not_count_as_speed(now: list[float]) -> None:
    log = io.StringIO()
    left = TimeLeft("layers", log)
    left(30, 40)
    now[0] = 20.0
    left(35, 40)
    assert log.getvalue() == "35 of 40 layers, 87 %, about 0:00:20 left\n"


def test_a_log_does_not_get_the_same_line_twice() -> None:
    log = io.StringIO()
    line = ProgressLine(log)
    for text in ("a", "a", "b"):
        line.show(text)
    assert log.getvalue() == "a\nb\n"


def test_what_others_wrote_commands_no_terminal() -> None:
    terminal = Terminal()
    ProgressLine(terminal).show("x\x1b[2J")
    assert "\x1b[2J" not in terminal.getvalue()


@pytest.mark.parametrize("seconds, said", [(0.4, "0:00:00"), (65, "0:01:05"), (7322.5, "2:02:03")])
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_what_comes_next_stands_beside_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    say_next("halfbyte a", "halfbyte b")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "next: halfbyte a\n      halfbyte b\n")
