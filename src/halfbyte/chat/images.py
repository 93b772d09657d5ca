"""Images on their way to the encoder: bytes to pixels, under limits, and their tokens.

Sizes are read from the header before anything is decoded. Fetching URLs is not here (`server`):
this file sees bytes only. Resizing is Pillow's antialiased bicubic, as in the Pixtral processor of
transformers; mistral-common resizes with OpenCV (same shapes, slightly other pixels).
"""

import base64
import binascii
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from halfbyte.errors import RequestError

# CLIP's statistics, which Pixtral was trained with (mistral-common, DATASET_MEAN and DATASET_STD).
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may be."""

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
        """(columns, rows) of merged patches of an image of this many pixels."""
        ratio = max(width, height) / self.max_side_pixels
        if ratio > 1:
            width = max(self.whole_side(width / ratio), 1)
            height = max(self.whole_side(height / ratio), 1)
        return -(-width // self.patch_pixels), -(-height // self.patch_pixels)

    def num_tokens(self, height: int, width: int) -> int:
        """Tokens of an image already resized to whole patches."""
        return (height // self.patch_pixels) * (width // self.patch_pixels + 1)

    def tokens(self, columns: int, rows: int) -> list[int]:
        """The ids of a grid, row by row."""
        ids = ([self.image_token_id] * columns + [self.break_token_id]) * rows
        ids[-1] = self.end_token_id
        return ids


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """An image as ids and pixels (3, height, width), by the names that mistral-common expects."""

    tokens: list[int]
    image: NDArray[np.float32]


class ImageEncoder:
    """Stands in for mistral-common's image encoder; takes decoded images only, opens nothing."""

    def __init__(self, layout: ImageLayout) -> None:
        self._layout = layout

    @property
    def image_token(self) -> int:
        """The id that stands for one merged patch."""
        return self._layout.image_token_id

    def __call__(self, chunk: Any) -> ImageTokens:
        """Tokens and pixels of one image chunk."""
        return encode_image(self._layout, chunk.image)


def encode_image(layout: ImageLayout, image: Image.Image) -> ImageTokens:
    """Tokens and pixels of one RGB image."""
    columns, rows = layout.grid(*image.size)
    patch = layout.patch_pixels
    pixels = to_pixels(image, (columns * patch, rows * patch))
    return ImageTokens(layout.tokens(columns, rows), pixels)


def to_pixels(image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize an RGB image to (width, height) and normalize: float32 (3, height, width)."""
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / np.float32(255.0)
    return np.ascontiguousarray(((values - MEAN) / STD).transpose(2, 0, 1))


def data_url_bytes(url: str, path: str, limits: ImageLimits) -> bytes:
    """The bytes of a data: URL; its media type is ignored, the content decides.

    Raises RequestError if it is malformed or longer than the limit.
    """
    header, comma, payload = url.partition(",")
    if not comma or not header.startswith("data:"):
        raise RequestError(f"{path}: not a data: URL", param=path, code="invalid_image_url")
    # Four characters carry three bytes; checked before decoding.
    if len(payload) * 3 // 4 > limits.max_bytes + 3:
        raise _too_large(path, f"{len(payload) * 3 // 4:,} bytes", f"{limits.max_bytes:,} bytes")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(payload.replace("\n", "").replace("\r", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"{path}: the data: URL is not valid base64: {error}"
        raise RequestError(message, param=path, code="invalid_base64") from error


def decode_image(data: bytes, path: str, limits: ImageLimits) -> Image.Image:
    """An RGB image from file bytes: first frame, upright, transparency on white.

    Raises RequestError naming `path` for formats other than PNG, JPEG, WebP and GIF, for images
    over the limits (before decoding) and for broken files.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(path, f"{len(data):,} bytes", f"{limits.max_bytes:,} bytes")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large and odd files; our own limits decide.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > limits.max_pixels or width * height == 0:
                raise _too_large(path, f"{width}x{height}", f"{limits.max_pixels:,} pixels")
            image.load()
            return _on_white(ImageOps.exif_transpose(image))
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        # Pillow's own bound comes first for the very largest.
        raise _too_large(path, "far too many pixels", f"{limits.max_pixels:,} pixels") from error
    except UnidentifiedImageError as error:
        message = f"{path}: not a PNG, JPEG, WebP or GIF image"
        raise RequestError(message, param=path, code="invalid_image_format") from error
    # Decoders raise whatever they meet in broken files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        message = f"{path}: the image cannot be decoded: {error}"
        raise RequestError(message, param=path, code="invalid_image") from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16B", "F"):
        # 16-bit grey: Pillow's convert would clip instead of scale.
        values = np.asarray(image, dtype=np.float32)
        scaled = np.clip(values / 257.0, 0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "WHITE")
    white.alpha_composite(rgba)
    return white.convert("RGB")


def _too_large(path: str, what: str, limit: str) -> RequestError:
    message = f"{path}: image of {what} exceeds {limit}"
    return RequestError(message, param=path, code="image_too_large")
