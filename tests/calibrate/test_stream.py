"""Layer-by-layer runs: the same as the whole decoder, in any order of rows."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.budget import MemoryBudget, OverBudgetError
from halfbyte.calibrate.stream import TAPS, input_maxima, stream_layers
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats.measure import relative_error
from halfbyte.machine import Held
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import DecoderLayer, Step
from halfbyte.model.load import load_decoder, load_layer
from halfbyte.model.tiny import write_tiny_checkpoint
from tolerances import STREAMED_LAYERS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from more threads, and machines are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_checkpoint(directory, layers=3, dialect="mistral-fp8")
    return Checkpoint.open(directory)


def some_rows(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 512, (n,), generator=generator) for n in (7, 1, 40, 16, 7)]


def collect(
    checkpoint: Checkpoint, rows: list[torch.Tensor], *, prefetch: bool = False
) -> list[dict[str, float]]:
    return [
        {tap: float(magnitude) for tap, magnitude in statistics.observed.items()}
        for statistics in stream_layers(checkpoint, rows, prefetch=prefetch)
    ]


def test_row_order_does_not_change_a_bit(tiny: Checkpoint) -> None:
    rows = some_rows()
    straight = collect(tiny, rows)
    for seed in range(3):
        shuffled = rows.copy()
        random.Random(seed).shuffle(shuffled)
        assert collect(tiny, shuffled) == straight
    assert [set(layer) for layer in straight] == [set(TAPS)] * 3


def test_more_rows_only_raise_maxima_and_repeats_change_nothing(tiny: Checkpoint) -> None:
    rows = some_rows()
    few, all_of_them = collect(tiny, rows[:2]), collect(tiny, rows)
    for fewer, more in zip(few, all_of_them, strict=True):
        assert all(fewer[tap] <= more[tap] for tap in TAPS)
    assert collect(tiny, rows + rows) == all_of_them


def test_prefetching_changes_nothing(tiny: Checkpoint) -> None:
    assert collect(tiny, some_rows(), prefetch=True) == collect(tiny, some_rows())


class Gauge:
    """Stands for the system: says that as much is held as it was told to."""

    def __init__(self) -> None:
        self.resident = 0

    def __call__(self) -> Held:
        return Held(self.resident, self.resident, self.resident, self.resident, 1)


def loads(
    monkeypatch: pytest.MonkeyPatch, before_load: Callable[[int], None] = lambda layer: None
) -> list[tuple[int, bool]]:
    """Fills with every layer that is loaded from now on, and whether it was prefetched."""
    seen: list[tuple[int, bool]] = []

    def watched(checkpoint: Checkpoint, layer: int, **options: Any) -> DecoderLayer:
        seen.append((layer, threading.current_thread() is not threading.main_thread()))
        before_load(layer)
        return load_layer(checkpoint, layer, **options)

    monkeypatch.setattr("halfbyte.calibrate.stream.load_layer", watched)
    return seen


def statistics_of(tiny: Checkpoint, **options: Any) -> list[dict[str, float]]:
    return [
        {tap: float(magnitude) for tap, magnitude in statistics.observed.items()}
        for statistics in stream_layers(tiny, some_rows(), **options)
    ]


def test_tight_memory_ends_prefetching_and_changes_nothing(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's rows use up what the second layer, being prefetched, needed."""
    straight = collect(tiny, some_rows())
    gauge = Gauge()
    budget = MemoryBudget(1 << 30, limit_data=False, measure=gauge)
    tokens = [row.numel() for row in some_rows()]
    activations = Activations(tokens, tiny.config.text.width, tmp_path)

    num_rows = 0

    def attend(starts: list[int]) -> DenseAttend:
        nonlocal num_rows
        num_rows += 1
        if num_rows == 2:
            gauge.resident = int(0.95 * (1 << 30))
        return DenseAttend(starts)

    monkeypatch.setattr("halfbyte.calibrate.stream.DenseAttend", attend)
    seen = loads(monkeypatch)
    options = {"budget": budget, "prefetch": True}
    assert statistics_of(tiny, activations=activations, **options) == straight
    assert seen == [(0, False), (1, True), (1, False), (2, False)]
    assert activations.read(0) is not activations.read(0), "rows are still in memory"
    activations.close()


def test_a_layer_that_is_being_prefetched_stops_for_want_of_room(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, gauge = collect(tiny, some_rows()), Gauge()
    budget = MemoryBudget(1 << 30, limit_data=False, measure=gauge)

    def tighten(layer: int) -> None:
        # Room for norms and scales, and for what rows take: they are asked for by no number.
        gauge.resident = int(0.92 * (1 << 30)) - 1000 if layer == 1 else 0

    seen = loads(monkeypatch, tighten)
    assert statistics_of(tiny, budget=budget, prefetch=True) == straight
    assert seen == [(0, False), (1, True), (1, False), (2, False)]


def test_a_refusal_of_the_system_costs_the_prefetched_layer_only(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = collect(tiny, some_rows())

    def refuse(layer: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    seen = loads(monkeypatch, refuse)
    assert collect(tiny, some_rows(), prefetch=True) == straight
    assert seen == [(0, False), (1, True), (1, False), (2, False)]


def test_an_error_of_a_prefetched_layer_is_no_reason_to_load_it_again(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_second(layer: int) -> None:
        if layer == 1:
            raise CheckpointError("shard 3 is damaged")

    seen = loads(monkeypatch, break_second)
    with pytest.raises(CheckpointError, match="shard 3"):
        collect(tiny, some_rows(), prefetch=True)
    assert seen == [(0, False), (1, True)]


def test_a_layer_without_room_is_refused_before_it_is_read(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge()
    gauge.resident = int(0.985 * (1 << 20))
    budget = MemoryBudget(1 << 20, limit_data=False, measure=gauge)
    with pytest.raises(OverBudgetError, match=r"--memory 0\.00 GiB"):
        list(stream_layers(tiny, some_rows(), budget=budget))


def test_streamed_layers_compute_what_the_decoder_computes(tiny: Checkpoint) -> None:
    row = some_rows()[2]
    activations = Activations([row.numel()], tiny.config.text.width)
    for _ in stream_layers(tiny, [row], activations=activations):
        pass
    decoder = load_decoder(tiny)
    step = Step(row, torch.arange(row.numel()), DenseAttend([0, row.numel()]))
    streamed = activations.read(0)
    normed = torch.nn.functional.rms_norm(
        streamed.float(), (streamed.shape[1],), decoder.norm_D.float(), tiny.config.text.norm_eps
    )
    logits = normed @ tiny.tensor("head.weight").float().T
    assert relative_error(decoder(step), logits) < STREAMED_LAYERS


def test_a_resumed_run_sees_the_same_statistics(tiny: Checkpoint, tmp_path: Path) -> None:
    rows = some_rows()
    tokens, width = [row.numel() for row in rows], tiny.config.text.width
    whole = list(stream_layers(tiny, rows))
    killed = Activations(tokens, width, tmp_path)
    next(stream_layers(tiny, rows, activations=killed))  # the first layer is done
    killed.close()
    stored = Activations(tokens, width, tmp_path, in_memory=False)
    stored.resume(1)
    for before, after in zip(whole[1:], stream_layers(tiny, rows, activations=stored), strict=True):
        assert after.layer == before.layer
        assert {k: float(v) for k, v in after.observed.items()} == {
            k: float(v) for k, v in before.observed.items()
        }
    stored.close()


def test_siblings_read_one_input(tiny: Checkpoint) -> None:
    maxima = input_maxima(tiny, some_rows())
    assert list(maxima)[:2] == ["decoder.0.attention.q", "decoder.0.attention.k"]
    assert len(maxima) == 21
    for layer in range(3):
        q, k, v = (maxima[f"decoder.{layer}.attention.{x}"] for x in "qkv")
        assert q == k == v
        assert maxima[f"decoder.{layer}.mlp.gate"] == maxima[f"decoder.{layer}.mlp.up"]


def test_broken_weights_are_named_by_their_layer(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "whole", layers=2)
    whole = Checkpoint.open(tmp_path / "whole")
    shapes = {whole.foreign(name): (whole.shape(name), whole.dtype(name)) for name in whole.names()}
    with ShardWriter(tmp_path / "broken", shapes) as writer:
        for name in whole.names():
            tensor = whole.tensor(name)
            if name == "decoder.1.attention.o.weight":
                tensor[0, 0] = torch.nan
            writer.add(whole.foreign(name), tensor)
        writer.copy_file(tmp_path / "whole" / "config.json")
        writer.finish()
    with pytest.raises(FormatError, match=r"decoder\.1: .* holds NaN"):
        list(stream_layers(Checkpoint.open(tmp_path / "broken"), some_rows()))
