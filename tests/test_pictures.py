"""Pictures as viewers show them, opened without decoding, decoded without waste."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageOps

from halfbyte import pictures
from halfbyte.pictures import MAX_SIDE, MAX_WEBP_PIXELS, Picture, PictureError, open_picture

WHITE = (255, 255, 255)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Picture:
    return open_picture(data, max_pixels=2_000_000)


def chunk(kind: bytes, body: bytes, *, damage: int = 0) -> bytes:
    checksum = zlib.crc32(kind + body) ^ damage
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(width: int, rows: list[bytes], depth: int, colour: int, *extras: bytes) -> bytes:
    """A PNG of packed rows; `extras` are chunks before the pixels."""
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", head), *extras, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(
    form: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 300)  # many strips
    image = noise(41, 60, 3 if form == "JPEG" else 4)
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(image, form, exif=exif, **options)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    expected = Image.new("RGBA", turned.size, "WHITE")
    expected.alpha_composite(turned)
    picture = opened(data)
    assert (picture.width, picture.height) == expected.size
    assert picture.decode().tobytes() == expected.convert("RGB").tobytes()
    scaled = expected.convert("RGB").resize((56, 28), Image.Resampling.BICUBIC)
    assert opened(data).decode((56, 28)).tobytes() == scaled.tobytes()


def exif_of(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """A big-endian EXIF block of (tag, type, count, value) in the order given."""
    body = struct.pack(">H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(">HHI", tag, kind, count) + value[:4].ljust(4, b"\0")
    return b"MM\0*\0\0\0\x08" + body + b"\0\0\0\0"


_ENTRY = st.tuples(
    st.sampled_from([0x0100, 0x010F, 0x0110, 0x011A, 0x0128, 0x0132, 0x0213, 0x8769, 0x8825])
    | st.integers(0, 0xFFFF).filter(lambda tag: tag != 0x0112),
    st.integers(0, 14),
    st.integers(0, 3) | st.sampled_from([2**31, 2**32 - 1]),
    st.binary(min_size=4, max_size=4),
)


@given(st.lists(_ENTRY, max_size=4), st.sampled_from(["PNG", "JPEG", "WEBP"]))
@settings(max_examples=60, deadline=None)
def test_what_else_exif_says_does_not_matter(
    entries: list[tuple[int, int, int, bytes]], form: str
) -> None:
    turned = (0x0112, 3, 1, b"\0\x06")
    data = encoded(noise(12, 30), form, exif=b"Exif\0\0" + exif_of([turned, *entries]))
    picture = opened(data)
    assert picture.decode().size == (picture.width, picture.height)
    assert picture.width in (12, 30)  # Pillow cannot read on behind some damaged entries
    if not entries:
        assert (picture.width, picture.height) == (30, 12)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_colour_key_of_greys_is_white_at_every_depth(depth: int) -> None:
    top = 2**depth - 1
    for key in {0, 1, top // 2, top}:
        other = top if key != top else 0
        if depth == 16:
            row, width = struct.pack(">HH", key, other), 2
        elif depth == 8:
            row, width = bytes([key, other]), 2
        else:
            row, width = bytes([(key << (8 - depth)) | (other << (8 - 2 * depth))]), 2
        image = opened(png(width, [row], depth, 0, chunk(b"tRNS", struct.pack(">H", key)))).decode()
        assert image.getpixel((0, 0)) == WHITE, key
        shade = round(other * 255 / top)
        assert image.getpixel((1, 0)) == (shade, shade, shade), key


@pytest.mark.parametrize("depth", [8, 16])
def test_the_colour_key_of_colours_is_white(depth: int) -> None:
    form, scale = (">3B", 1) if depth == 8 else (">3H", 257)
    key, other = (10 * scale, 0, 200 * scale), (10 * scale, 0, 201 * scale)
    row = struct.pack(form, *key) + struct.pack(form, *other)
    image = opened(png(2, [row], depth, 2, chunk(b"tRNS", struct.pack(">3H", *key)))).decode()
    assert image.getpixel((0, 0)) == WHITE and image.getpixel((1, 0)) == (10, 0, 201)


def test_palettes_with_transparency_and_greys_with_alpha_are_on_white() -> None:
    colours = chunk(b"PLTE", bytes([1, 2, 3, 0, 0, 0])) + chunk(b"tRNS", bytes([255, 0]))
    image = opened(png(2, [bytes([0, 1])], 8, 3, colours)).decode()
    assert image.getpixel((0, 0)) == (1, 2, 3) and image.getpixel((1, 0)) == WHITE
    image = opened(png(2, [bytes([7, 255, 7, 0])], 8, 4)).decode()
    assert image.getpixel((0, 0)) == (7, 7, 7) and image.getpixel((1, 0)) == WHITE


def test_sixteen_bit_greys_are_rounded() -> None:
    greys = [0, 128, 129, 32767, 32768, 65534, 65535]
    row = struct.pack(f">{len(greys)}H", *greys)
    image = opened(png(len(greys), [row], 16, 0)).decode()
    got = [image.getpixel((x, 0)) for x in range(len(greys))]
    assert got == [(shade,) * 3 for shade in (0, 0, 1, 127, 128, 255, 255)]


@pytest.mark.parametrize("damage", [0, 1])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"zzZz"])
def test_chunks_beside_the_pixels_are_dropped(kind: bytes, damage: int) -> None:
    name = b"name\0" if kind != b"iTXt" else b"name\0\1\0\0\0"
    for body in (name + b"\0" + zlib.compress(bytes(2_000_000)), b"", b"\xff" * 9):
        extra = chunk(kind, body, damage=damage)
        data = png(1, [bytes([9, 8, 7])], 8, 2, extra)
        assert opened(data).decode().getpixel((0, 0)) == (9, 8, 7)


def test_a_key_with_a_wrong_checksum_is_none() -> None:
    damaged = chunk(b"tRNS", struct.pack(">3H", 9, 8, 7), damage=1)
    data = png(1, [bytes([9, 8, 7])], 8, 2, damaged)
    assert opened(data).decode().getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("colour", range(8))
@pytest.mark.parametrize("kind", [b"tRNS", b"eXIf", b"PLTE", b"IHDR", b"acTL"])
def test_chunks_that_do_not_fit_the_header_are_no_crash(kind: bytes, colour: int) -> None:
    for depth in (0, 1, 2, 3, 4, 8, 15, 16, 255):
        for length in (0, 1, 2, 6, 13, 400):
            data = png(1, [bytes(9)], depth, colour, chunk(kind, b"\xff" * length))
            with contextlib.suppress(PictureError):
                opened(data).decode()


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_a_file_cut_short_is_an_error_and_not_a_crash(cut: int) -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        data = encoded(noise(20, 20), form)
        with pytest.raises(PictureError):
            opened(data[: len(data) * cut // 64]).decode()


def test_limits_are_checked_in_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_WEBP_PIXELS", 300)
    assert MAX_WEBP_PIXELS < 40_000_000
    for data in (
        png(2001, [b""] * 1000, 8, 2),
        png(MAX_SIDE + 1, [b""], 8, 2),
        encoded(noise(20, 20), "WEBP"),
    ):
        with pytest.raises(PictureError, match="exceeds") as caught:
            opened(data)
        assert caught.value.code == "image_too_large"


def test_nothing_is_decoded_to_know_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {form: encoded(noise(30, 20), form) for form in ("PNG", "JPEG", "WEBP", "GIF")}
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = encoded(noise(30, 20), "PNG", exif=exif)

    def fail(*_: Any) -> None:
        raise AssertionError("decoded")

    for kind in (Image.Image, *(type(Image.open(io.BytesIO(data))) for data in files.values())):
        monkeypatch.setattr(kind, "load", fail)
    for data in files.values():
        assert opened(data).width == 30
    assert opened(turned).width == 20


def test_large_jpegs_are_decoded_smaller() -> None:
    """An eighth of 1600 x 1200 is 200 x 150, twice what is wanted; the pixels stay close."""
    image = Image.radial_gradient("L").resize((1600, 1200)).convert("RGB")
    data = encoded(image, "JPEG", quality=90)
    small = open_picture(data, max_pixels=2_000_000).decode((100, 75))
    expected = image.resize((100, 75), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small, dtype=int) - np.asarray(expected, dtype=int)).max() <= 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by /proc of Linux")
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_largest_picture_takes_a_bounded_memory_and_gives_it_back(mode: str) -> None:
    """39.7 megapixels: 4 bytes each decoded, and 4 for one copy where there is anything to do."""
    program = """
        import io, sys
        from PIL import Image
        from halfbyte.pictures import open_picture

        def held(name):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024

        def decode(data):
            open_picture(data, max_pixels=40_000_000).decode((1540, 1540))

        buffer = io.BytesIO()
        Image.new(sys.argv[1], (6300, 6300)).save(buffer, "PNG")
        small = io.BytesIO()
        Image.new(sys.argv[1], (64, 64)).save(small, "PNG")
        decode(small.getvalue())
        open("/proc/self/clear_refs", "w").write("5")
        before = held("VmRSS")
        decode(buffer.getvalue())
        print(held("VmHWM") - before, held("VmRSS") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), mode],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(pictures.__file__).parents[1])},
    )
    peak, kept = map(int, done.stdout.split())
    assert peak < 450 and kept < 60
