"""What a tekken.json settles: efforts, whether a schema is shown, where pictures begin."""

from dataclasses import replace

import pytest
from PIL import Image

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.errors import RequestError

HELLO = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"zebra": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("known", "taken", "refused"),
    [
        # "none" asks a model without thoughts for what it does anyway.
        ((), (None, "none"), ("high", "low", "")),
        (("none", "high"), (None, "none", "high"), ("low",)),
        (("high",), (None, "high"), ("none", "medium")),
    ],
)
def test_efforts_are_those_of_the_file(
    mistral: MistralFormat,
    known: tuple[str, ...],
    taken: tuple[str | None, ...],
    refused: tuple[str, ...],
) -> None:
    chat = replace(mistral, reasoning_efforts=known)
    for effort in taken:
        assert chat.encode(HELLO, reasoning_effort=effort).token_ids
    for effort in refused:
        with pytest.raises(RequestError, match="is not one this model knows") as caught:
            chat.encode(HELLO, reasoning_effort=effort)
        assert ", ".join(known) in str(caught.value)


def test_a_schema_is_shown_where_the_model_has_a_place_for_it(mistral: MistralFormat) -> None:
    shows, hides = (replace(mistral, shows_json_schema=value) for value in (True, False))
    for chat, schema in ((shows, None), (hides, None), (hides, SCHEMA)):
        assert chat._response_format(schema).type == "text"
    shown = shows._response_format(SCHEMA)
    assert shown.type == "json_schema" and shown.json_schema is not None
    assert shown.json_schema.model_dump(by_alias=True)["schema"] == SCHEMA
    assert hides.encode(HELLO, json_schema=SCHEMA) == hides.encode(HELLO)


def test_pictures_lie_where_their_tokens_are(mistral: MistralFormat) -> None:
    assert mistral.encode(HELLO).images == ()
    layout = mistral.image_layout
    assert layout is not None
    pictures = [{"type": "image", "image": Image.new("RGB", (56, size))} for size in (28, 84)]
    content = [pictures[0], {"type": "text", "text": "and"}, pictures[1]]
    prompt = mistral.encode([{"role": "user", "content": content}])
    first, second = prompt.images
    assert first.offset + first.num_tokens < second.offset
    for image in (first, second):
        run = prompt.token_ids[image.offset : image.offset + image.num_tokens]
        assert run[0] == layout.image_token_id
        assert layout.image_token_id not in (
            prompt.token_ids[image.offset - 1],
            *prompt.token_ids[image.offset + image.num_tokens :][:1],
        )
