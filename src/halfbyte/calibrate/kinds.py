"""What passes a tap point in rows of text and in rows of pictures, apart.

A row of a picture is a token whose embedding was a vector of the tower; all others, breaks between
a picture's rows included, are text. Collected only where the calibration rows show pictures.
`quantize.clipping` asks what a scale would cut off of either.

Shapes: T tokens, I inputs.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from halfbyte.calibrate.moments import InputSums, Want
from halfbyte.calibrate.observers import MagnitudeCounts

Kind = Literal["text", "image"]
KINDS: tuple[Kind, ...] = ("text", "image")


class Share(NamedTuple):
    """Shares beyond a limit, of all values and of tokens that hold any such value."""

    tokens: float
    values: float


class SeenOfKind:
    """Magnitudes that passed one tap point in rows of one kind, and sums where they are wanted."""

    def __init__(self) -> None:
        self.values = MagnitudeCounts()
        self.tokens = MagnitudeCounts()  # of each token its largest
        self.sums: InputSums | None = None

    def update(self, x_TI: Tensor, want: Want | None) -> None:
        """Count some tokens; `x_TI` is not modified and not kept.

        want  what the method sums up here. Of one kind it is maxima and squares: products of all
              rows together are what methods use, and large
        """
        if x_TI.shape[0] == 0:
            return
        self.values.update(x_TI)
        self.tokens.update(x_TI.abs().amax(1))
        if want is not None:
            if self.sums is None:
                self.sums = InputSums(x_TI.shape[1], "squares", x_TI.device)
            self.sums.update(x_TI)

    def beyond(self, limit: float) -> Share:
        """The shares of tokens and of values with a magnitude above `limit`."""
        return Share(self.tokens.share_above(limit), self.values.share_above(limit))


class TapKinds:
    """One tap point, text and image rows apart."""

    def __init__(self) -> None:
        self.seen: Mapping[Kind, SeenOfKind] = {kind: SeenOfKind() for kind in KINDS}

    def update(self, x: Tensor, is_image_T: Tensor | None, want: Want | None = None) -> None:
        """Count the tokens of one calibration row by their kind.

        is_image_T  which of them show a picture; None for none
        """
        x_TI = x.flatten(1)
        if is_image_T is None:
            self.seen["text"].update(x_TI, want)
            return
        is_image_T = is_image_T.to(x.device)
        self.seen["text"].update(x_TI[~is_image_T], want)
        self.seen["image"].update(x_TI[is_image_T], want)

    def largest(self) -> Mapping[Kind, Tensor]:
        """The largest magnitude of each kind, bf16 0-d; 0 where there was none."""
        return {kind: seen.values.largest() for kind, seen in self.seen.items()}
