"""Pictures of calibration rows through the vision tower, one of its layers in memory at a time.

What comes out takes the place of the image tokens' embeddings, as in the engine; the vectors have
the bits that `model.vision` gives in one piece. Between two layers patches wait as the decoder's
activations do: in memory, or on disk when they are too large. Called by `stream`.

Shapes: D tower width, T patches, M vectors of a picture.
"""

import shutil
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.draw import RowPictures
from halfbyte.chat.prompt import EncodedImage
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig, VisionConfig
from halfbyte.errors import UsageError
from halfbyte.model.load import load_vision_ends, load_vision_layer
from halfbyte.model.parts import compute_all
from halfbyte.model.vision import Encoding, VisionModel, num_layers_used
from halfbyte.pictures import normalized

_FOLDER = "pictures"  # beside the decoder's activations


def num_patches(config: VisionConfig, image: EncodedImage) -> int:
    """Patches of a picture, before they are merged."""
    _, height, width = image.pixels.shape
    return int(height // config.patch_size) * int(width // config.patch_size)


def num_vectors(config: VisionConfig, image: EncodedImage) -> int:
    """Vectors of a picture, one for each of its image tokens."""
    _, height, width = image.pixels.shape
    side = config.patch_size * config.spatial_merge_size
    return int(height // side) * int(width // side)


def image_positions(row: Tensor, images: Sequence[EncodedImage], token_id: int) -> list[Tensor]:
    """Positions of a row that show each picture's vectors, in their order; int64 (M,) each.

    Example: tokens a IMG IMG BREAK IMG IMG END b, a picture of six tokens at 1: 1, 2, 4, 5.
    """
    return [
        image.offset
        + torch.nonzero(row[image.offset : image.offset + image.num_tokens] == token_id)[:, 0]
        for image in images
    ]


def check_pictures(
    rows: Sequence[Tensor], pictures: RowPictures, config: ModelConfig, where: str
) -> None:
    """Raise UsageError unless every image token of a row stands for a vector of its pictures.

    A row may end within its last picture. Rows of pictures need a model that sees.
    """
    if not pictures:
        return
    vision = config.vision
    if vision is None:
        raise UsageError(f"{where}: its rows show pictures; this model takes text only")
    if len(pictures) != len(rows):
        raise UsageError(f"{where}: pictures of {len(pictures)} rows beside {len(rows)} rows")
    for number, (row, images) in enumerate(zip(rows, pictures, strict=True)):
        end = 0
        for image, at in zip(
            images, image_positions(row, images, vision.image_token_id), strict=True
        ):
            channels, height, width = image.pixels.shape
            last = image.offset + image.num_tokens
            fits = end <= image.offset < last <= row.numel() and channels == vision.num_channels
            found, wanted = at.numel(), num_vectors(vision, image)
            is_cut = last == row.numel()
            if not fits or found == 0 or found > wanted or (found < wanted and not is_cut):
                raise UsageError(
                    f"{where}: row {number}: a picture of {width}x{height} pixels has {wanted} "
                    f"vectors, and tokens {image.offset} to {last} hold {found} of its image tokens"
                    ". Was it made for another model?"
                )
            end = last


class PictureBytes(NamedTuple):
    """Bytes that the pictures of a run take beside its rows.

    pixels   of all, held for the whole run
    patches  of all, between two layers of the tower
    tower    the most that loading a part of the tower and running the largest picture takes
    """

    pixels: int = 0
    patches: int = 0
    tower: int = 0


NO_PICTURES = PictureBytes()


def picture_bytes(pictures: RowPictures, config: ModelConfig) -> PictureBytes:
    """Bytes of pictures that are here; zeros for none."""
    images = [image for row in pictures for image in row]
    if not images or config.vision is None:
        return NO_PICTURES
    vision = config.vision
    patches = [num_patches(vision, image) for image in images]
    return PictureBytes(
        sum(image.pixels.nbytes for image in images),
        2 * vision.width * sum(patches),
        tower_bytes(vision, config.text.width, max(patches)),
    )


def tower_bytes(vision: VisionConfig, text_width: int, largest: int) -> int:
    """The most that a part of the tower and a picture of so many patches take."""
    width, merged = vision.width, vision.spatial_merge_size**2
    # Stacked weights stand beside their members while a layer is loaded.
    attention, mlp = vision.num_heads * vision.head_dim * width, vision.mlp_width * width
    layer = 2 * (2 * 4 * attention + 2 * 3 * mlp)
    ends = 2 * (width * width * merged + width * text_width + text_width * text_width)
    # Patches, what is attended to, and the hidden states of what runs at once.
    return layer + ends + largest * (24 * width + 12 * vision.mlp_width)


class SeenPictures:
    """The pictures of all rows behind the tower; `vectors` merges and projects those of a row.

    waiting   where the decoder's rows wait: patches do so beside them

    A `with` block; what lies on disk is gone when it ends.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pictures: RowPictures,
        waiting: Activations,
        device: torch.device,
        budget: MemoryBudget,
    ) -> None:
        vision = checkpoint.config.vision
        assert vision is not None, "check_pictures lets no text-only model come here"
        self._checkpoint = checkpoint
        self._config = vision
        self._device = device
        self._budget = budget
        self._images = [image for row in pictures for image in row]
        self._first = [0]
        for row in pictures:
            self._first.append(self._first[-1] + len(row))
        sizes = [num_patches(vision, image) for image in self._images]
        self._patches, self._directory = waiting.beside(_FOLDER, sizes, vision.width)
        budget.held_for_speed(self._patches.release)
        self._ends: VisionModel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._patches.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    @torch.inference_mode()
    def run(self) -> None:
        """All pictures through all layers up to the feature layer."""
        ends = load_vision_ends(self._checkpoint, device=self._device, before=self._budget.check)
        for number, image in enumerate(self._images):
            self._budget.check()
            encoding = _begin(ends, image)
            compute_all([encoding.embedding()])
            self._patches.write(number, encoding.patches_TD.cpu())
        self._patches.advance(0)
        for layer in range(num_layers_used(self._config)):
            module = load_vision_layer(
                self._checkpoint, layer, device=self._device, before=self._budget.check
            )
            for number, image in enumerate(self._images):
                self._budget.check()
                encoding = _begin(ends, image)
                # A copy: the encoding changes it in place, and the row is not to be.
                encoding.go_on(self._patches.read(number).to(self._device, copy=True))
                compute_all([encoding.turning(), *encoding.layer_parts(module)])
                self._patches.write(number, encoding.patches_TD.cpu())
            del module
            self._patches.advance(layer + 1)
            self._patches.settle()
            self._patches.forget(layer)
        self._ends = ends

    @torch.inference_mode()
    def vectors(self, row: int) -> list[Tensor]:
        """Vectors (M, decoder width) of each picture of a row, on the CPU; after `run`."""
        assert self._ends is not None, "the pictures have not been run"
        found = []
        for number in range(self._first[row], self._first[row + 1]):
            encoding = _begin(self._ends, self._images[number])
            encoding.go_on(self._patches.read(number).to(self._device, copy=True))
            compute_all([encoding.merging()])
            found.append(encoding.vectors_MD.cpu())
        return found


def _begin(vision: VisionModel, image: EncodedImage) -> Encoding:
    _, height, width = image.pixels.shape

    def rows(top: int, stop: int) -> Tensor:
        return torch.from_numpy(normalized(image.pixels[:, top:stop]))

    return vision.begin(height, width, rows)
