"""What computes the model's steps, as the runner and a draft model see it: two implementations.

`plain` calls the decoder's ops one by one, on any torch device; `hopper` replays graphs of CUDA
kernels. What only one of them can do is asked for (`Device.ahead`, `Device.slicer`), never guessed
from its class. Each rank of several has a device and is told the same steps.

Shapes: T rows of a step, R rows with logits, D model width, V vocabulary, I image tokens.
"""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from torch import Tensor

from halfbyte.config import TextConfig
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.draw import DrawPlan
from halfbyte.engine.images import Placing
from halfbyte.engine.pinned import PendingTokens
from halfbyte.engine.plan.step import PlannedStep
from halfbyte.model.parallel import Communicator
from halfbyte.model.saturation import SaturationCounts


class Results(NamedTuple):
    """What a step gives: logits and hidden states, which the caller may change.

    logits_RV  f32, of the step's wanted rows
    hidden_TD  of every row, behind the final norm, if it was wanted
    """

    logits_RV: Tensor
    hidden_TD: Tensor | None


class Guessed(NamedTuple):
    """What the wanted rows of a draft model's step give.

    hidden_RD  states to go on from, behind its norm
    logits_RV  the target's head over them, where it came along
    """

    hidden_RD: Tensor
    logits_RV: Tensor | None


class Slices(Protocol):
    """A step that is computed in parts, each of which may wait as long as it likes."""

    def encode(self, deadline: float) -> bool:
        """Encode images until about then, and no layers yet; True once all are there."""

    def advance(self, deadline: float) -> Results | None:
        """Compute until about then, one unit at least; the results once the whole step is computed.

        deadline  by `time.perf_counter`
        """


class Slicer(Protocol):
    """The ability of a device to stop in the middle of a step and go on later."""

    def begin(self, step: PlannedStep, placing: Placing | None) -> Slices:
        """Begin a step whose images come from `placing`; other steps may run in between.

        The step's sequences keep their blocks until it is over. The results include hidden states.
        """


class Ahead(Protocol):
    """The ability to choose tokens on the device.

    The next step can then be launched before the tokens are read.
    """

    def launch(
        self,
        step: PlannedStep,
        vectors_ID: Tensor | None,
        plan: DrawPlan,
        bans: SequenceOf[tuple[int, ...]],
    ) -> PendingTokens:
        """Enqueue a step and the choice of its `num_chosen` tokens, without waiting for either.

        bans  each chosen row's banned tokens
        """


class DraftDevice(Protocol):
    """A draft model's layers over a cache of its own, in the target's pages (`drafter`)."""

    @property
    def cache(self) -> PagedCache: ...

    def advance(self, step: PlannedStep, hidden_TD: Tensor, vectors_ID: Tensor | None) -> Guessed:
        """Compute entries of the draft model and write their K and V to its cache.

        step       a row of entry p holds the token at p + 1, position p and its slot
        hidden_TD  the target's at the entries, or what this gave for it
        """

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Logits by the target's head, f32 (R, V); the caller may change them."""


class Device(Protocol):
    """One GPU, or a machine's processors: computes a model's steps, or a rank's part of them."""

    @property
    def config(self) -> TextConfig:
        """The architecture, or the rank's part of it; the vocabulary is the whole one."""

    @property
    def cache(self) -> PagedCache: ...

    @property
    def communicator(self) -> Communicator: ...

    @property
    def num_weight_bytes(self) -> int:
        """Bytes of the device's weights, those of a draft model included."""

    @property
    def draft(self) -> DraftDevice | None: ...

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Rows that steps are padded to, ascending; () if there are no such sizes."""

    @property
    def saturation(self) -> SaturationCounts | None:
        """Counts of clipped activations, where the engine was told to count."""

    @property
    def slicer(self) -> Slicer | None: ...

    @property
    def ahead(self) -> Ahead | None: ...

    def run(
        self, step: PlannedStep, vectors_ID: Tensor | None, *, wants_hidden: bool = False
    ) -> Results:
        """Compute a step on this rank; ranks above 0 get no logits.

        vectors_ID  of images, in the order of the step's image rows; rank 0 alone has them
        """

    def follow(self, step: PlannedStep) -> None:
        """Compute this rank's part of a step that rank 0 runs or launches."""

    def facts(self) -> dict[str, object]:
        """What computes the model and what memory it takes: facts by name, for people."""
