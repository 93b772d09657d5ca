"""The bounds of sampling parameters: what lies on them is taken, what lies beyond is named."""

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.engine.request import SamplingParams
from halfbyte.errors import RequestError


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [
        ("max_tokens", [1, 10**9], [0, -1]),
        ("temperature", [0.0, 100.0], [-0.01, 100.01]),
        ("top_p", [0.01, 1.0], [-0.01, 0.0, 1.01]),
        ("top_k", [0, 10**9], [-1]),
        ("min_p", [0.0, 1.0], [-0.01, 1.01]),
        ("presence_penalty", [-2.0, 2.0], [-2.01, 2.01]),
        ("frequency_penalty", [-2.0, 2.0], [-2.01, 2.01]),
        ("repetition_penalty", [0.01, 100.0], [0.009, 100.01]),
        ("seed", [-(2**63), 0, 2**64 - 1], [-(2**63) - 1, 2**64]),
        ("logprobs", [0, 20], [-1, 10**6]),
        ("prompt_logprobs", [0, 20], [-1, 10**6]),
        ("min_tokens", [0, 10**6], [-1]),
    ],
)
def test_sampling_parameters_have_bounds(name: str, within: list[Any], beyond: list[Any]) -> None:
    for value in within:
        replace(SamplingParams(), **{name: value}).validate(1000)
    for value in beyond:
        with pytest.raises(RequestError, match=name) as caught:
            replace(SamplingParams(), **{name: value}).validate(1000)
        assert caught.value.param == name
