"""Long pictures are taken out of a request, and are the same pictures or the same refusals."""

import base64
import io
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from halfbyte.chat.images import ImageLimits, data_url_bytes
from halfbyte.errors import RequestError
from halfbyte.pictures import PictureError, open_picture
from halfbyte.server.api import held, wire
from halfbyte.server.api.held import HELD, HELD_FROM, Held, held_picture, take_out
from halfbyte.server.api.messages_wire import MessagesRequest
from halfbyte.server.api.responses_wire import ResponsesRequest

LIMITS = ImageLimits(200_000, 1_000_000)
LONG = bytes(range(256)) * 100
assert len(LONG) > HELD_FROM


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def chat(*parts: Any) -> wire.ChatRequest:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}
    return wire.ChatRequest.model_validate({"model": "m", "messages": [message]})


def part(url: str, *, as_object: bool) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} if as_object else url}


def urls(request: wire.ChatRequest) -> list[str]:
    content = request.messages[0].content
    assert isinstance(content, list)
    return [one.url for one in content if isinstance(one, wire.ImagePart)]


@pytest.mark.parametrize("as_object", [False, True])
def test_long_pictures_of_a_chat_are_held_in_order(as_object: bool) -> None:
    others = [bytes([number]) * 20_000 for number in (1, 2)]
    short = url_of(b"abc")
    asked = chat(
        part(url_of(LONG), as_object=as_object),
        part(short, as_object=as_object),
        *[part(" \n" + url_of(one), as_object=as_object) for one in others],
    )
    HELD.set(take_out(asked, LIMITS))
    first, second, *rest = urls(asked)
    assert second == short and held_picture(second) is None
    found = [held_picture(url) for url in (first, *rest)]
    assert [bytes(one.file("p")) for one in found if one] == [LONG, *others]
    assert all(len(url) < 40 for url in (first, *rest))


def test_long_pictures_of_other_dialects_are_held() -> None:
    data = base64.b64encode(LONG).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    block = {"type": "image", "source": source}
    messages = [{"role": "user", "content": [block]}]
    asked = MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": messages})
    HELD.set(take_out(asked, LIMITS))
    content: Any = asked.messages[0].content
    found = held_picture(content[0].url)
    assert found is not None and bytes(found.file("p")) == LONG
    image = {"type": "input_image", "image_url": url_of(LONG)}
    given_ = [{"role": "user", "content": [image]}]
    responses = ResponsesRequest.model_validate({"model": "m", "input": given_})
    pictures = take_out(responses, LIMITS)
    assert [bytes(one.data) for one in pictures] == [LONG]


@pytest.mark.parametrize(
    "url",
    [
        "data:;base64," + "A" * (HELD_FROM + 1),  # one letter too many
        "data:;base64," + "*" * HELD_FROM,
        "data:" + "A" * HELD_FROM,
        url_of(b"a" * 210_000),
    ],
)
def test_a_refusal_is_that_of_a_picture_that_was_not_held(url: str) -> None:
    asked = chat(part(url, as_object=False))
    (one,) = take_out(asked, LIMITS)
    with pytest.raises(RequestError) as wanted:
        data_url_bytes(url, "messages[0].content[1].image_url", LIMITS)
    with pytest.raises(RequestError) as found:
        one.file("messages[0].content[1].image_url")
    assert str(found.value) == str(wanted.value)
    assert (found.value.code, found.value.param) == (wanted.value.code, wanted.value.param)


@pytest.mark.parametrize("text", ["held picture 0", "held picture 1", "held picture x", "AAAA"])
def test_a_mark_that_a_client_writes_is_no_picture_of_others(text: str) -> None:
    HELD.set([])
    assert held_picture(f"data:,{text}") is None
    asked = chat(part(f"data:,{text}", as_object=False))
    assert take_out(asked, LIMITS) == []


def test_what_is_held_crosses_beside_the_request() -> None:
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps([Held(LONG), Held(b"", ("m", "c"))], 5, buffer_callback=beside.append)
    assert len(data) < 500 and len(beside) == 2
    first, second = pickle.loads(data, buffers=[bytearray(one.raw()) for one in beside])
    assert bytes(first.file("p")) == LONG and second.problem == ("m", "c")
    # And within it where nobody takes buffers.
    assert bytes(pickle.loads(pickle.dumps(Held(LONG))).file("p")) == LONG
    assert held.HELD_FROM == HELD_FROM


@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    cut=st.integers(0, 60),
)
def test_a_view_is_read_as_the_bytes_are(form: str, width: int, height: int, cut: int) -> None:
    stored = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(stored, form)
    data = stored.getvalue()[: len(stored.getvalue()) - cut]

    def pixels(given_: bytes | memoryview) -> bytes | str:
        try:
            return open_picture(given_, max_pixels=10_000).decode().tobytes()
        except PictureError as error:
            return error.code

    assert pixels(memoryview(bytearray(data))) == pixels(data)
