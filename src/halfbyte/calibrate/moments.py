"""What is remembered of each input of a linear: maxima, squares, products of every two.

`stream` shows every tensor that passes a tap point; `quantize.layer` weighs errors with the sums.
Unlike the observers' maxima, sums depend on the order of their parts in the last bits: rows are run
one by one in a fixed order.

Shapes: T tokens, I inputs.
"""

from typing import Literal

import torch
from torch import Tensor

# Rows of a block of products: only blocks on and above the diagonal are computed.
_BLOCK_ROWS = 2048

# What is wanted of a tap point: one number an input, or one for every two of them as well.
Want = Literal["squares", "products"]


class InputSums:
    """Sums over the tokens that passed one tap point, on the device where they passed.

    maxima_I     f32, largest magnitudes
    squares_I    f64, sums of squares
    products_II  f32, blocks of the sum of x x^T on and above its diagonal; None unless wanted
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
            # Matrix units multiply bf16 exactly: the product of two has room in an f32.
            is_exact = x_TI.is_cuda and x_TI.dtype is torch.bfloat16
            _add_products(self.products_II, x_TI if is_exact else wide_TI)

    @torch.inference_mode()  # as `divide`
    def take_products(self) -> Tensor:
        """The products of every two inputs (I, I), whole; they are forgotten here."""
        assert self.products_II is not None
        products_II, self.products_II = self.products_II, None
        for start in range(0, products_II.shape[0], _BLOCK_ROWS):
            stop = start + _BLOCK_ROWS
            products_II[stop:, start:stop] = products_II[start:stop, stop:].T
        return products_II

    @torch.inference_mode()  # as layers run, whose tensors cannot be changed outside of it
    def divide(self, factors_I: Tensor) -> None:
        """Become the sums of x / factors, in place."""
        self.maxima_I /= factors_I
        self.squares_I /= factors_I.double().square()
        if self.products_II is not None:
            self.products_II /= factors_I
            self.products_II /= factors_I[:, None]


def _add_products(products_II: Tensor, x_TI: Tensor) -> None:
    """Add x^T x to the blocks on and above the diagonal; x is f32, or bf16 on a GPU."""
    for start in range(0, products_II.shape[0], _BLOCK_ROWS):
        block_TB, rest_TI = x_TI[:, start : start + _BLOCK_ROWS], x_TI[:, start:]
        sums_BI = products_II[start : start + _BLOCK_ROWS, start:]
        if x_TI.dtype is torch.bfloat16:
            sums_BI += torch.mm(block_TB.T, rest_TI, out_dtype=torch.float32)
        else:
            sums_BI.addmm_(block_TB.T, rest_TI)
