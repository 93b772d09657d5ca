"""Images of running requests: encoded when their tokens come up, kept while they may be needed.

Vectors are kept by the digest of the pixels, so several answers to one prompt, and the chunks of a
long one, encode an image once. An image that is encoded in parts (`slices`) is kept, too, as far as
it is: whoever needs it next goes on with it.

Shapes: I image tokens of a step, D decoder width, M vectors of an image.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.engine.plan.sequence import Work
from halfbyte.engine.request import GenerationRequest, ImageInput
from halfbyte.engine.walk import Costs, Walk
from halfbyte.errors import RequestError
from halfbyte.model.vision import Encoding, VisionModel
from halfbyte.pictures import normalized

# Vectors beyond these bytes are forgotten, the longest unused first; encoding again is always
# possible, as a request keeps its pixels. On a CPU they are the server's own memory, of which a
# request may leave little behind; one picture of the largest model is 74 MB.
KEPT_BYTES = 256 * 2**20
KEPT_CPU_BYTES = 64 * 2**20


class Placement(NamedTuple):
    """Which rows of a step's embeddings are replaced (int64 indices), and by which vectors."""

    rows_I: NDArray[np.int64]
    vectors_ID: Tensor


class _Shown(NamedTuple):
    """Rows of a step that show neighbouring vectors of one image, from the first on."""

    image: ImageInput
    rows: SequenceOf[int]
    first_vector: int


class _Begun(NamedTuple):
    digest: bytes
    encoding: Encoding
    walk: Walk


class ImageEncoder:
    """The vision model, and the vectors of the images it encoded last."""

    def __init__(self, vision: VisionModel, *, kept_bytes: int | None = None) -> None:
        """Keep up to `kept_bytes` of vectors; None is what suits the device."""
        self._vision = vision
        self._image_token_id = vision.config.image_token_id
        if kept_bytes is None:
            kept_bytes = KEPT_CPU_BYTES if vision.patch.device.type == "cpu" else KEPT_BYTES
        self._kept_bytes = kept_bytes
        self._vectors: OrderedDict[bytes, Tensor] = OrderedDict()
        # The one image that is encoded as far as it is.
        self._begun: _Begun | None = None
        self._costs = Costs()

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
        placing = self.begin(works)
        placing.advance(math.inf)
        return placing.placement()

    def begin(self, works: SequenceOf[Work], *, num_ahead: int = 0) -> "Placing":
        """Begin what `place` does, to be done in as many calls as it takes.

        num_ahead  tokens behind each work whose images are encoded with it, as the next who asks
                   for them could not wait
        """
        shown = list(self._shown(works))
        for work in works:
            first, end = work.start + work.count, work.start + work.count + num_ahead
            for image in work.sequence.request.images:
                if image.offset < end and first < image.offset + image.num_tokens:
                    shown.append(_Shown(image, (), 0))
        return Placing(self, shown)

    @torch.inference_mode()
    def vectors_of(self, image: ImageInput, deadline: float) -> Tensor | None:
        """Vectors (M, D) of an image; None if they cannot be encoded by then.

        deadline  by `time.perf_counter`; a little is done in any case
        """
        vectors_MD = self._vectors.get(image.digest)
        if vectors_MD is None:
            begun = self._begin(image)
            if not begun.walk.advance(deadline):
                return None
            vectors_MD, self._begun = begun.encoding.vectors_MD, None
            self._vectors[image.digest] = vectors_MD
        self._vectors.move_to_end(image.digest)
        while len(self._vectors) > 1 and self.num_bytes > self._kept_bytes:
            self._vectors.popitem(last=False)
        return vectors_MD

    def release(self, waiting: Iterable[GenerationRequest]) -> None:
        """Drop an image that is encoded in part, if none of these requests shows it."""
        begun = self._begun
        if begun is not None and not any(
            image.digest == begun.digest for request in waiting for image in request.images
        ):
            self._begun = None

    def has(self, image: ImageInput) -> bool:
        """Whether the vectors of this image are kept now."""
        return image.digest in self._vectors

    @property
    def num_bytes(self) -> int:
        """Bytes of the image vectors that are kept now."""
        return sum(vectors.nbytes for vectors in self._vectors.values())

    @property
    def has_begun(self) -> bool:
        """Whether the encoder has computed an image in part."""
        return self._begun is not None

    def _begin(self, image: ImageInput) -> _Begun:
        begun = self._begun
        if begun is None or begun.digest != image.digest:

            def rows(top: int, stop: int) -> Tensor:
                return torch.from_numpy(normalized(image.pixels[:, top:stop]))

            _, height, width = image.pixels.shape
            encoding = self._vision.begin(height, width, rows)
            begun = _Begun(image.digest, encoding, Walk(encoding.parts(), self._costs))
            self._begun = begun
        return begun

    def _shown(self, works: SequenceOf[Work]) -> Iterator[_Shown]:
        first_row = 0
        for work in works:
            for image in work.sequence.request.images:
                start = max(work.start, image.offset)
                stop = min(work.start + work.count, image.offset + image.num_tokens)
                token_ids = work.sequence.token_ids
                positions = [p for p in range(start, stop) if token_ids[p] == self._image_token_id]
                if positions:
                    skipped = token_ids[image.offset : start].count(self._image_token_id)
                    rows = [first_row + position - work.start for position in positions]
                    yield _Shown(image, rows, skipped)
            first_row += work.num_rows


class Placing:
    """The images of a step, encoded in parts before its rows are computed."""

    def __init__(self, encoder: ImageEncoder, shown: SequenceOf[_Shown]) -> None:
        self._encoder = encoder
        self._shown = shown
        self._vectors: list[Tensor] = []

    def advance(self, deadline: float) -> bool:
        """Encode until about then, one unit at least; True once all vectors are there.

        deadline  by `time.perf_counter`
        """
        while len(self._vectors) < len(self._shown):
            image, rows, first = self._shown[len(self._vectors)]
            vectors_MD = self._encoder.vectors_of(image, deadline)
            if vectors_MD is None:
                return False
            self._vectors.append(vectors_MD[first : first + len(rows)])
        return True

    @property
    def has_missing(self) -> bool:
        """Whether vectors that the step needs are still to be computed."""
        return any(not self._encoder.has(one.image) for one in self._shown)

    def placement(self) -> Placement | None:
        """Rows and their vectors once `advance` returned True; None without image tokens."""
        rows = [row for one in self._shown for row in one.rows]
        if not rows:
            return None
        return Placement(np.array(rows, dtype=np.int64), torch.cat(self._vectors))
