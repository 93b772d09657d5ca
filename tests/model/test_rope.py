"""YaRN frequencies, attention factor and query scale against the published formulas in float64."""

import math
from dataclasses import replace

import pytest
import torch

import tolerances
from halfbyte.config import ModelConfig, RopeConfig
from halfbyte.model.rope import RotaryTable, frequencies
from halfbyte.model.tiny import tiny_config

HEAD = 128
# The big model's public values: factor 64 over 4096 positions.
YARN = RopeConfig(
    theta=1e6,
    kind="yarn",
    factor=64.0,
    original_max_positions=4096,
    beta_fast=4.0,
    beta_slow=1.0,
    llama_4_scaling_beta=0.1,
)
POSITIONS = (0, 1, 4095, 4096, 65535, 65536, 262143)


def published_frequency(rope: RopeConfig, pair: int) -> float:
    """YaRN paper, section 3.2, one number at a time."""

    def dimension(rotations: float) -> float:
        wave = rope.original_max_positions / (rotations * 2 * math.pi)
        return HEAD * math.log(wave) / (2 * math.log(rope.theta))

    low, high = math.floor(dimension(rope.beta_fast)), math.ceil(dimension(rope.beta_slow))
    slow = min(max((pair - max(low, 0)) / (min(high, HEAD - 1) - max(low, 0)), 0), 1)
    plain: float = rope.theta ** (-2 * pair / HEAD)
    return plain / rope.factor * slow + plain * (1 - slow)


def config_with(rope: RopeConfig) -> ModelConfig:
    tiny = tiny_config()
    return replace(tiny, text=replace(tiny.text, rope=rope, head_dim=HEAD))


def test_frequencies_follow_the_paper() -> None:
    expected = [published_frequency(YARN, pair) for pair in range(HEAD // 2)]
    assert frequencies(YARN, HEAD).tolist() == pytest.approx(expected, rel=1e-13)
    assert frequencies(YARN, HEAD)[0] == 1.0
    assert float(frequencies(YARN, HEAD)[-1]) == pytest.approx(1e6 ** (-126 / 128) / 64, rel=1e-13)


def test_without_scaling_frequencies_are_plain() -> None:
    expected = [1e5 ** (-2 * pair / 64) for pair in range(32)]
    assert frequencies(RopeConfig(theta=1e5), 64).tolist() == pytest.approx(expected, rel=1e-13)
    assert RopeConfig(theta=1e5).attention_factor == 1.0


@pytest.mark.parametrize(
    ("mscale", "all_dim", "expected"),
    [
        (1.0, 0.0, 1 + 0.1 * math.log(64)),
        (1.0, 1.0, 1.0),
        (0.5, 1.0, (1 + 0.05 * math.log(64)) / (1 + 0.1 * math.log(64))),
    ],
)
def test_attention_factor(mscale: float, all_dim: float, expected: float) -> None:
    rope = replace(YARN, mscale=mscale, mscale_all_dim=all_dim)
    assert rope.attention_factor == pytest.approx(expected, rel=1e-15)


def test_angles_at_far_positions_do_not_lose_their_digits() -> None:
    """An f32 product of position and frequency would be off by 0.016 rad at 256k."""
    rotation = RotaryTable(config_with(YARN).text).at(torch.tensor(POSITIONS))
    factor = 1 + 0.1 * math.log(64)
    for row, position in enumerate(POSITIONS):
        for pair in range(HEAD // 2):
            angle = position * published_frequency(YARN, pair)
            for table, function in ((rotation.cos_TH2, math.cos), (rotation.sin_TH2, math.sin)):
                error = abs(float(table[row, pair]) - factor * function(angle))
                # The float64 angle itself is good to position * 2**-52.
                assert error <= factor * (tolerances.ANGLE + position * 2.0**-51)


def test_query_scale_steps_with_the_original_context() -> None:
    rotation = RotaryTable(config_with(YARN).text).at(torch.tensor(POSITIONS))
    expected = [1 + 0.1 * math.log(1 + position // 4096) for position in POSITIONS]
    assert rotation.query_scale_T is not None
    assert rotation.query_scale_T.tolist() == pytest.approx(expected, rel=2.0**-23)
    assert rotation.query_scale_T[:3].tolist() == [1.0, 1.0, 1.0]


def test_no_query_scale_without_its_slope() -> None:
    table = RotaryTable(config_with(RopeConfig(theta=1e5, original_max_positions=8192)).text)
    assert table.at(torch.tensor([9000])).query_scale_T is None
