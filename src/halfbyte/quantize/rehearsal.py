"""How long a quantization takes, from the run itself on a few small layers.

A checkpoint of random weights with the source's proportions and formats is written to a temporary
folder and quantized by the pipeline as anything else would be; what its layers took is scaled up by
multiplications, weights and bytes. Layers of up to a few million weights are as wide as the
source's own. Called by `capacity`; decision 0113 says why the clock is asked this way.
"""

import logging
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig, TextConfig
from halfbyte.log import logger
from halfbyte.model.load import load_layer
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.modules import WeightFormat, decoder_linears
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.survey import Survey
from halfbyte.recipe.plan import Plan, linear_size
from halfbyte.recipe.schema import Calibration, LayerRange, Recipe, Rule, Scales

# Layers with more weights are rehearsed narrower; a full-width one has 1.4e9.
_MOST_WEIGHTS = 4_000_000
# Multiplications of the text that is run through each layer, and the fewest and most rows of it.
_TEXT_FLOPS = 2e10
_FEWEST_ROWS, _MOST_ROWS = 2, 8
# Layers of each kind that are timed; before them comes one that is not, as it starts cold.
_TIMED = 3
# Kinds of layer (by the formats of their linears) that are rehearsed, the most frequent first.
_MOST_KINDS = 3
_VOCABULARY = 256

Kind = str  # of a layer: the formats of its linears in model order, "fp8 fp8 fp8 fp8 nvfp4 …"


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Seconds of layers, each sample scaled to a layer of the source with the whole text.

    running   the text through one layer, loading included; empty without text
    encoding  of one layer by kind: reading, encoding, hashing and writing it
    syncing   making it durable
    """

    running: tuple[float, ...]
    encoding: Mapping[Kind, tuple[float, ...]]
    syncing: tuple[float, ...]


def kinds_of(plan: Plan, num_layers: int) -> list[Kind]:
    """The formats of every layer's linears, in model order."""
    kinds: list[list[WeightFormat]] = [[] for _ in range(num_layers)]
    for name, chosen in plan.formats.items():
        if name == "head":
            continue
        kinds[int(name.split(".")[1])].append(chosen)
    return [" ".join(kind) for kind in kinds]


def layer_weights(config: ModelConfig) -> int:
    """Number of weights in the linears of one decoder layer."""
    linears = (linear for linear in decoder_linears(config) if linear.layer == 0)
    return sum(linear.out_features * linear.in_features for linear in linears)


def text_flops(config: TextConfig, weights: int, num_tokens: int, longest_row: int) -> float:
    """Multiplications and additions of the whole text in one layer: linears and attention."""
    scores = 4 * config.num_heads * config.head_dim * longest_row
    return float(num_tokens) * (2 * weights + scores)


def rehearse(
    source: Survey,
    plan: Plan,
    *,
    num_tokens: int,
    longest_row: int,
    device: str = "cpu",
    with_errors: bool = False,
) -> Rehearsal:
    """Quantize a few layers of the source's proportions in a temporary folder, on `device`.

    num_tokens, longest_row  of the text; 0 for none

    What is timed is of this moment: other work on the machine counts. GPTQ and the products of
    inputs that it wants are left out, since they do not scale with weights; `capacity` adds them.
    """
    kinds = kinds_of(plan, source.config.text.num_layers)
    chosen = [kind for kind, _ in Counter(kinds).most_common(_MOST_KINDS)]
    layers = [chosen[0], *(kind for kind in chosen for _ in range(_TIMED))]
    small = _narrowed(source.config.text, len(layers))
    config = ModelConfig(small, None)
    weights, small_weights = layer_weights(source.config), layer_weights(config)
    per_row = text_flops(small, small_weights, longest_row, longest_row)
    rows = min(max(ceil(_TEXT_FLOPS / per_row), _FEWEST_ROWS), _MOST_ROWS) if per_row else 0
    with tempfile.TemporaryDirectory(prefix="halfbyte-plan-") as scratch, _quietly():
        folder = Path(scratch)
        is_fp8 = source.quantization.dialect != "none"
        write_tiny_checkpoint(
            folder / "source", config=config, dialect="mistral-fp8" if is_fp8 else "none"
        )
        tokens = _tokens(folder / "tokens.safetensors", rows, longest_row) if rows else None
        result = quantize(
            QuantizeConfig(
                source=folder / "source",
                output=folder / "output",
                recipe=_recipe(plan, layers, small, runs_text=bool(rows)),
                calibration_tokens=tokens,
                device=device,
                with_errors=with_errors,
            )
        )
        loading = _loading_s(folder / "source", device) if rows else 0.0
    timed = [layer["seconds"] for layer in result.record["layers"]][1:]
    wider = weights / small_weights
    running: list[float] = []
    if rows:
        more = text_flops(source.config.text, weights, num_tokens, longest_row) / (rows * per_row)
        for one in timed:
            alone = max(one["calibrating"] - loading, one["calibrating"] / 2)
            running.append(alone * more + loading * wider)
    encoding: dict[Kind, list[float]] = {kind: [] for kind in chosen}
    for kind, one in zip(layers[1:], timed, strict=True):
        encoding[kind].append(one["encoding"] * wider)
    small_text = rows * longest_row * small.width * 2
    syncing = []
    for kind, one in zip(layers[1:], timed, strict=True):
        made = _layer_bytes(source.config, kind) + num_tokens * source.config.text.width * 2
        syncing.append(one["syncing"] * made / (_layer_bytes(config, kind) + small_text))
    return Rehearsal(tuple(running), {k: tuple(v) for k, v in encoding.items()}, tuple(syncing))


def median_and_range(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of some samples; zeros where there are none.

    The median, not the mean: one layer that other programs delay would be taken for all of them.
    """
    if not samples:
        return 0.0, 0.0, 0.0
    return statistics.median(samples), min(samples), max(samples)


def _narrowed(text: TextConfig, num_layers: int) -> TextConfig:
    """The same proportions, narrow enough to take seconds; as it is if it is narrow already."""
    weights = layer_weights(ModelConfig(text, None))
    narrow = replace(
        text,
        num_layers=num_layers,
        vocab_size=_VOCABULARY,
        tied_head=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=None,
    )
    if weights <= _MOST_WEIGHTS:
        return narrow
    factor = sqrt(_MOST_WEIGHTS / weights)
    kv_heads = max(1, round(text.num_kv_heads * factor))
    return replace(
        narrow,
        width=max(64, round(text.width * factor / 64) * 64),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (text.num_heads // text.num_kv_heads),
        mlp_width=max(64, round(text.mlp_width * factor / 64) * 64),
    )


def _recipe(plan: Plan, layers: Sequence[Kind], text: TextConfig, *, runs_text: bool) -> Recipe:
    """The plan's formats for these layers, one rule a linear; GPTQ's weights by maxima."""
    linears = [x for x in decoder_linears(ModelConfig(text, None)) if x.layer == 0]
    rules = tuple(
        Rule(
            "attention" if linear.group == "attention" else "mlp",
            (linear.name.rpartition(".")[2],),
            (LayerRange(layer, layer),),
            chosen,
        )
        for layer, kind in enumerate(layers)
        for linear, chosen in zip(linears, _formats(kind), strict=True)
    )
    weights = "amax" if plan.scales.weights == "gptq" else plan.scales.weights
    scales = replace(plan.scales, weights=weights)
    return Recipe(
        name="rehearsal",
        rules=rules,
        keep=frozenset({"embedding", "head", "vision", "projector"}),
        kv_cache=plan.kv_cache,
        scales=scales if runs_text else Scales(activations="none"),
        calibration=Calibration("builtin", 1, 1, 0),
        source="rehearsal",
    )


def _layer_bytes(config: ModelConfig, kind: Kind) -> int:
    linears = [linear for linear in decoder_linears(config) if linear.layer == 0]
    formats = _formats(kind)
    return sum(linear_size(x, chosen).num_bytes for x, chosen in zip(linears, formats, strict=True))


def _formats(kind: Kind) -> list[WeightFormat]:
    return [cast("WeightFormat", chosen) for chosen in kind.split()]


def _tokens(path: Path, rows: int, length: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, _VOCABULARY, (rows, length), generator=generator)
    save_file({"batch0.input_ids": ids}, path)
    return path


def _loading_s(source: Path, device: str) -> float:
    """Median seconds of loading a layer to run text through it."""
    checkpoint, times = Checkpoint.open(source), []
    for layer in range(1, 4):
        started = time.perf_counter()
        load_layer(checkpoint, layer, device=device)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextmanager
def _quietly() -> Iterator[None]:
    """A rehearsal does not report its layers as a run does."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
