"""Image layout of checkpoints with a tokenizer.json: what their Pixtral processor's files say.

The tokens are those of `images.ImageLayout`; which they are, the patches and the largest side stand
in processor_config.json and, in older releases, preprocessor_config.json. What would change the
pixels is compared with what `images.to_pixels` does, never ignored.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.chat.images import ImageLayout
from halfbyte.chat.vocabulary import read_json
from halfbyte.config import VisionConfig
from halfbyte.errors import CheckpointError
from halfbyte.files import is_there
from halfbyte.log import logger
from halfbyte.pictures import MAX_SIDE, MEAN, STD

_TOKENS = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
# What the processor does unless its file says otherwise; other values are not implemented.
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
    "image_mean": MEAN.tolist(),
    "image_std": STD.tolist(),
}


def _written(values: NDArray[np.float32]) -> list[float]:
    """Numbers as people write them: the shortest that is the same float32."""
    return [float(str(value)) for value in values]


def processor_layout(directory: Path, control: Mapping[str, int]) -> ImageLayout | None:
    """The layout of a checkpoint's images, None if no Pixtral processor is there.

    control  name -> id of the tokenizer's control tokens

    Raises CheckpointError for image tokens that are no control tokens, and for settings that our
    pixels do not follow. Sides are cut to whole pixels, as the processor does (decision 0030).
    """
    path = directory / "processor_config.json"
    if not is_there(path):
        return None
    processor = read_json(path)
    kind = processor.get("processor_class", "PixtralProcessor")
    if kind != "PixtralProcessor":
        logger.warning("%s: %s is not implemented; images are refused", path, kind)
        return None
    older = directory / "preprocessor_config.json"
    images = processor.get("image_processor") or (read_json(older) if is_there(older) else {})
    if not isinstance(images, Mapping):
        raise CheckpointError(f"{path}: image_processor is {str(images)[:80]}, not an object")
    _check_pixels(images, path)
    names = {key: str(processor.get(key, default)) for key, default in _TOKENS.items()}
    for key, name in names.items():
        if name not in control:
            raise CheckpointError(f"{path}: {key} {name!r} is not a control token of the tokenizer")
    size = images.get("size", {})
    side = size.get("longest_edge", 1024) if isinstance(size, Mapping) else size
    numbers = (processor.get("patch_size", 16), processor.get("spatial_merge_size", 1), side)
    if not all(type(value) is int and 0 < value <= MAX_SIDE for value in numbers):
        raise CheckpointError(
            f"{path}: patches of {numbers[0]!r} times {numbers[1]!r} and sides of {side!r} pixels; "
            f"expected whole numbers from 1 to {MAX_SIDE}"
        )
    patch = numbers[0] * numbers[1]
    return ImageLayout(
        patch_pixels=patch,
        max_side_pixels=side,
        image_token_id=control[names["image_token"]],
        break_token_id=control[names["image_break_token"]],
        end_token_id=control[names["image_end_token"]],
        whole_side=math.floor,
    )


def processor_files(vision: VisionConfig, *, with_tokens: bool) -> dict[str, dict[str, Any]]:
    """File name -> content of a Pixtral processor that does as we do, for servers that ask for one.

    with_tokens  the checkpoint's image tokens are Tekken's, which processor_config.json says then
    """
    made: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": _written(MEAN),
            "image_std": _written(STD),
            "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": vision.image_size},
        }
    }
    if with_tokens:
        # The processor takes its patches from here, not from the file above, or 16 and no merging.
        made["processor_config.json"] = {
            "processor_class": "PixtralProcessor",
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            **_TOKENS,
        }
    return made


def _check_pixels(images: Mapping[str, Any], path: Path) -> None:
    for name, expected in _FIXED.items():
        found = images.get(name)
        if found is None:
            continue
        try:
            is_same = np.shape(found) == np.shape(expected) and np.allclose(
                found, expected, rtol=0.0, atol=1e-6
            )
        except (TypeError, ValueError):  # a text, or a list of another length
            is_same = False
        if not is_same:
            raise CheckpointError(f"{path}: {name} = {found!r}; only {expected!r} is implemented")
