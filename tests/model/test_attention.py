"""Dense attention: rotation, causality, and keys and values as a cache would store them."""

import torch

import tolerances
from bounded import assert_bounded, relative
from halfbyte.kernels.dispatch import Rotation
from halfbyte.model.attention import DenseAttend

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 9, 6, 2, 16


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fused = torch.randn(TOKENS, HEADS + 2 * KV_HEADS, HEAD_DIM).to(torch.bfloat16)
    q, k, v = torch.split(fused, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    return q, k, v


def no_rotation() -> Rotation:
    shape = (TOKENS, HEAD_DIM // 2)
    return Rotation(torch.ones(shape), torch.zeros(shape), None)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention written out in the dtype of its arguments."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("jnh,cnh->njc", q, k) * HEAD_DIM**-0.5
    hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("njc,cnh->jnh", weights, v)


def test_a_token_sees_itself_and_what_came_before() -> None:
    q, k, v = inputs()
    result = DenseAttend([0, TOKENS])(0, q, k, v, no_rotation())
    exact = attention(q.double(), k.double(), v.double())
    assert_bounded(result, attention(q, k, v), exact)


def test_keys_and_values_are_read_as_stored() -> None:
    q, k, v = inputs()
    scales = [(9.0, 9.0), (0.01, 0.02)]
    result = DenseAttend([0, TOKENS], scales)(1, q, k, v, no_rotation())

    def stored(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale

    exact = attention(q.double(), stored(k, 0.01), stored(v, 0.02))
    plain = attention(q, stored(k, 0.01).bfloat16(), stored(v, 0.02).bfloat16())
    assert_bounded(result, plain, exact)


def test_positions_enter_through_the_rotation() -> None:
    """Scores depend on the distance only: shifting all angles changes nothing but rounding."""
    q, k, v = inputs()
    frequency = torch.tensor([0.5**pair for pair in range(HEAD_DIM // 2)])
    results = []
    for shift in (0, 100):
        angle = (torch.arange(TOKENS)[:, None] + shift) * frequency
        rotation = Rotation(angle.cos(), angle.sin(), None)
        results.append(DenseAttend([0, TOKENS])(0, q, k, v, rotation))
    four_roundings = 4 * tolerances.HALF_STEP["bfloat16"]  # of q and k, in either run
    assert relative(results[1], results[0]) < four_roundings
    plain = DenseAttend([0, TOKENS])(0, q, k, v, no_rotation())
    assert relative(results[0], plain) > four_roundings
