"""What static input scales cut off, of text rows and of image rows, linear by linear.

A scale made of text alone need not hold rows of pictures: what goes beyond it saturates at the
format's largest value. Known only where calibration rows showed pictures (`calibrate.kinds`).
`pipeline` keeps what is found in the journal, `page` shows it, `warn_clipped` says it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypedDict

from torch import Tensor

from halfbyte.calibrate.draw import RowPictures
from halfbyte.calibrate.kinds import KINDS, Kind, SeenOfKind, TapKinds
from halfbyte.calibrate.stream import READERS, LayerStatistics, stream_layers
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.formats.fp8 import Profile
from halfbyte.formats.minifloat import E2M1_MAX
from halfbyte.log import logger
from halfbyte.modules import WeightFormat
from halfbyte.quantize.layer import QuantizedLinear
from halfbyte.quantize.scales import input_scale
from halfbyte.recipe.schema import ActivationScales

# Which scale: the one that was chosen, the source's own, the one that text rows alone would give.
Whose = Literal["chosen", "source", "text"]

# 448, and half of e4m3's last step of 32: what lies below rounds to the largest value as anything
# else rounds to its neighbour, what lies beyond loses more.
SATURATES_BEYOND = 464.0
# Shares of image tokens below this are not worth a warning.
_WORTH_SAYING = 0.001
_NAMED_LINEARS = 4


class ClippedShare(TypedDict):
    """Shares of the tokens of a kind that hold a value beyond a scale, and of their values."""

    tokens: float
    values: float


class LinearClipping(TypedDict):
    """What is known of one linear's inputs, by kind of row, as JSON values.

    largest  the largest magnitude of each kind
    scales   the static scales in question; the source's where it states one
    clipped  of each of them, the shares of each kind that saturate
    """

    name: str
    format: WeightFormat
    largest: Mapping[Kind, float]
    scales: Mapping[Whose, float]
    clipped: Mapping[Whose, Mapping[Kind, ClippedShare]]


def linear_clipping(
    linear: QuantizedLinear,
    statistics: LayerStatistics | None,
    declared: Tensor | None,
    profile: Profile,
    rule: ActivationScales,
) -> LinearClipping | None:
    """The clipping of one encoded linear; None where image rows were not run or do not matter.

    declared  the input scale that the source states for it, which must be in FP8 then

    A linear whose inputs are smoothed is left out: what was seen is not what it will read.
    """
    name, chosen = linear.name, linear.format
    if statistics is None or not statistics.kinds or linear.smoothing_I is not None:
        return None
    kinds = statistics.kinds[statistics.tap_of(name)]
    scales: dict[Whose, float] = {}
    limits: dict[Whose, float] = {}
    if chosen != "bf16":
        scales["chosen"] = float(linear.tensors[f"{name}.input_scale"])
        limits["chosen"] = _limit(chosen, scales["chosen"])
        text = kinds.largest()["text"]
        if float(text) > 0:
            scales["text"] = float(input_scale(name, chosen, text, profile, rule))
            limits["text"] = _limit(chosen, scales["text"])
    if declared is not None:
        scales["source"] = float(declared)
        limits["source"] = _limit("fp8", scales["source"])
    return {
        "name": name,
        "format": chosen,
        "largest": {kind: float(value) for kind, value in kinds.largest().items()},
        "scales": scales,
        "clipped": {whose: _shares(kinds, limit) for whose, limit in limits.items()},
    }


def checkpoint_clipping(
    checkpoint: Checkpoint,
    rows: Sequence[Tensor],
    pictures: RowPictures,
) -> list[LinearClipping]:
    """What the static FP8 input scales of a checkpoint cut off of these rows.

    Layers run one at a time, weights decoded, activations unrounded. Linears without a static FP8
    scale are left out; without any nothing is run.
    """
    stated = {
        name.removesuffix(".input_scale"): checkpoint.scale(name)
        for name in checkpoint.names()
        if name.startswith("decoder.")
        and name.endswith(".input_scale")
        and checkpoint.format_of(name.removesuffix(".input_scale")) == "fp8"
    }
    found: list[LinearClipping] = []
    if not stated or not pictures:
        return found
    for statistics in stream_layers(checkpoint, rows, pictures=pictures):
        for tap, readers in READERS.items():
            kinds = statistics.kinds[tap]
            for reader in readers:
                name = f"decoder.{statistics.layer}.{reader}"
                if name not in stated:
                    continue
                found.append(
                    {
                        "name": name,
                        "format": "fp8",
                        "largest": {k: float(value) for k, value in kinds.largest().items()},
                        "scales": {"chosen": stated[name]},
                        "clipped": {"chosen": _shares(kinds, _limit("fp8", stated[name]))},
                    }
                )
    return found


def _limit(chosen: WeightFormat, scale: float) -> float:
    """The magnitude beyond which an input saturates; NVFP4 has a second scale above e4m3's."""
    return SATURATES_BEYOND * scale * (E2M1_MAX if chosen == "nvfp4" else 1.0)


def _shares(kinds: TapKinds, limit: float) -> dict[Kind, ClippedShare]:
    return {kind: _share(kinds.seen[kind], limit) for kind in KINDS}


def _share(seen: SeenOfKind, limit: float) -> ClippedShare:
    tokens, values = seen.beyond(limit)
    return {"tokens": round(tokens, 6), "values": round(values, 9)}


def worst(clipping: Iterable[LinearClipping], whose: Whose) -> list[LinearClipping]:
    """The linears of which such a scale clips image tokens worth a warning, most clipped first."""
    some = [
        one
        for one in clipping
        if whose in one["clipped"]
        and one["clipped"][whose]["image"]["tokens"] >= _WORTH_SAYING
        and (whose == "source" or one["format"] == "fp8")
    ]
    return sorted(some, key=lambda one: -one["clipped"][whose]["image"]["tokens"])


def clipped_words(clipping: Sequence[LinearClipping], whose: Whose, subject: str) -> str | None:
    """A warning about static FP8 scales that clip image rows; None where they clip none.

    subject  whose scales, at the beginning of a sentence: "the FP8 input scales of fp8/"
    """
    found = worst(clipping, whose)
    if not found:
        return None
    named = ", ".join(
        f"{one['name']} {one['clipped'][whose]['image']['tokens']:.1%} of image tokens (text "
        f"{one['clipped'][whose]['text']['tokens']:.1%})"
        for one in found[:_NAMED_LINEARS]
    )
    more = f" and {len(found) - _NAMED_LINEARS} more" if len(found) > _NAMED_LINEARS else ""
    judged = sum(whose in one["clipped"] for one in clipping)
    return (
        f"{subject} clip image rows in {len(found)} of {judged} linears: {named}{more}. Calibrate "
        "on pictures (quantize --blend pictures, or your own), leave room above what was seen "
        "(--method headroom), or serve with --fp8-activations per-token"
    )


def warn_clipped(clipping: Sequence[LinearClipping], whose: Whose, subject: str) -> None:
    """Log `clipped_words` as a warning, if there is anything to say."""
    words = clipped_words(clipping, whose, subject)
    if words is not None:
        logger.warning("%s", words)
