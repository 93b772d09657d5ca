"""`python -m pocket.compare BASE OTHER ...`: KL divergence and agreement on held-out answers.

Every checkpoint scores the same right answers of the same conversations, images included, through
the engine's decoder; only positions of the assistant's tokens count. With --transformers the base
(a bf16 checkpoint) is also held to transformers in float64 and bf16, as the tests hold the decoder.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.model.linear import Mode
from halfbyte.model.load import load_decoder, load_vision
from pocket.encode import ANSWER, Encoded, Encoder
from pocket.export import pixels_of, step_of
from pocket.mixture import GRADED, item
from pocket.vocabulary import Vocabulary


def answer_logits(
    checkpoint: Checkpoint, conversations: Sequence[Encoded], mode: Mode
) -> list[Tensor]:
    """Logits that predict each conversation's answer tokens: f32 (R, V)."""
    decoder = load_decoder(checkpoint, mode=mode)
    vision = load_vision(checkpoint)
    found = []
    for encoded in conversations:
        rows = [i - 1 for i, weight in enumerate(encoded.weights) if weight == ANSWER]
        found.append(decoder(step_of(encoded, vision)[0])[rows])
    return found


def divergence(base: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """Mean and 99th percentile of KL(base || other) in nats a token, and top-1 agreement."""
    p, q = torch.cat(list(base)).log_softmax(-1), torch.cat(list(other)).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1_agreement": float(same),
        "tokens": len(kl),
    }


@torch.no_grad()
def transformers_logits(directory: Path, encoded: Encoded, dtype: torch.dtype) -> Tensor:
    """Logits of transformers' class for every position; images of one size a conversation."""
    from transformers import Mistral3ForConditionalGeneration  # an oracle, not a dependency

    model: Any = Mistral3ForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    arguments: dict[str, Any] = {"input_ids": torch.tensor([encoded.ids])}
    if encoded.images:
        pixels = torch.stack([pixels_of(image) for image in encoded.images])
        arguments["pixel_values"] = pixels.to(dtype)
        arguments["image_sizes"] = torch.tensor([image.shape[1:] for image in pixels])
    logits: Tensor = model(**arguments).logits[0]
    return logits


def parity(directory: Path, conversations: Sequence[Encoded]) -> list[dict[str, float]]:
    """Relative error of logits against float64: ours in bf16 and that of transformers in bf16."""
    checkpoint = Checkpoint.open(directory)
    decoder, vision = load_decoder(checkpoint), load_vision(checkpoint)
    found = []
    for encoded in conversations:
        exact = transformers_logits(directory, encoded, torch.float64)
        plain = transformers_logits(directory, encoded, torch.bfloat16)
        ours = decoder(step_of(encoded, vision)[0])
        ratio = [float((x.double() - exact).norm() / exact.norm()) for x in (ours, plain)]
        found.append(
            {
                "ours": ratio[0],
                "transformers": ratio[1],
                "tokens": len(encoded.ids),
                "images": len(encoded.images),
            }
        )
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pocket.compare", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("others", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--mode", default="weight_only", choices=get_args(Mode))
    parser.add_argument("--transformers", action="store_true")
    args = parser.parse_args()
    encoder = Encoder(Vocabulary(args.base / "tekken.json"))
    sets = {k: [encoder.encode(item(k, n, "test")) for n in range(args.items)] for k in GRADED}
    everything = [encoded for group in sets.values() for encoded in group]
    record: dict[str, Any] = {"base": args.base.name, "mode": args.mode, "others": {}}
    if args.transformers:
        chosen = [sets["integers"][0], sets["knowledge"][0], sets["tools"][0]]
        # transformers fails on a single merged patch.
        one_image = [e for e in sets["images"] if len(e.images) == 1]
        chosen += [e for e in one_image if len(e.images[0].patches_PC) > 4][:4]
        record["parity"] = parity(args.base, chosen)
        print(*record["parity"], sep="\n")
    base = answer_logits(Checkpoint.open(args.base), everything, args.mode) if args.others else []
    for other in args.others:
        logits = answer_logits(Checkpoint.open(other), everything, args.mode)
        found: dict[str, Any] = {"all": divergence(base, logits)}
        for number, kind in enumerate(sets):
            part = slice(number * args.items, (number + 1) * args.items)
            found[kind] = divergence(base[part], logits[part])
        record["others"][other.name] = found
        print(
            other.name, found["all"], {k: round(found[k]["kl_mean"], 5) for k in sets}, flush=True
        )
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
