"""Images of running requests: encoded when their tokens come up, kept while they may be needed.

Vectors are kept by the digest of the pixels, so several answers to one prompt, and the chunks of a
long one, encode an image once.

Shapes: I image tokens of a step, D decoder width, M vectors of an image.
"""

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.engine.request import GenerationRequest, ImageInput
from halfbyte.engine.scheduler import Work
from halfbyte.errors import RequestError
from halfbyte.model.vision import VisionModel

# Vectors beyond these bytes are forgotten, the longest unused first; encoding again is always
# possible, as a request keeps its pixels.
KEPT_BYTES = 256 * 2**20


class Placement(NamedTuple):
    """Which rows of a step's embeddings are replaced, and by what; only rank 0 has the vectors."""

    rows_I: Tensor
    vectors_ID: Tensor | None


class ImageEncoder:
    """The vision model and the vectors of recent images."""

    def __init__(self, vision: VisionModel, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._vision = vision
        self._image_token_id = vision.config.image_token_id
        self._kept_bytes = kept_bytes
        self._vectors: OrderedDict[bytes, Tensor] = OrderedDict()

    def validate(self, request: GenerationRequest) -> None:
        """Raise RequestError if an image and its tokens in the prompt do not fit together."""
        end = 0
        for index, image in enumerate(request.images):
            param = f"images[{index}]"
            if image.offset < end or image.offset + image.num_tokens > len(
                request.prompt_token_ids
            ):
                raise RequestError(
                    f"{param} claims tokens {image.offset} to {image.offset + image.num_tokens}; "
                    f"{end} to {len(request.prompt_token_ids)} are free",
                    param=param,
                    code="invalid_image",
                )
            end = image.offset + image.num_tokens
            found = request.prompt_token_ids[image.offset : end].count(self._image_token_id)
            wanted = self._vision.num_vectors(*image.pixels.shape[1:])
            if found != wanted or found == 0:
                raise RequestError(
                    f"{param} of {image.pixels.shape[2]}x{image.pixels.shape[1]} pixels has "
                    f"{wanted} patches; the prompt holds {found} image tokens for it",
                    param=param,
                    code="invalid_image",
                )

    def place(self, works: SequenceOf[Work]) -> Placement | None:
        """Vectors for the image tokens among the step's tokens; None if there are none.

        Example: tokens 0-9, an image at 2 with tokens [IMG IMG BREAK IMG IMG END]. A work on
        tokens 4-9 replaces rows 1 and 2 (positions 5 and 6) by the image's vectors 2 and 3.
        """
        rows: list[int] = []
        vectors: list[Tensor] = []
        first_row = 0
        for work in works:
            for image in work.sequence.request.images:
                start = max(work.start, image.offset)
                stop = min(work.start + work.count, image.offset + image.num_tokens)
                token_ids = work.sequence.token_ids
                positions = [p for p in range(start, stop) if token_ids[p] == self._image_token_id]
                if not positions:
                    continue
                skipped = token_ids[image.offset : start].count(self._image_token_id)
                rows += [first_row + position - work.start for position in positions]
                vectors.append(self._of(image)[skipped : skipped + len(positions)])
            first_row += work.num_rows
        if not rows:
            return None
        vectors_ID = torch.cat(vectors)
        return Placement(torch.tensor(rows, device=vectors_ID.device), vectors_ID)

    def _of(self, image: ImageInput) -> Tensor:
        vectors_MD = self._vectors.get(image.digest)
        if vectors_MD is None:
            (vectors_MD,) = self._vision([torch.from_numpy(image.pixels)])
            self._vectors[image.digest] = vectors_MD
        self._vectors.move_to_end(image.digest)
        while len(self._vectors) > 1 and self.num_bytes > self._kept_bytes:
            self._vectors.popitem(last=False)
        return vectors_MD

    @property
    def num_bytes(self) -> int:
        """Of the vectors kept now."""
        return sum(vectors.nbytes for vectors in self._vectors.values())
