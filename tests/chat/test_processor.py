"""Images with a tokenizer.json: layout from the processor's files, both kinds of template."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from halfbyte.chat.images import ImageLayout, encode_image
from halfbyte.chat.processor import processor_layout
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.chat.tokens import load_chat
from halfbyte.errors import CheckpointError, RequestError
from halfbyte.pictures import normalized

CHATML = Path(__file__).parent.parent / "data" / "chat" / "chatml"
NAMES = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
PROCESSOR: dict[str, Any] = {
    "processor_class": "PixtralProcessor",
    "patch_size": 14,
    "spatial_merge_size": 2,
    "image_processor": {"size": {"longest_edge": 280}},
}
# What multimodal templates of the hub do: parts one after the other.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}[IMG]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
BLIND = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"


def write(directory: Path, template: str | None = None, **processor: Any) -> Path:
    """The chatml tokenizer with image tokens and a processor."""
    shutil.copytree(CHATML, directory)
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text())
    first = max(description["model"]["vocab"].values()) + 1
    first = max(first, *(token["id"] + 1 for token in description["added_tokens"]))
    like = description["added_tokens"][0]
    description["added_tokens"] += [
        {**like, "id": first + i, "content": name, "special": True} for i, name in enumerate(NAMES)
    ]
    path.write_text(json.dumps(description))
    (directory / "processor_config.json").write_text(json.dumps(PROCESSOR | processor))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def load(directory: Path) -> TemplateFormat:
    chat = load_chat(directory)
    assert isinstance(chat, TemplateFormat) and chat.image_layout is not None
    return chat


def user(*parts: str | Image.Image) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": part}
                for part in parts
            ],
        }
    ]


@pytest.mark.parametrize("template", [None, PARTS], ids=["strings", "parts"])
def test_images_stand_where_the_parts_stood(tmp_path: Path, template: str | None) -> None:
    chat = load(write(tmp_path / "m", template))
    assert chat.takes_parts is (template is not None)
    first, second = Image.new("RGB", (100, 60), "red"), Image.new("RGB", (28, 28))
    prompt = chat.encode(user("See [IMG] this", first, "and", second, "?"))
    assert [(i.pixels.shape, i.num_tokens) for i in prompt.images] == [
        ((3, 84, 112), 15),
        ((3, 28, 28), 2),
    ]
    assert chat.image_layout is not None
    line = "[IMG]" * 4
    shown = chat.vocabulary.decode(prompt.token_ids, keep_control=True)
    between = "" if template else "\n"
    rows = f"{line}[IMG_BREAK]{line}[IMG_BREAK]{line}[IMG_END]"
    assert between.join(("See [IMG] this", rows, "and", "[IMG][IMG_END]", "?")) in shown
    for image, picture in zip(prompt.images, (first, second), strict=True):
        run = list(prompt.token_ids[image.offset : image.offset + image.num_tokens])
        expected = encode_image(chat.image_layout, picture)
        assert run == expected.tokens
        assert np.array_equal(image.pixels, expected.image)
    # What was typed stays text: only the images' own tokens are control tokens.
    assert prompt.token_ids.count(chat.image_layout.image_token_id) == 12 + 1


def test_text_is_encoded_as_without_a_processor(tmp_path: Path) -> None:
    chat, plain = load(write(tmp_path / "m")), load_chat(CHATML)
    messages = user("One [IMG_END]", "two")
    assert chat.encode(messages).token_ids == plain.encode(messages).token_ids


def test_a_template_that_drops_an_image_is_not_obeyed_silently(tmp_path: Path) -> None:
    template = PARTS.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
    chat = load(write(tmp_path / "m", template))
    image = Image.new("RGB", (28, 28))
    messages = [*user(image), {"role": "assistant", "content": "A."}, *user(image)]
    with pytest.raises(RequestError, match="writes 1 of 2 images"):
        chat.encode(messages)


def test_a_template_blind_to_parts_gets_a_string(tmp_path: Path) -> None:
    chat = load(write(tmp_path / "m", BLIND))
    assert not chat.takes_parts
    assert len(chat.encode(user("a", Image.new("RGB", (28, 28)))).images) == 1


# --- the same as the processor's own code


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_grids_are_those_of_the_pixtral_processor(width: int, height: int) -> None:
    layout = ImageLayout(28, 448, 7, 8, 9, whole_side=math.floor)
    picture = np.broadcast_to(np.uint8(0), (height, width, 3))
    theirs = get_resize_output_image_size(picture, 448, 28, ChannelDimension.LAST)
    columns, rows = layout.grid(width, height)
    # A side that vanishes is an error there; here it is one patch.
    assert (rows * 28, columns * 28) == (max(theirs[0], 28), max(theirs[1], 28))


@pytest.mark.parametrize("size", [(100, 60), (641, 479), (1541, 30), (1500, 1001)])
def test_pixels_are_those_of_the_pixtral_processor(tmp_path: Path, size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    processor = PixtralImageProcessorPil(
        patch_size={"height": 28, "width": 28}, size={"longest_edge": 280}
    )
    (expected,) = processor(image, return_tensors="np")["pixel_values"]
    layout = load(write(tmp_path / "m")).image_layout
    assert layout is not None
    assert np.array_equal(normalized(encode_image(layout, image).image), expected)


# --- files


def test_older_releases_keep_the_sizes_in_a_file_of_their_own(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", image_processor=None)
    (directory / "preprocessor_config.json").write_text('{"size": {"longest_edge": 1540}}')
    layout = load(directory).image_layout
    assert layout is not None
    assert (layout.patch_pixels, layout.max_side_pixels) == (28, 1540)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"image_token": "<image>"}, "'<image>' is not a control token"),
        ({"image_processor": {"image_mean": [0.5, 0.5, 0.5]}}, "image_mean"),
        ({"image_processor": {"resample": 2}}, "resample"),
        ({"image_processor": {"do_normalize": False}}, "do_normalize"),
        ({"image_processor": {"size": {"longest_edge": "280"}}}, "'280' pixels"),
    ],
)
def test_settings_that_our_pixels_do_not_follow_are_refused(
    tmp_path: Path, processor: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_chat(write(tmp_path / "m", **processor))


def test_another_processor_leaves_text_only(tmp_path: Path) -> None:
    chat = load_chat(write(tmp_path / "m", processor_class="LlavaProcessor"))
    assert chat.image_layout is None
    assert processor_layout(CHATML, {}) is None
    with pytest.raises(RequestError, match="text only"):
        chat.encode(user(Image.new("RGB", (28, 28))))


@pytest.mark.parametrize(
    "change",
    [
        {"image_processor": [1]},
        {"image_processor": {"size": "large"}},
        {"image_processor": {"size": {"longest_edge": "x"}}},
        {"image_processor": {"size": {"longest_edge": True}}},
        {"image_processor": {"image_mean": "x"}},
        {"image_processor": {"image_mean": [0.5] * 4}},
        {"image_processor": {"do_resize": []}},
        {"patch_size": 0},
        {"patch_size": [14]},
        {"patch_size": 10**9},
        {"spatial_merge_size": -2},
    ],
)
def test_settings_of_other_kinds_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    directory = write(tmp_path / "m")
    path = directory / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: "):
        load_chat(directory)
