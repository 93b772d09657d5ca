"""What static FP8 activation scales that were calibrated on text cost a model that sees.

Question: on Pocket, how far are predictions behind pictures, and how many answers about pictures
are right, under static input scales of text alone, of text and pictures, with headroom, and with
activations scaled per token?

Method: conversations of every kind of Pocket's training split (numbers that training never drew)
run once through the decoder; maxima of text rows and of image rows are kept apart
(`calibrate.kinds`). Each arm rounds the inputs of every linear to FP8 by its scales, weights as
they are: `text` by the maxima of text rows, `joint` by those of all rows, `headroom` by twice
those of text, `per token` by each token's own maximum (here in plain torch). Held-out items of the
image kind are scored with the right prefix given: KL is from the same weights with activations
left alone, over the tokens of the answers; an answer is right if each of its tokens is the
likeliest. Intervals are t intervals over items.

Two models. `pocket` as it is, and `pocket, loud pictures`: a model of the same function, made to
show clipping. In each layer the few channels in which image rows are loudest beside text are
multiplied by powers of two, and the weights that read them divided, so that text stays within its
range and image rows leave it.

Reading the result: the second model is a construction; it says what clipping costs where it
occurs, not that it does. Pocket's own scales were made of text and pictures. In the last record
text already reaches as far as Pocket's pictures do, so that `text` and `joint` are one; in the
constructed model image tokens are clipped at half of the inputs, and no arm differs from another by
more than its interval: a few channels beyond the range of text cost this model nothing that 100
items show. It neither proves nor refutes what was published of a larger model.

Last record: benchmarks/records/calibration_sees.json.

Run: PYTHONPATH=src:. python benchmarks/calibration_sees.py && python -m tools.docs
"""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pocket.encode import ANSWER, Encoded, Encoder
from pocket.export import FIRST_NUMBER, IMAGE_ID, pixels_of, rgb_of, write_bf16
from pocket.mixture import SHARES, item
from pocket.vocabulary import Vocabulary
from torch import Tensor

from halfbyte.bench import record
from halfbyte.calibrate.draw import RowPictures
from halfbyte.calibrate.stream import READERS, LayerStatistics, stream_layers
from halfbyte.chat.prompt import EncodedImage
from halfbyte.checkpoint.fp8_source import write_fp8_source
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.fidelity.models import interval_of_mean
from halfbyte.figures import Against, Figure
from halfbyte.formats.fp8 import round_to_fp8
from halfbyte.formats.minifloat import E4M3_MAX
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.linear import FusedLinear
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.modules import decoder_linears
from halfbyte.quantize.clipping import SATURATES_BEYOND

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).parent / "records" / "calibration_sees.json"
ARMS = ("text", "joint", "headroom", "per token")
# Behind the items that Pocket's own scales were made of.
_CALIBRATION_NUMBER = FIRST_NUMBER + 10**6
_LONG = ("recall", "long_recall", "almanac")
_ITEMS_AT_ONCE = 20
# Loud channels of a layer's inputs, and how far beyond text the loudest image row goes.
_LOUD_CHANNELS = 8
_LOUDNESS = 8.0
# Tap point -> the fused linear that reads it.
_READER = {
    "attention.input": "qkv", "attention.o.input": "o", "mlp.input": "gate_up",
    "mlp.down.input": "down",
}  # fmt: skip

Round = Callable[[Tensor], Tensor]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "pocket/model")
    parser.add_argument("--work", type=Path, default=Path("build/sees"))
    parser.add_argument("--items", type=int, default=200, help="of the image kind (%(default)s)")
    parser.add_argument("--calibration", type=int, default=6, help="items a kind (%(default)s)")
    parser.add_argument("--out", type=Path, default=RECORD)
    return parser.parse_args()


def as_rows(items: Sequence[Encoded]) -> tuple[list[Tensor], RowPictures]:
    """Items as calibration rows: ids, and each picture with its place among them."""
    rows, pictures = [], []
    for one in items:
        found, start = [], 0
        for image in one.images:
            pixels = rgb_of(image).numpy()
            offset = one.ids.index(IMAGE_ID, start)
            start = offset + pixels.shape[1] // 28 * (pixels.shape[2] // 28 + 1)
            found.append(EncodedImage(pixels, offset, start - offset))
        rows.append(torch.tensor(one.ids))
        pictures.append(tuple(found))
    return rows, tuple(pictures)


def observe(directory: Path, items: Sequence[Encoded]) -> list[LayerStatistics]:
    """What passes each tap point in rows of text and in rows of pictures."""
    rows, pictures = as_rows(items)
    wanted: Mapping[str, Any] = dict.fromkeys(READERS, "squares")
    return list(
        stream_layers(
            Checkpoint.open(directory), rows, pictures=pictures, wants=lambda layer: wanted
        )
    )


def scales_of(seen: LayerStatistics, tap: str) -> dict[str, float]:
    """The static input scale of each arm that has one."""
    text = float(seen.kinds[tap].largest()["text"]) / E4M3_MAX
    joint = float(seen.observed[tap]) / E4M3_MAX
    return {"text": text, "joint": joint, "headroom": 2 * text}


def per_token(x_TI: Tensor) -> Tensor:
    """Rounded to FP8, each token by a scale of its own."""
    largest_T1 = x_TI.abs().amax(-1, keepdim=True).float().clamp_min(1e-12)
    return round_to_fp8(x_TI, largest_T1 / E4M3_MAX)


def with_rounding(decoder: Decoder, seen: Sequence[LayerStatistics], arm: str | None) -> None:
    """Have every linear round its inputs as the arm does; None leaves them alone."""
    for layer, statistics in zip(decoder.decoder_layers(), seen, strict=True):
        for tap, name in _READER.items():
            linear = getattr(layer, name)
            rounding: Round | None = None
            if arm == "per token":
                rounding = per_token
            elif arm is not None:
                scale = torch.tensor(scales_of(statistics, tap)[arm])
                rounding = partial(round_to_fp8, input_scale=scale)
            setattr(layer, name, FusedLinear(linear.weight, "fp8", rounding))


def answers_of(
    decoder: Decoder, items: Sequence[Encoded], vectors: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """Log-probs (N, V) at the positions whose next token the assistant writes, by item."""
    found = []
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        some = items[start : start + _ITEMS_AT_ONCE]
        ids = torch.tensor([token for one in some for token in one.ids])
        ends = np.cumsum([0, *(len(one.ids) for one in some)]).tolist()
        positions = torch.cat([torch.arange(len(one.ids)) for one in some])
        shown = [v for own in vectors[start : start + _ITEMS_AT_ONCE] for v in own]
        at = torch.nonzero(ids == IMAGE_ID).flatten()
        step = Step(ids, positions, DenseAttend(ends), None, at, torch.cat(shown))
        logits_TV = decoder(step)
        for one, first in zip(some, ends[:-1], strict=True):
            rows = [first + n - 1 for n, weight in enumerate(one.weights) if weight == ANSWER]
            found.append(logits_TV[rows].log_softmax(-1))
    return found


def is_right(one: Encoded, logprobs_NV: Tensor) -> bool:
    """Whether every token of the answer is the likeliest one."""
    wanted = [token for token, weight in zip(one.ids, one.weights, strict=True) if weight == ANSWER]
    return bool(torch.equal(logprobs_NV.argmax(-1), torch.tensor(wanted)))


def clipped_share(seen: Sequence[LayerStatistics], arm: str, kind: str) -> dict[str, float]:
    """Shares of tokens that saturate, of the linear that has most of them and on average."""
    shares = [
        statistics.kinds[tap].seen[kind].beyond(SATURATES_BEYOND * scales_of(statistics, tap)[arm])  # type: ignore[index]
        for statistics in seen
        for tap in READERS
    ]
    tokens = [share.tokens for share in shares]
    return {"most": round(max(tokens), 4), "mean": round(float(np.mean(tokens)), 4),
            "inputs": sum(share > 0 for share in tokens), "of": len(tokens)}  # fmt: skip


def judge(
    name: str, directory: Path, seen: Sequence[LayerStatistics], items: Sequence[Encoded]
) -> dict[str, Any]:
    """Every arm on one model, against the same weights with activations left alone."""
    checkpoint = Checkpoint.open(directory)
    decoder, vision = load_decoder(checkpoint), load_vision(checkpoint)
    assert vision is not None
    vectors = [vision([pixels_of(image) for image in one.images]) for one in items]
    with_rounding(decoder, seen, None)
    base = answers_of(decoder, items, vectors)
    base_right = [is_right(*pair) for pair in zip(items, base, strict=True)]
    arms: dict[str, Any] = {}
    for arm in ARMS:
        with_rounding(decoder, seen, arm)
        found = answers_of(decoder, items, vectors)
        kl = [
            (p.exp() * (p - q)).sum(-1).double().numpy() for p, q in zip(base, found, strict=True)
        ]
        right = [is_right(*pair) for pair in zip(items, found, strict=True)]
        interval = interval_of_mean(kl, range(len(kl)))
        pairs = list(zip(base_right, right, strict=True))
        arms[arm] = {
            "kl_mean": round(float(np.concatenate(kl).mean()), 6),
            "kl_interval": None if interval is None else [round(v, 6) for v in interval],
            "right": sum(right),
            "lost": sum(was and not now for was, now in pairs),
            "won": sum(now and not was for was, now in pairs),
        }
        if arm != "per token":
            arms[arm]["clipped_calibration_rows"] = {
                kind: clipped_share(seen, arm, kind) for kind in ("text", "image")
            }
        print(name, arm, arms[arm], flush=True)
    return {
        "items": len(items),
        "answer_tokens": sum(map(len, base)),
        "right_with_activations_left_alone": sum(base_right),
        "arms": arms,
    }


# --- a model of the same function whose image rows are loud


def loud_channels(seen: LayerStatistics, tap: str) -> dict[int, float]:
    """Channel -> power of two by which it may grow while text stays within its range."""
    kinds = seen.kinds[tap].seen
    text, image = kinds["text"].sums, kinds["image"].sums
    assert text is not None and image is not None
    text_I, image_I = text.maxima_I, image.maxima_I
    largest = float(text_I.max())
    room_I = largest / text_I.clamp_min(1e-6)
    beyond_I = image_I * room_I / largest
    chosen = beyond_I.topk(_LOUD_CHANNELS).indices.tolist()
    factors = {}
    for channel in chosen:
        most = min(float(room_I[channel]), _LOUDNESS * largest / float(image_I[channel]))
        factors[channel] = 2.0 ** math.floor(math.log2(max(most, 1.0)))
    return factors


def write_loud(source: Path, seen: Sequence[LayerStatistics], work: Path) -> Path:
    """Write the FP8 checkpoint of a model of the same function; returns its folder."""
    checkpoint = Checkpoint.open(source)
    weights = {
        name: checkpoint.tensor(name)
        for name in checkpoint.names()
        if not name.endswith(("_scale",)) and "decoder." not in name
    }
    for name in checkpoint.names():
        if name.startswith("decoder.") and "norm" in name:
            weights[name] = checkpoint.tensor(name).clone()
    for linear in decoder_linears(checkpoint.config):
        weights[f"{linear.name}.weight"] = checkpoint.decoded(linear.name).clone()
    for layer, statistics in enumerate(seen):
        for tap, norm in (("attention.input", "attention_norm"), ("mlp.input", "mlp_norm")):
            for channel, factor in loud_channels(statistics, tap).items():
                weights[f"decoder.{layer}.{norm}.weight"][channel] *= factor
                for reader in READERS[tap]:
                    weights[f"decoder.{layer}.{reader}.weight"][:, channel] /= factor
        for channel, factor in loud_channels(statistics, "mlp.down.input").items():
            weights[f"decoder.{layer}.mlp.up.weight"][channel] *= factor
            weights[f"decoder.{layer}.mlp.down.weight"][:, channel] /= factor
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_bf16(weights, checkpoint.config, source / "tekken.json", work / "bf16")
    # No arm reads these scales.
    scales = {linear.name: E4M3_MAX for linear in decoder_linears(checkpoint.config)}
    write_fp8_source(Checkpoint.open(work / "bf16"), scales, work / "fp8")
    return work / "fp8"


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # small products; threads that wait would take the machine's time
    encoder = Encoder(Vocabulary(args.model / "tekken.json"))
    calibration = [
        encoder.encode(item(kind, _CALIBRATION_NUMBER + n, "train"))
        for kind in SHARES
        if kind not in _LONG
        for n in range(args.calibration)
    ]
    items = [encoder.encode(item("images", n, "test")) for n in range(args.items)]
    seen = observe(args.model, calibration)
    results: dict[str, Any] = {
        "calibration_items": len(calibration),
        "calibration_tokens": sum(len(one.ids) for one in calibration),
        "models": {"pocket": judge("pocket", args.model, seen, items)},
    }
    loud = write_loud(args.model, seen, args.work)
    found = judge("loud", loud, observe(loud, calibration), items)
    results["models"]["pocket, loud pictures"] = found
    shutil.rmtree(args.work, ignore_errors=True)
    record.write(
        args.out,
        name="calibration_sees",
        question="What do static FP8 scales calibrated on text cost where a model sees?",
        command="PYTHONPATH=src:. python benchmarks/calibration_sees.py " + " ".join(sys.argv[1:]),
        figures=figures_of(results),
        results=results,
    )


def figures_of(results: Mapping[str, Any]) -> list[Figure]:
    """KL and right answers of every arm, beside those of scales made of text alone."""
    figures = []
    for model, found in results["models"].items():
        for arm, facts in found["arms"].items():
            conditions = {"model": model, "activations": arm, "items": found["items"]}
            text = found["arms"]["text"]
            against = () if arm == "text" else (Against("text", text["kl_mean"]),)
            figures.append(
                Figure("KL behind pictures", facts["kl_mean"], "nats/token", "fidelity",
                       conditions, against)
            )  # fmt: skip
            share = 100 * facts["right"] / found["items"]
            alone = 100 * found["right_with_activations_left_alone"] / found["items"]
            figures.append(
                Figure("answers about pictures right", round(share, 1), "%", "fidelity",
                       conditions, (Against("activations left alone", round(alone, 1)),))
            )  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
