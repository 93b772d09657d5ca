"""Warnings of a request, as its header and the log have them."""

from halfbyte.server.call import _MAX_WARNING_CHARS, Call


def test_each_warning_is_told_once_in_header_and_log() -> None:
    call = Call()
    call.warn([])
    assert call.headers == call.facts == {}
    call.warn(["one", "two"])
    call.warn(["two", "three"])
    call.warn(["one"])
    assert call.headers == {"x-halfbyte-warning": "one; two; three"}
    assert call.facts == {"warnings": "one; two; three"}


def test_a_header_holds_whatever_a_field_is_called() -> None:
    call = Call()
    call.warn([" fi\r\neld ä", "x" * 10_000])
    told = call.headers["x-halfbyte-warning"]
    assert told.startswith("fi  eld \\xe4; xxx") and len(told) <= _MAX_WARNING_CHARS
    assert told.isascii() and told.isprintable()
