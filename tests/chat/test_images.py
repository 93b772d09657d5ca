import base64
import dataclasses
import io
import math
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from mistral_common.tokens.tokenizers.image import ImageConfig, SpecialImageIDs
from mistral_common.tokens.tokenizers.image import ImageEncoder as MistralImages
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from halfbyte.chat import images
from halfbyte.chat.images import (
    ImageLayout,
    ImageLimits,
    data_url_bytes,
    decode_image,
    encode_image,
    to_pixels,
)
from halfbyte.errors import RequestError
from halfbyte.pictures import normalized

LAYOUT = ImageLayout(28, 1540, 10, 12, 13)
LIMITS = ImageLimits(max_bytes=100_000, max_pixels=1_000_000)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "resized", "total"),
    [
        (28, 28, (28, 28), 2),
        (56, 84, (84, 56), 9),
        (100, 60, (84, 112), 15),
        (640, 480, (504, 644), 432),
        (1540, 1540, (1540, 1540), 3080),
        (3000, 1000, (532, 1540), 1064),
        (1, 4000, (1540, 28), 110),
    ],
)
def test_layout_follows_the_published_table(
    width: int, height: int, resized: tuple[int, int], total: int
) -> None:
    columns, rows = LAYOUT.grid(width, height)
    assert (rows * 28, columns * 28) == resized
    tokens = LAYOUT.tokens(columns, rows)
    assert len(tokens) == total == LAYOUT.num_tokens(*resized)
    assert tokens.count(10) == columns * rows and tokens[-1] == 13
    assert tokens.count(12) == rows - 1


_THEIRS = MistralImages(
    ImageConfig(image_patch_size=14, max_image_size=1540, spatial_merge_size=2),
    SpecialImageIDs(img=10, img_break=12, img_end=13),
)


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_grids_are_those_of_mistral_common(width: int, height: int) -> None:
    picture: Any = SimpleNamespace(size=(width, height))
    assert LAYOUT.grid(width, height) == tuple(_THEIRS._image_to_num_tokens(picture))


@pytest.mark.parametrize(
    ("width", "height"),
    [(28, 28), (27, 29), (100, 60), (641, 479), (2000, 3), (1541, 30), (1500, 1001)],
)
def test_pixels_equal_those_of_the_pixtral_processor(width: int, height: int) -> None:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    processor = PixtralImageProcessorPil(
        patch_size={"height": 28, "width": 28}, size={"longest_edge": 1540}
    )
    (expected,) = processor(image, return_tensors="np")["pixel_values"]
    columns, rows = LAYOUT.grid(width, height)
    pixels = to_pixels(image, (columns * 28, rows * 28))
    assert np.array_equal(normalized(pixels), expected)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_decode(form: str) -> None:
    image = decode_image(encoded(Image.new("RGB", (9, 7), "red"), form), "p", LIMITS)
    assert image.size == (9, 7) and image.mode == "RGB"
    red, green, _ = image.getpixel((4, 4))  # type: ignore[misc]
    assert red > 200 and green < 50


def test_transparency_becomes_white_in_every_mode() -> None:
    for mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        decoded = decode_image(encoded(image, "PNG"), "p", LIMITS)
        assert decoded.getpixel((0, 0)) == (255, 255, 255), mode
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert decode_image(encoded(palette, "PNG", transparency=0), "p", LIMITS).getpixel((1, 1)) == (
        255,
        255,
        255,
    )


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((4, 4), 0x8080, dtype=np.uint16))
    assert decode_image(encoded(grey, "PNG"), "p", LIMITS).getpixel((0, 0)) == (128, 128, 128)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (10, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: rotate 90 degrees clockwise to show
    assert decode_image(encoded(image, "JPEG", exif=exif), "p", LIMITS).size == (4, 10)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, "p", LIMITS).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("side", [2_000, 60_000])
def test_size_is_checked_before_decoding(side: int) -> None:
    """A header that promises a huge image is refused although no pixels follow."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(RequestError, match="exceeds 1,000,000 pixels") as caught:
        decode_image(png, "messages[0]", LIMITS)
    assert caught.value.code == "image_too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
        b"GIF89a",
        encoded(Image.new("RGB", (50, 50), "red"), "PNG")[:-40],
        encoded(Image.effect_noise((60, 60), 90), "JPEG")[:200],
        encoded(Image.new("RGB", (4, 4)), "BMP"),
    ],
)
def test_broken_and_foreign_files_are_the_clients_error(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        decode_image(data, "messages[0].content[0]", LIMITS)
    assert caught.value.param == "messages[0].content[0]"


def test_data_urls() -> None:
    payload = base64.b64encode(b"abc").decode()
    assert data_url_bytes(f"data:image/png;base64,{payload}", "p", LIMITS) == b"abc"
    assert data_url_bytes("data:,a%20b", "p", LIMITS) == b"a b"
    for url in ("data:image/png;base64", "http://x/y.png", "data:image/png;base64,@@@@"):
        with pytest.raises(RequestError):
            data_url_bytes(url, "p", LIMITS)
    with pytest.raises(RequestError, match="exceeds"):
        data_url_bytes("data:;base64," + "A" * 200_000, "p", LIMITS)


def test_pixels_are_normalized_channels_first() -> None:
    image = to_pixels(Image.new("RGB", (10, 10), "white"), (28, 56))
    pixels = normalized(image)
    assert image.shape == pixels.shape == (3, 56, 28)
    assert (str(image.dtype), str(pixels.dtype)) == ("uint8", "float32")
    np.testing.assert_allclose(pixels[0], (1 - 0.48145466) / 0.26862954, rtol=1e-6)


PNG_URL = base64.b64encode(encoded(Image.new("RGB", (3, 2), "red"), "PNG")).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{PNG_URL}",
        f"DATA:image/png;base64,{PNG_URL}",
        f"data:image/png;BASE64,{PNG_URL}",
        f"data:image/png;  BaSe64,{PNG_URL}",
        f"data: image/png;base64 ,{PNG_URL}",
        f"data:image/png;charset=utf-8;base64,{PNG_URL}",
        f"data:;base64,{PNG_URL}",
        f"data:image/png;base64, {PNG_URL}",
        f"data:image/png;base64,{PNG_URL} \n",
        f"data:image/png;base64,{PNG_URL.rstrip('=')}",
        f"data:image/png;base64,{PNG_URL.replace('=', '%3D').replace('+', '%2b')}",
        "data:image/png;base64," + "".join(f"%{ord(char):02x}" for char in PNG_URL),
        "data:image/png;base64," + "\t\r\n\f ".join(PNG_URL),
        f"data:image/png;base64,{PNG_URL}#fragment",
    ],
)
def test_data_urls_are_read_as_browsers_read_them(url: str, monkeypatch: Any) -> None:
    for chars in (2**20, 8, 4):  # pieces end within an escape, too
        monkeypatch.setattr(images, "_PIECE_CHARS", chars)
        decoded = decode_image(data_url_bytes(url, "p", LIMITS), "p", LIMITS)
        assert decoded.size == (3, 2)


@given(st.binary(max_size=60), st.randoms(use_true_random=False))
def test_any_spelling_of_base64_is_the_same_bytes(data: bytes, dice: Any) -> None:
    text = base64.b64encode(data).decode()
    if dice.random() < 0.5:
        text = text.rstrip("=")
    spelt = "".join(
        dice.choice(["", "", " ", "\n", "%20"])
        + (f"%{ord(char):02X}" if dice.random() < 0.2 else char)
        for char in text
    )
    assert data_url_bytes(f"data:;base64,{spelt}", "p", LIMITS) == data


@pytest.mark.parametrize(
    "payload", ["A", "AAAAA", "A===", "AA=A", "A-_A", "AAAA====", "\u00e9AAA", "=", "%"]
)
def test_what_is_no_base64_is_the_clients_error(payload: str) -> None:
    with pytest.raises(RequestError, match="not valid base64"):
        data_url_bytes(f"data:image/png;base64,{payload}", "p", LIMITS)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([round, math.floor]))
def test_a_picture_scaled_on_the_way_in_keeps_its_grid(
    width: int, height: int, whole_side: Any
) -> None:
    layout = dataclasses.replace(LAYOUT, whole_side=whole_side, max_side_pixels=100)
    size = layout.size(width, height)
    columns, rows = layout.grid(width, height)
    encoded_image = encode_image(layout, Image.new("RGB", size))
    assert encoded_image.tokens == layout.tokens(columns, rows)
    assert encoded_image.image.shape == (3, rows * 28, columns * 28)
