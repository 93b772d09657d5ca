"""The bounded exactness class as one assertion."""

from torch import Tensor

import tolerances


def relative(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is right; both in float64."""
    difference = (result.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-300))


def assert_bounded(result: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`result` errs at most twice as much as plain torch, or by one rounding step.

    result  what is tested; its dtype sets the floor
    plain   the same computed by torch in result's dtype
    exact   the same in float64
    """
    assert result.shape == exact.shape, f"{tuple(result.shape)} instead of {tuple(exact.shape)}"
    floor = tolerances.HALF_STEP[str(result.dtype).removeprefix("torch.")]
    bound = tolerances.TIMES_PLAIN * relative(plain, exact) + floor
    error = relative(result, exact)
    assert error <= bound, f"relative error {error:.3g}, bound {bound:.3g}"
