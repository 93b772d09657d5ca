"""Statistics of text and image rows: together they are what one pass over all rows gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.calibrate.blend import load_blend
from halfbyte.calibrate.draw import draw
from halfbyte.calibrate.kinds import KINDS, TapKinds
from halfbyte.calibrate.moments import InputSums, Want
from halfbyte.calibrate.observers import AmaxObserver, MagnitudeCounts
from halfbyte.calibrate.stream import READERS, TAPS, stream_layers
from halfbyte.calibrate.tokens import as_rows
from halfbyte.checkpoint.reader import Checkpoint
from seeing_model import write_seeing


def values_of(seed: int, tokens: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(4 * torch.randn(tokens, width, generator=generator))
    return (torch.randn(tokens, width, generator=generator) * spread).to(torch.bfloat16)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**31))
def test_both_kinds_join_to_all_rows(seed: int, tokens: int, width: int, mask_seed: int) -> None:
    x_TI = values_of(seed, tokens, width)
    chance = torch.rand(tokens, generator=torch.Generator().manual_seed(mask_seed))
    is_image_T = chance < 0.4
    kinds, whole, sums = TapKinds(), AmaxObserver(), InputSums(width, "squares", x_TI.device)
    for start in range(0, tokens, 7):
        part = slice(start, start + 7)
        kinds.update(x_TI[part], is_image_T[part], "products")
        whole.update(x_TI[part])
        sums.update(x_TI[part])
    largest = kinds.largest()
    assert max(map(float, largest.values())) == float(whole.result())
    joined = sum(
        (seen.sums.squares_I for seen in kinds.seen.values() if seen.sums is not None),
        torch.zeros(width, dtype=torch.float64),
    )
    assert torch.allclose(joined, sums.squares_I, rtol=1e-12, atol=0)
    for limit in (0.0, 0.1, 1.0, float(whole.result())):
        beyond = {
            kind: x_TI[is_image_T == (kind == "image")].double().abs() > limit for kind in KINDS
        }
        for kind, hit in beyond.items():
            share = kinds.seen[kind].beyond(limit)
            rows = max(hit.shape[0], 1)
            assert share.values == pytest.approx(int(hit.sum()) / max(hit.numel(), 1))
            assert share.tokens == pytest.approx(int(hit.any(1).sum()) / rows)


@settings(max_examples=20)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=50), st.floats(0, 1e5))
def test_counts_say_what_lies_beyond_any_limit(values: list[float], limit: float) -> None:
    x = torch.tensor(values, dtype=torch.bfloat16)
    counts = MagnitudeCounts()
    counts.update(x[::2])
    counts.update(x[1::2])
    assert float(counts.largest()) == float(x.abs().max())
    assert counts.share_above(limit) == pytest.approx(
        int((x.double().abs() > limit).sum()) / len(values)
    )


def test_nothing_and_nan_are_told_apart() -> None:
    counts = MagnitudeCounts()
    assert float(counts.largest()) == 0 and counts.share_above(0.0) == 0
    counts.update(torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
    assert counts.largest().isnan() and counts.share_above(1e30) == 0.5


def test_a_run_tells_kinds_apart_and_observes_what_it_did_before(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_seeing(tmp_path / "model", layers=2))
    blend = replace(load_blend("pictures"), samples=6, tokens_per_sample=64)
    data = draw(blend, tmp_path / "model")
    rows = as_rows(data)
    is_image = sum(image.num_tokens for images in data.pictures for image in images)
    for statistics in stream_layers(checkpoint, rows, pictures=data.pictures):
        assert set(statistics.kinds) == set(TAPS)
        for tap, kinds in statistics.kinds.items():
            largest = kinds.largest()
            assert max(map(float, largest.values())) == float(statistics.observed[tap])
            counted = {kind: kinds.seen[kind].tokens.total for kind in KINDS}
            assert sum(counted.values()) == data.num_tokens
            # Breaks and ends of pictures are embeddings, as text is.
            assert 0 < counted["image"] < is_image
        assert all(not kinds.seen["image"].sums for kinds in statistics.kinds.values())
    wanted: dict[str, Want] = dict.fromkeys(READERS, "squares")
    runs = stream_layers(checkpoint, rows, pictures=data.pictures, wants=lambda layer: wanted)
    for statistics in runs:
        for tap in READERS:
            seen = statistics.kinds[tap].seen.values()
            squares = [one.sums.squares_I for one in seen if one.sums is not None]
            assert len(squares) == 2
            joined = squares[0] + squares[1]
            assert torch.allclose(joined, statistics.sums[tap].squares_I, rtol=1e-9)
    assert all(not one.kinds for one in stream_layers(checkpoint, rows))
