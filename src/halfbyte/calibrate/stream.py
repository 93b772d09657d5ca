"""Runs calibration rows through a decoder, one layer in memory at a time.

Activations are kept between layers; every layer sees what unquantized layers before it made. Rows
are run one by one, without padding, so that results depend neither on their order nor on any batch
size. Called by `quantize.pipeline`.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.budget import MemoryBudget, is_refusal
from halfbyte.calibrate.draw import RowPictures
from halfbyte.calibrate.kinds import TapKinds
from halfbyte.calibrate.lanes import make_lane
from halfbyte.calibrate.moments import InputSums, Want
from halfbyte.calibrate.observers import AmaxObserver
from halfbyte.calibrate.seeing import SeenPictures, image_positions
from halfbyte.chat.prompt import EncodedImage
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import FormatError
from halfbyte.kernels import dispatch
from halfbyte.log import say_once
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import DecoderLayer
from halfbyte.model.load import load_layer
from halfbyte.model.rope import RotaryTable, Rotation
from halfbyte.modules import decoder_linears

# Tap point -> linears of the layer that read it.
READERS: Mapping[str, tuple[str, ...]] = {
    "attention.input": ("attention.q", "attention.k", "attention.v"),
    "attention.o.input": ("attention.o",),
    "mlp.input": ("mlp.gate", "mlp.up"),
    "mlp.down.input": ("mlp.down",),
}
# Tap points of what the KV cache holds: keys after rotation, values as projected.
KEYS, VALUES = "attention.k", "attention.v"
# What the head reads: behind the last layer and the final norm.
HEAD_INPUT = "head.input"
TAPS = (*READERS, KEYS, VALUES)
# Inputs kept of each layer, to compare methods on.
SAMPLED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What calibration has observed of the activations of one layer, or of the head's input.

    layer     the head's input counts as that of a layer behind the last one
    observed  tap point -> observed magnitude, bf16, 0-d
    samples   tap point of an input -> evenly spaced tokens of the first row, bf16 (T, I), where
              the layer ran
    sums      tap point of an input -> sums over all tokens, where they were wanted, likewise
    kinds     tap point -> the same of text and image rows apart; empty without pictures
    """

    layer: int
    observed: Mapping[str, Tensor]
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, InputSums] = field(default_factory=dict)
    kinds: Mapping[str, TapKinds] = field(default_factory=dict)

    def input_of(self, linear: str) -> Tensor:
        """The observed magnitude of the input of canonical `linear`, 0-d."""
        return self.observed[self.tap_of(linear)]

    def sample_of(self, linear: str) -> Tensor | None:
        """Some inputs of canonical `linear`, if any were kept."""
        return self.samples.get(self.tap_of(linear))

    def tap_of(self, linear: str) -> str:
        """The tap point at which the input of canonical `linear` is observed."""
        if linear == "head":
            return HEAD_INPUT
        short = linear.removeprefix(f"decoder.{self.layer}.")
        return next(tap for tap, readers in READERS.items() if short in readers)


Progress = Callable[[int, int], None]  # done and in all: rows of the layer at work, or layers
# Layer -> tap point of an input -> what sums are wanted of it.
Wants = Callable[[int], Mapping[str, Want]]


def _nothing(layer: int) -> Mapping[str, Want]:
    return {}


def stream_layers(
    checkpoint: Checkpoint,
    rows: Sequence[Tensor],
    *,
    device: torch.device | str = "cpu",
    activations: Activations | None = None,
    prefetch: bool = False,
    budget: MemoryBudget | None = None,
    wants: Wants = _nothing,
    pictures: RowPictures = (),
) -> Iterator[LayerStatistics]:
    """Run all rows through the layers in order; yields each layer's statistics when it is done.

    rows         int64 (tokens,) each, any lengths, on the CPU
    activations  where rows wait; in memory if None. The first layer run is the one whose inputs
                 they hold, layer 0 if none; after a layer is yielded they hold the next one's
    prefetch     load the next layer while this one computes: half the waiting, a second layer's
                 memory
    budget       host memory to stay within: prefetching and rows in memory are given up for it
    wants        which inputs of a layer to sum up, besides what is observed of all
    pictures     of each row, whose vectors take the place of its image tokens; empty for none

    The layer is freed before it is yielded, so the caller has its memory. Raises FormatError if
    an activation is NaN or infinite: the weights are broken or the source decodes wrongly;
    OverBudgetError if the layer at work alone is too much for the budget.
    """
    place = torch.device(device)
    if activations is None:
        activations = Activations([row.numel() for row in rows], checkpoint.config.text.width)
    budget = MemoryBudget(None) if budget is None else budget
    budget.held_for_speed(activations.release)
    if activations.layer is None:
        _embed(checkpoint, rows, activations, budget, pictures, place)
    is_image = _image_rows(checkpoint, rows, pictures)
    runner = _Runner(checkpoint, place, activations, budget, wants, is_image)
    layers = range(activations.layer or 0, checkpoint.config.text.num_layers)
    with _Loader(checkpoint, place, budget) as loader:
        for layer in layers:
            loaded = loader.take(layer)
            if prefetch and layer != layers[-1]:
                loader.prefetch(layer + 1)
            statistics = runner.run(layer, loaded)
            del loaded
            yield statistics


@torch.inference_mode()
def head_statistics(
    checkpoint: Checkpoint,
    activations: Activations,
    *,
    device: torch.device | str = "cpu",
    budget: MemoryBudget | None = None,
    wants: Want | None = None,
) -> LayerStatistics:
    """Observe what the head reads: the rows behind the last layer, through the final norm.

    activations  as `stream_layers` leaves them behind its last layer

    Raises FormatError for NaN and infinity, OverBudgetError where there is no room for the sums.
    """
    place, text = torch.device(device), checkpoint.config.text
    budget = MemoryBudget(None) if budget is None else budget
    norm_D = checkpoint.tensor("norm.weight").to(place)
    observer, sample_TD, sums = AmaxObserver(), None, None
    if wants is not None:
        if place.type == "cpu" and wants == "products":
            budget.check(4 * text.width * text.width)
        sums = InputSums(text.width, wants, place)
    lane = make_lane(place, activations)
    for number in range(len(activations.row_tokens)):
        budget.check()
        x_TD = dispatch.rms_norm(lane.arrive(lane.fetch(number)), norm_D, text.norm_eps)
        observer.update(x_TD)
        if sums is not None:
            sums.update(x_TD)
        if sample_TD is None:
            step = max(1, x_TD.shape[0] // SAMPLED_TOKENS)
            sample_TD = x_TD[::step][:SAMPLED_TOKENS].clone()
    observed = observer.result()
    if not bool(torch.isfinite(observed)):
        raise FormatError("the input of the head holds NaN or infinity; the weights are damaged")
    return LayerStatistics(
        text.num_layers,
        {HEAD_INPUT: observed},
        {} if sample_TD is None else {HEAD_INPUT: sample_TD},
        {} if sums is None else {HEAD_INPUT: sums},
    )


def _image_rows(
    checkpoint: Checkpoint, rows: Sequence[Tensor], pictures: RowPictures
) -> tuple[Tensor | None, ...]:
    """Which tokens of each row show a picture, bool (T,); empty if none of any row does."""
    vision = checkpoint.config.vision
    if not pictures or vision is None:
        return ()
    found: list[Tensor | None] = []
    for row, images in zip(rows, pictures, strict=True):
        is_image_T = torch.zeros(row.shape, dtype=torch.bool)
        for at in image_positions(row, images, vision.image_token_id):
            is_image_T[at] = True
        found.append(is_image_T if images else None)
    return tuple(found)


class _GivenUpError(Exception):
    """A layer that is being prefetched is not wanted any more, or has no room."""


@dataclass(frozen=True, slots=True)
class _Prefetched:
    layer: int
    is_dropped: threading.Event
    loading: Future[DecoderLayer]


class _Loader:
    """Loads layers; on a GPU beside the layer at work, on one stream of its own.

    One stream, because memory that a stream has freed is given out again on that stream only. It is
    free by then: `_Runner.run` waits for everything that used a layer.

    Prefetching is for speed alone. It ends for good when memory gets tight, or when the system
    refuses memory to a layer that is being prefetched; that layer is loaded when its turn comes.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, budget: MemoryBudget) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._budget = budget
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next-layer")
        self._lock = threading.Lock()
        self._next: _Prefetched | None = None
        self._prefetches = True
        budget.held_for_speed(self.give_up)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_up()
        self._pool.shutdown()

    def take(self, layer: int) -> DecoderLayer:
        """Return a layer that was prefetched, or load it now."""
        with self._lock:
            prefetched, self._next = self._next, None
        if prefetched is not None:
            assert prefetched.layer == layer, f"{prefetched.layer} was prefetched, not {layer}"
            try:
                return prefetched.loading.result()
            except Exception as error:
                if not (isinstance(error, _GivenUpError) or is_refusal(error)):
                    raise
        if prefetched is not None:
            # Out here, since the error holds what its frames held.
            del prefetched
            self.give_up()
        return self._load(layer, self._budget.check)

    def prefetch(self, layer: int) -> None:
        """Begin to load the layer that will be taken next."""
        is_dropped = threading.Event()

        def before(num_bytes: int) -> None:
            if is_dropped.is_set() or not self._budget.has_room(num_bytes):
                raise _GivenUpError

        with self._lock:
            if self._prefetches:
                loading = self._pool.submit(self._load, layer, before)
                self._next = _Prefetched(layer, is_dropped, loading)

    def give_up(self) -> None:
        """Drop a prefetched layer and prefetch none from now on; from any thread but its own."""
        with self._lock:
            dropped, self._next = self._next, None
            self._prefetches = False
        if dropped is not None:
            dropped.is_dropped.set()
            wait([dropped.loading])

    def _load(self, layer: int, before: Callable[[int], object]) -> DecoderLayer:
        if self._stream is None:
            return load_layer(self._checkpoint, layer, device=self._device, before=before)
        with torch.cuda.stream(self._stream):
            loaded = load_layer(self._checkpoint, layer, device=self._device, before=before)
        self._stream.synchronize()
        return loaded


def _embed(
    checkpoint: Checkpoint,
    rows: Sequence[Tensor],
    activations: Activations,
    budget: MemoryBudget,
    pictures: RowPictures,
    device: torch.device,
) -> None:
    with ExitStack() as stack:
        seen: SeenPictures | None = None
        if pictures:
            seen = stack.enter_context(
                SeenPictures(checkpoint, pictures, activations, device, budget)
            )
            seen.run()
        budget.check(checkpoint.num_bytes("embedding.weight"))
        table_VD = checkpoint.tensor("embedding.weight")
        for number, row in enumerate(rows):
            budget.check()
            x_TD = table_VD[row]
            if seen is not None and pictures[number]:
                _place(x_TD, row, pictures[number], seen.vectors(number), checkpoint)
            activations.write(number, x_TD)
    activations.advance(0)


def _place(
    x_TD: Tensor,
    row: Tensor,
    images: Sequence[EncodedImage],
    vectors: Sequence[Tensor],
    checkpoint: Checkpoint,
) -> None:
    """Put the vectors of a row's pictures where its image tokens are, in place."""
    vision = checkpoint.config.vision
    assert vision is not None
    at = image_positions(row, images, vision.image_token_id)
    for rows_M, vectors_MD in zip(at, vectors, strict=True):
        x_TD[rows_M] = vectors_MD[: len(rows_M)].to(x_TD.dtype)


class _Runner:
    """Runs rows through one layer after another and remembers the rotary angles."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        activations: Activations,
        budget: MemoryBudget,
        wants: Wants,
        is_image: Sequence[Tensor | None] = (),
    ) -> None:
        self._is_image = is_image
        self._activations = activations
        self._device = device
        self._wants = wants
        self._budget = budget
        table = RotaryTable(checkpoint.config.text, device)
        self._rotation = table.at(torch.arange(max(activations.row_tokens), device=device))
        self._lane = make_lane(device, activations)

    def _rotation_of(self, tokens: int) -> Rotation:
        cos_TH2, sin_TH2, query_scale_T = self._rotation
        return Rotation(
            cos_TH2[:tokens],
            sin_TH2[:tokens],
            None if query_scale_T is None else query_scale_T[:tokens],
        )

    @torch.inference_mode()
    def run(self, layer: int, module: DecoderLayer) -> LayerStatistics:
        """All rows through one layer; returns what its tap points showed."""
        observers = {tap: AmaxObserver() for tap in TAPS}
        samples: dict[str, Tensor] = {}
        wanted = self._wants(layer)
        sums: dict[str, InputSums] = {}
        kinds = {point: TapKinds() for point in TAPS} if self._is_image else {}
        number = 0

        def tap(point: str, x: Tensor) -> None:
            observers[point].update(x)
            if kinds:
                kinds[point].update(x, self._is_image[number], wanted.get(point))
            if point in wanted:
                if point not in sums:
                    self._check_sums(x.shape[1], wanted[point])
                    sums[point] = InputSums(x.shape[1], wanted[point], self._device)
                sums[point].update(x)
            if point in READERS and point not in samples:
                step = max(1, x.shape[0] // SAMPLED_TOKENS)
                samples[point] = x[::step][:SAMPLED_TOKENS].clone()

        all_tokens = self._activations.row_tokens
        fetched_TD = self._lane.fetch(0)
        for number, tokens in enumerate(all_tokens):
            self._budget.check()
            x_TD = self._lane.arrive(fetched_TD)
            x_TD = module(x_TD, layer, DenseAttend([0, tokens]), self._rotation_of(tokens), tap)
            if number + 1 < len(all_tokens):
                fetched_TD = self._lane.fetch(number + 1)
            self._lane.store(number, x_TD)
        self._activations.advance(layer + 1)
        observed = {point: observer.result() for point, observer in observers.items()}
        for point, magnitude in observed.items():
            if not bool(torch.isfinite(magnitude)):
                raise FormatError(
                    f"decoder.{layer}: {point} holds NaN or infinity; the weights up to this "
                    "layer are damaged, or their scales are"
                )
        return LayerStatistics(layer, observed, samples, sums, kinds)

    def _check_sums(self, width: int, want: Want) -> None:
        if self._device.type == "cpu" and want == "products":
            self._budget.check(4 * width * width)


def input_maxima(
    checkpoint: Checkpoint,
    rows: Sequence[Tensor],
    *,
    on_layer: Progress | None = None,
    pictures: RowPictures = (),
) -> dict[str, float]:
    """Largest input magnitude of every decoder linear (canonical name) over these rows.

    on_layer  called with layers done and layers in all

    What an FP8 source needs for its activation scales; a linear whose input is all zero gives the
    largest e4m3 value, as the reference writes it, and is named in a warning.
    """
    names = [linear.name for linear in decoder_linears(checkpoint.config)]
    maxima: dict[str, float] = {}
    layers = checkpoint.config.text.num_layers
    if on_layer is not None:
        on_layer(0, layers)
    for statistics in stream_layers(checkpoint, rows, pictures=pictures):
        for name in names:
            if name.startswith(f"decoder.{statistics.layer}."):
                maxima[name] = float(statistics.input_of(name))
        if on_layer is not None:
            on_layer(statistics.layer + 1, layers)
    for name, magnitude in maxima.items():
        if magnitude == 0:
            say_once(f"{name}: its calibration inputs are all zero; assuming 448")
            maxima[name] = 448.0
    return {name: maxima[name] for name in names}
