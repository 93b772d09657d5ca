import hypothesis.strategies as st
from hypothesis import given

from halfbyte.chat.detokenize import StopStrings, TextStream
from halfbyte.chat.mistral_format import MistralFormat


@given(text=st.text(max_size=40))
def test_joined_pieces_equal_the_text(mistral: MistralFormat, text: str) -> None:
    stream = TextStream(mistral.vocabulary)
    pieces = [stream.feed(token_id) for token_id in mistral.vocabulary.encode_text(text)]
    assert "".join(pieces) + stream.flush() == text


def test_unfinished_character_becomes_replacement_only_at_the_end(mistral: MistralFormat) -> None:
    ids = mistral.vocabulary.encode_text("é漢")
    assert len(ids) > 2  # the vocabulary is so small that characters are cut
    stream = TextStream(mistral.vocabulary)
    assert "".join(stream.feed(token_id) for token_id in ids[:-1]) == "é"
    assert stream.flush() == "\ufffd"


@given(
    st.text(alphabet="abc", max_size=12),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3),
    st.data(),
)
def test_stop_is_the_same_however_the_text_is_split(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    whole = _run(text, stops, [len(text)])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert _run(text, stops, [*cuts, len(text)]) == whole
    shown, stop = whole
    if stop is None:
        assert shown == text
        assert not any(candidate in text for candidate in stops)
    else:
        assert text.startswith(shown + stop)
        # The first that is complete wins: nothing was complete before it.
        ended = text[: len(shown) + len(stop)]
        assert not any(candidate in ended[:-1] for candidate in stops)


def test_text_that_cannot_become_a_stop_is_not_held_back() -> None:
    stops = StopStrings(("<end>",))
    assert stops.feed("a <").text == "a "
    assert stops.feed("b").text == "<b"


def _run(text: str, stops: list[str], cuts: list[int]) -> tuple[str, str | None]:
    machine = StopStrings(tuple(stops))
    shown, start = "", 0
    for cut in cuts:
        result = machine.feed(text[start:cut])
        shown, start = shown + result.text, cut
        if result.stop is not None:
            return shown, result.stop
    return shown + machine.flush(), None
