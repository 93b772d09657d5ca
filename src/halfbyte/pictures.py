"""Pictures out of files that nobody has looked at: the size from the header, pixels in strips.

The server shows a model what clients send, the benchmarks send what their data sets hold; both
want the same pixels, so both open files here. A picture comes out upright, as RGB on white, its
first frame only, and at once at the size that is wanted: no step keeps Python's lock for more than
a strip, and no more than the decoded file and one copy is ever held (8 bytes a pixel).
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from halfbyte.errors import HalfbyteError
from halfbyte.machine import trim_heap

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_SIDE = 65_535  # pixels; what JPEG and GIF can say, and twice what a camera makes
# Its decoder holds Python's lock and four copies of the picture: 15 bytes a pixel.
MAX_WEBP_PIXELS = 24_000_000
_STRIP_PIXELS = 2**19
_TRIM_PIXELS = 2**22  # above these the C library is asked to give the decoded file's memory back

# CLIP's statistics, which Pixtral was trained with (mistral-common, DATASET_MEAN and DATASET_STD).
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)

_PNG = b"\x89PNG\r\n\x1a\n"
# What decides about pixels. Every other chunk may be dropped unread (PNG 5.4, ancillary ones).
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")
_PNG_CRITICAL = 0x20  # this bit of a chunk type's first letter is 0

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(HalfbyteError):
    """A file is no picture that we show; `code` is one of the server's error codes."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def normalized(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels (3, height, width) as Pixtral's encoder takes them; four times the bytes."""
    values = pixels.astype(np.float32) / np.float32(255.0)
    return (values - MEAN[:, None, None]) / STD[:, None, None]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file of which the header has been read.

    width, height  pixels as it is to be shown, before any scaling
    orientation    1 to 8, as EXIF counts
    key            the sample or samples of a colour that stands for transparent, or None
    """

    width: int
    height: int
    orientation: int
    key: int | tuple[int, int, int] | None
    _file: Image.Image

    def decode(self, size: tuple[int, int] | None = None) -> Image.Image:
        """The pixels, RGB; scaled to (width, height) by Pillow's antialiased bicubic.

        A JPEG of at least four times the wanted size is decoded at a half, a quarter or an eighth,
        which its format allows. Can be called once. Raises PictureError for broken files.
        """
        image = self._file
        with _decoding():
            if size is not None and image.format in ("JPEG", "MPO"):
                width, height = size[::-1] if self.orientation >= 5 else size
                image.draft(image.mode, (2 * width, 2 * height))
            image.load()
            return self._assembled(image, size)

    def _assembled(self, image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
        """Strip by strip upright and on white, then scaled."""
        width, height = image.size[::-1] if self.orientation >= 5 else image.size
        whole = image
        if image.mode != "RGB" or self.orientation != 1 or self.key is not None:
            whole = Image.new("RGB", (width, height))
            for top, strip in self._strips(image, width, height):
                whole.paste(on_white(strip, self.key), (0, top))
            image.close()
        if size is not None and size != (width, height):
            whole = whole.resize(size, Image.Resampling.BICUBIC)
        elif whole is image:
            whole = image.copy()  # not one that still holds its file
        image.close()
        if width * height > _TRIM_PIXELS:
            trim_heap()
        return whole

    def _strips(
        self, image: Image.Image, width: int, height: int
    ) -> Iterator[tuple[int, Image.Image]]:
        """Rows of the upright picture, (first row, strip), cut out of the stored one."""
        rows = max(_STRIP_PIXELS // width, 1)
        for top in range(0, height, rows):
            end = min(top + rows, height)
            first, last = top, end
            if self.orientation in (3, 4, 7, 8):  # counts the stored ones from their other end
                first, last = height - end, height - top
            box = (first, 0, last, width) if self.orientation >= 5 else (0, first, width, last)
            strip = image.crop(box)
            turn = _UPRIGHT.get(self.orientation)
            yield top, strip if turn is None else strip.transpose(turn)


def open_picture(data: bytes | memoryview, *, max_pixels: int) -> Picture:
    """Read a file's header. Raises PictureError for other formats and for more pixels.

    A view is read piece by piece and must last as long as the picture.
    """
    is_png = bytes(data[: len(_PNG)]) == _PNG
    with _decoding(max_pixels):
        data, key, exif = _without_extras(data) if is_png else (data, None, b"")
        file = io.BytesIO(data) if isinstance(data, bytes) else io.BufferedReader(_Memory(data))
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if image.format == "WEBP":
            max_pixels = min(max_pixels, MAX_WEBP_PIXELS)
        if width * height > max_pixels or width * height == 0:
            raise PictureError(
                f"{image.format} image of {width}x{height} exceeds {max_pixels:,} pixels",
                "image_too_large",
            )
        if max(width, height) > MAX_SIDE:
            raise PictureError(
                f"image of {width}x{height} exceeds {MAX_SIDE:,} pixels on a side",
                "image_too_large",
            )
        # Asked for the EXIF of a PNG, Pillow would decode it.
        orientation = _orientation(exif if is_png else image)
        if orientation >= 5:
            width, height = height, width
        return Picture(width, height, orientation, key, image)


def on_white(image: Image.Image, key: int | tuple[int, int, int] | None = None) -> Image.Image:
    """An RGB image of the same size; what is transparent becomes white, 16-bit grey 8-bit."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        # Pillow's convert would clip instead of scale.
        values = np.asarray(image).astype(np.float32)
        grey = np.clip(np.rint(values / 257.0), 0, 255).astype(np.uint8)
        if key is not None:
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("1", "L", "RGB"):
        flat = image.convert("RGB")
        if key is not None:
            samples = np.array(flat)
            samples[(samples == key).all(axis=2)] = 255
            return Image.fromarray(samples)
        return flat
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "WHITE")
    white.alpha_composite(rgba)
    return white.convert("RGB")


def _orientation(source: Image.Image | bytes) -> int:
    """What EXIF says of how the picture lies; whatever else EXIF says is left unread."""
    try:
        if isinstance(source, bytes):
            exif = Image.Exif()
            exif.load(source)
        else:
            exif = source.getexif()
        value: Any = exif.get(_ORIENTATION)
        if isinstance(value, tuple) and len(value) == 1:
            (value,) = value
        turned = int(value) if value is not None else 1
    # Damaged EXIF raises whatever Pillow's readers meet; the pixels are fine without it.
    except Exception:
        return 1
    return turned if turned in _UPRIGHT else 1


class _Memory(io.RawIOBase):
    """A file over memory that is not copied."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}
        self._position = max(start[whence] + offset, 0)
        return self._position


def _without_extras(
    data: bytes | memoryview,
) -> tuple[bytes | memoryview, int | tuple[int, int, int] | None, bytes]:
    """A PNG without the chunks that do not bear on its pixels, its colour key, and its EXIF.

    Screenshots carry texts and profiles that Pillow would refuse for their size, or for a wrong
    checksum. The key is in samples as Pillow decodes them: greys of 1, 2 and 4 bits are spread to
    8, of 16-bit colours the upper byte is kept.
    """
    pieces: list[bytes | memoryview] = [_PNG]
    is_whole_file = True
    position = len(_PNG)
    depth = colour = 0
    key: int | tuple[int, int, int] | None = None
    exif = b""
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break  # cut short; Pillow says so
        body = memoryview(data)[position + 8 : end - 4]
        is_kept = kind in _PNG_KEPT or not kind[0] & _PNG_CRITICAL
        if kind == b"IHDR" and length >= 10:
            depth, colour = body[8], body[9]
        elif kind in (b"tRNS", b"eXIf"):
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            is_whole = zlib.crc32(kind + body) == checksum
            is_kept = is_whole and kind == b"tRNS" and colour == 3
            if is_whole and kind == b"tRNS" and not is_kept:
                key = _key(bytes(body), depth, colour)
            elif is_whole and kind == b"eXIf":
                exif = bytes(body)
        if is_kept:
            pieces.append(data[position:end])
        is_whole_file &= is_kept
        position = end
    if is_whole_file:
        return data, key, exif
    return b"".join([*pieces, data[position:]]), key, exif


def _key(body: bytes, depth: int, colour: int) -> int | tuple[int, int, int] | None:
    # Depths that PNG does not have for a colour type are refused by whoever decodes.
    if colour == 0 and len(body) == 2 and depth in (1, 2, 4, 8, 16):
        (grey,) = struct.unpack(">H", body)
        return int(grey) if depth == 16 else int(grey) * 255 // (2**depth - 1)
    if colour == 2 and len(body) == 6 and depth in (8, 16):
        red, green, blue = (value >> (depth - 8) for value in struct.unpack(">3H", body))
        return red, green, blue
    return None


class _decoding:  # noqa: N801 - reads as a word
    """Turns what Pillow raises into PictureError, and its warnings off: our limits decide."""

    def __init__(self, max_pixels: int = 0) -> None:
        self._max_pixels = max_pixels

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if error is None or isinstance(error, HalfbyteError) or not isinstance(error, Exception):
            return
        if isinstance(error, Image.DecompressionBombError):
            # Pillow's own bound comes first for the very largest.
            message = f"image of far too many pixels exceeds {self._max_pixels:,} pixels"
            raise PictureError(message, "image_too_large") from error
        if isinstance(error, UnidentifiedImageError):
            message = "not a PNG, JPEG, WebP or GIF image"
            raise PictureError(message, "invalid_image_format") from error
        # Decoders raise whatever they meet in broken files: OSError, SyntaxError, struct.error.
        raise PictureError(f"the image cannot be decoded: {error}", "invalid_image") from error
