"""What is remembered of each input of a linear: maxima, squares, products of every two.

`stream` shows every tensor that passes a tap point; `quantize.layer` weighs errors with the sums.
Unlike the observers' maxima, sums depend on the order of their parts in the last bits: rows are run
one by one in a fixed order.

Shapes: T tokens, I inputs.
"""

from typing import Literal

import torch
from torch import Tensor

# What is wanted of a tap point: one number an input, or one for every two of them as well.
Want = Literal["squares", "products"]


class InputSums:
    """Sums over the tokens that passed one tap point, on the device where they passed.

    maxima_I     f32, largest magnitudes
    squares_I    f64, sums of squares
    products_II  f32, sum of x x^T; None unless wanted
    """

    def __init__(self, width: int, want: Want, device: torch.device) -> None:
        self.maxima_I = torch.zeros(width, device=device)
        self.squares_I = torch.zeros(width, dtype=torch.float64, device=device)
        self.products_II: Tensor | None = None
        if want == "products":
            self.products_II = torch.zeros((width, width), device=device)

    def update(self, x_TI: Tensor) -> None:
        """Add the sums over some tokens; `x_TI` is not modified and not kept."""
        wide_TI = x_TI.to(torch.float32)
        torch.maximum(self.maxima_I, wide_TI.abs().amax(0), out=self.maxima_I)
        self.squares_I += wide_TI.square().sum(0, dtype=torch.float64)
        if self.products_II is not None:
            self.products_II.addmm_(wide_TI.T, wide_TI)

    @torch.inference_mode()  # as layers run, whose tensors cannot be changed outside of it
    def divide(self, factors_I: Tensor) -> None:
        """Become the sums of x / factors, in place."""
        self.maxima_I /= factors_I
        self.squares_I /= factors_I.double().square()
        if self.products_II is not None:
            self.products_II /= factors_I
            self.products_II /= factors_I[:, None]
