"""Images on their way to the encoder: bytes to pixels, under limits, and their tokens.

Sizes, and with them tokens, are read from the header before anything is decoded; a decoded picture
is scaled at once (`halfbyte.pictures`). Fetching URLs is not here (`server`): this file sees bytes
only. Resizing is Pillow's antialiased bicubic, as in the Pixtral processor of transformers;
mistral-common resizes with OpenCV (same shapes; on photographs nearly the same pixels, on noise and
on fine dots visibly others: decision 0030). Sizes: docs/reference/chat.md#pictures.
"""

import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halfbyte.errors import RequestError
from halfbyte.pictures import Picture, PictureError, open_picture

_BASE64 = re.compile(r"; *base64$", re.IGNORECASE)
_BASE64_ALPHABET = bytes(c for c in range(128) if chr(c).isalnum()) + b"+/"
_WHITE_SPACE = b"\t\n\f\r "
_PIECE_CHARS = 2**20  # of a URL at a time, so that no step keeps Python's lock for long


# A picture of any size, or pixels as `decode_pixels` gives them.
ImageSource = Image.Image | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits on the bytes and pixels of one image."""

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """How an image becomes tokens: one [IMG] a merged patch, rows ended by a break, then the end.

    patch_pixels     side of a merged patch (28 for patch 14 merged 2x2)
    max_side_pixels  longer images are scaled down to this
    whole_side       makes a scaled side whole: mistral-common rounds, transformers cuts off

    100 x 60 at patch 28 is 3 rows of 4: resized to 112 x 84, 3 * (4 + 1) = 15 tokens.
    """

    patch_pixels: int
    max_side_pixels: int
    image_token_id: int
    break_token_id: int
    end_token_id: int
    whole_side: Callable[[float], int] = round

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of merged patches for an image of this many pixels."""
        ratio = max(width, height) / self.max_side_pixels
        if ratio > 1:
            width = max(self.whole_side(width / ratio), 1)
            height = max(self.whole_side(height / ratio), 1)
        return -(-width // self.patch_pixels), -(-height // self.patch_pixels)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in whole patches to which an image of this many pixels is scaled."""
        columns, rows = self.grid(width, height)
        return columns * self.patch_pixels, rows * self.patch_pixels

    def num_tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image already resized to whole patches."""
        return (height // self.patch_pixels) * (width // self.patch_pixels + 1)

    def tokens(self, columns: int, rows: int) -> list[int]:
        """The ids of a grid, row by row."""
        ids = ([self.image_token_id] * columns + [self.break_token_id]) * rows
        ids[-1] = self.end_token_id
        return ids


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """An image as ids and pixels (3, height, width), by the names that mistral-common expects.

    The pixels are not normalized: floats would be four times the bytes, in every picture that waits
    for the encoder (`pictures.normalized`).
    """

    tokens: list[int]
    image: NDArray[np.uint8]


class DecodedImages:
    """Stands in for mistral-common's image encoder; takes decoded images only, opens nothing."""

    def __init__(self, layout: ImageLayout) -> None:
        self._layout = layout

    @property
    def image_token(self) -> int:
        """The id that stands for one merged patch."""
        return self._layout.image_token_id

    def __call__(self, chunk: Any) -> ImageTokens:
        """Token ids and pixels of one image chunk of mistral-common's."""
        return encode_image(self._layout, chunk.image)


def encode_image(layout: ImageLayout, image: ImageSource) -> ImageTokens:
    """Tokens and pixels of one RGB image; pixels are not copied."""
    patch = layout.patch_pixels
    if isinstance(image, np.ndarray):
        _, height, width = image.shape
        return ImageTokens(layout.tokens(width // patch, height // patch), image)
    width, height = image.size
    largest = -(-layout.max_side_pixels // patch)
    columns, rows = width // patch, height // patch
    if width % patch or height % patch or max(columns, rows) > largest:
        columns, rows = layout.grid(width, height)
    pixels = to_pixels(image, (columns * patch, rows * patch))
    return ImageTokens(layout.tokens(columns, rows), pixels)


def to_pixels(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image to (width, height): its pixels, (3, height, width)."""
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def data_url_bytes(url: str, path: str, limits: ImageLimits) -> bytes:
    """The bytes of a data: URL; its media type is ignored, the content decides.

    Read as browsers do (WHATWG Fetch, "data: URL processor"): the marker in any case, percent
    escapes, white space in the payload, padding or none. Raises RequestError if it is malformed or
    longer than the limit.
    """
    if url[:5].lower() != "data:":
        raise RequestError(f"{path} is not a data: URL", param=path, code="invalid_image_url")
    comma = url.find(",")
    if comma < 0:
        message = f"{path}: the data: URL has no comma before its data"
        raise RequestError(message, param=path, code="invalid_image_url")
    header = url[5:comma].strip("\t\n\f\r ")
    end = url.find("#", comma)
    pieces = _percent_decoded(url, comma + 1, len(url) if end < 0 else end)
    # Four characters carry three bytes; checked before decoding.
    is_base64 = _BASE64.search(header) is not None
    limit = limits.max_bytes * 4 // 3 + 4 if is_base64 else limits.max_bytes
    found: list[bytes] = []
    length = 0
    for piece in pieces:
        if is_base64:
            piece = piece.translate(None, _WHITE_SPACE)
        found.append(piece)
        length += len(piece)
        if length > limit:
            raise _too_large(path, "more bytes", f"{limits.max_bytes:,} bytes")
    return _forgiving_base64(b"".join(found), path) if is_base64 else b"".join(found)


def _percent_decoded(url: str, start: int, end: int) -> Iterator[bytes]:
    """A part of a URL in pieces, none of which begins within an escape."""
    while start < end:
        stop = min(start + _PIECE_CHARS, end)
        cut = url.find("%", stop - 2, stop) if stop < end else -1
        if cut > start:
            stop = cut
        piece = url[start:stop]
        # Browsers drop line ends and tabs from any URL, and write other scripts as escapes.
        yield unquote_to_bytes(piece) if "%" in piece else piece.encode("utf-8", "surrogatepass")
        start = stop


def _forgiving_base64(text: bytes, path: str) -> bytes:
    """Base64 without white space, with or without padding (WHATWG Infra, "forgiving")."""
    if len(text) % 4 == 0:
        text = text.removesuffix(b"=").removesuffix(b"=")
    decoded: list[bytes] = []
    step = _PIECE_CHARS  # a multiple of four
    for start in range(0, len(text), step):
        piece = text[start : start + step]
        if len(piece) % 4 == 1 or piece.translate(None, _BASE64_ALPHABET):
            message = f"{path}: the data: URL is not valid base64"
            raise RequestError(message, param=path, code="invalid_base64")
        decoded.append(binascii.a2b_base64(piece + b"=" * (-len(piece) % 4)))
    return b"".join(decoded)


def open_image(data: bytes | memoryview, path: str, limits: ImageLimits) -> Picture:
    """Open a picture and read nothing but its header.

    Raises RequestError naming `path` for formats other than PNG, JPEG, WebP and GIF, for images
    over the limits and for broken headers.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(path, f"{len(data):,} bytes", f"{limits.max_bytes:,} bytes")
    try:
        return open_picture(data, max_pixels=limits.max_pixels)
    except PictureError as error:
        raise RequestError(f"{path}: {error}", param=path, code=error.code) from error


def decode_opened(picture: Picture, path: str, layout: ImageLayout | None = None) -> Image.Image:
    """The pixels of an opened picture: upright, RGB on white, at the size that `layout` asks for.

    Raises RequestError naming `path` for broken files.
    """
    size = None if layout is None else layout.size(picture.width, picture.height)
    try:
        return picture.decode(size)
    except PictureError as error:
        raise RequestError(f"{path}: {error}", param=path, code=error.code) from error


def decode_pixels(picture: Picture, path: str, layout: ImageLayout) -> NDArray[np.uint8]:
    """Decode an opened picture to pixels as the encoder waits for them: (3, height, width)."""
    image = decode_opened(picture, path, layout)
    return to_pixels(image, image.size)


def decode_image(data: bytes, path: str, limits: ImageLimits) -> Image.Image:
    """An RGB image of the file's own size; see `open_image` and `decode_opened`."""
    return decode_opened(open_image(data, path, limits), path)


def _too_large(path: str, what: str, limit: str) -> RequestError:
    message = f"{path}: image of {what} exceeds {limit}"
    return RequestError(message, param=path, code="image_too_large")
