"""`python -m pocket.eagle`: train an EAGLE head on Pocket's own hidden states.

The head is `halfbyte.model.eagle` in functional form: at position p it joins the embedding of
token p + 1 with the model's normed hidden state at p, runs one decoder layer, and guesses the
hidden state at p + 1, whose logits are for token p + 2. It learns the model's own distributions,
first from true hidden states, then from its own guesses in their place, as a chain of guesses uses
it. Only answers count: nothing else is ever guessed. Embedding, output head and tower are the
model's, and frozen.

Sources: Li et al., EAGLE, arXiv 2401.15077; for the passes over own guesses, Zhang et al., HASS,
arXiv 2408.15766.

Shapes: T tokens, D model width, R rows.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.checkpoint.inventory import expected_eagle_tensors
from halfbyte.config import ModelConfig
from halfbyte.model.tiny import bf16_eagle, write_tiny_eagle
from pocket import packs
from pocket.encode import ANSWER, Encoder
from pocket.mixture import GRADED
from pocket.model import Inputs, Model, Weights, pocket_config
from pocket.train import (
    LOSS_ROWS,
    Muon,
    batches,
    choose_attend,
    is_linear,
    load_checkpoint,
    shapes,
    to_device,
)
from pocket.vocabulary import Vocabulary

logger = logging.getLogger("pocket")
# How much each pass counts: over true hidden states, over guesses, over guesses from guesses.
PASSES = (1.0, 0.7, 0.5)
# How much a guess's distance from the true hidden state counts beside its distribution.
DISTANCE = 0.1
WARMUP_STEPS = 100


def initial_head(config: ModelConfig, seed: int, device: torch.device | str) -> dict[str, Tensor]:
    """float32 weights of a head with one layer, by canonical name."""
    draft = ModelConfig(replace(config.text, num_layers=1), None)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, expected in expected_eagle_tensors(draft, bf16_eagle(draft)).items():
        if "norm" in name:
            values = torch.ones(expected.shape)
        else:
            values = torch.randn(expected.shape, generator=generator) * expected.shape[-1] ** -0.5
            if name.endswith(("attention.o.weight", "mlp.down.weight")):
                values *= 0.1
        weights[name] = values.to(device)
    return weights


def guesses(
    model: Model, head: Weights, next_TD: Tensor, hidden_TD: Tensor, inputs: Inputs
) -> Tensor:
    """Guessed hidden states behind the entries, normed: (T, D).

    next_TD    the embedding of the token one further than each entry
    hidden_TD  the model's hidden states at the entries, or guesses of them
    """
    joined = torch.cat((next_TD, hidden_TD), -1)
    x_TD = F.linear(joined, head["eagle.fuse.weight"].to(model.dtype))
    return model.decode(head, x_TD, inputs, num_layers=1)


def _row_losses(guess_RD: Tensor, true_RD: Tensor, output: Tensor) -> Tensor:
    """Cross-entropy of the guess under the true distribution, and the distance of the two."""
    output = output.to(guess_RD.dtype)
    true_RV = F.linear(true_RD, output).float().softmax(-1)
    log_RV = F.linear(guess_RD, output).float().log_softmax(-1)
    entropy_R = -(true_RV * log_RV).sum(-1)
    distance_R = F.smooth_l1_loss(guess_RD.float(), true_RD.float(), reduction="none").mean(-1)
    return entropy_R + DISTANCE * distance_R


class Passes:
    """Entries of one batch: what they read, what they should give and how much each counts."""

    def __init__(self, model: Model, weights: Weights, inputs: Inputs, weights_T: Tensor) -> None:
        with torch.no_grad():
            embedded_TD = model.embed(weights, inputs)
            num_layers = model.config.text.num_layers
            self.hidden_TD = model.decode(weights, embedded_TD, inputs, num_layers=num_layers)
        self.inputs = inputs
        self.next_TD = embedded_TD.roll(-1, 0)
        self.true_TD = self.hidden_TD.roll(-1, 0)
        # Entry p guesses token p + 2, which is the target of position p + 1 of the same document.
        starts_T = (inputs.positions_T == 0).roll(-1, 0)
        is_answer_T = (weights_T >= ANSWER / 100).roll(-1, 0)
        self.counts_T = (is_answer_T & ~starts_T).float()

    def guesses_of(self, model: Model, head: Weights) -> Iterable[tuple[Tensor, Tensor]]:
        """(guesses, how much each counts) of pass after pass, each over the guesses before."""
        hidden_TD, counts_T = self.hidden_TD, self.counts_T
        for _ in PASSES:
            guess_TD = guesses(model, head, self.next_TD, hidden_TD, self.inputs)
            yield guess_TD, counts_T
            hidden_TD = guess_TD.roll(1, 0)
            # The first entry of a document has no guess before it to read.
            counts_T = counts_T * (self.inputs.positions_T > 0)


def loss_of(
    model: Model, head: Weights, weights: Weights, passes: Passes, row_losses: Any
) -> Tensor:
    """Weighted mean over the passes, nats a token."""
    output = weights["head.weight"]
    total = torch.zeros((), device=output.device)
    for share, (guess_TD, counts_T) in zip(PASSES, passes.guesses_of(model, head), strict=True):
        parts = zip(
            torch.split(guess_TD, LOSS_ROWS),
            torch.split(passes.true_TD, LOSS_ROWS),
            torch.split(counts_T, LOSS_ROWS),
            strict=True,
        )
        summed = sum((row_losses(g, t, output) * c).sum() for g, t, c in parts)
        total = total + share * summed / counts_T.sum().clamp(min=1)
    return total / sum(PASSES)


@torch.no_grad()
def measure(
    model: Model, head: Weights, weights: Weights, batches: Iterable[packs.Batch], device: str
) -> dict[str, list[float]]:
    """By kind: the share of answers' tokens that the first, second and third guess gets right."""
    right: dict[str, list[float]] = {}
    total: dict[str, float] = {}
    for batch in batches:
        inputs, _, weights_T = to_device(batch, device)
        passes = Passes(model, weights, inputs, weights_T)
        true_T = _choices(model, weights, passes.true_TD)
        labels = [label.partition("/")[0] for label in batch.kinds.tolist()]
        ends = torch.from_numpy(batch.token_bounds[1 : len(labels) + 1]).long() - 1
        for depth, (guess_TD, counts_T) in enumerate(passes.guesses_of(model, head)):
            hits_T = (_choices(model, weights, guess_TD) == true_T) * counts_T
            sums = torch.stack((hits_T, counts_T)).double().cumsum(1).cpu()[:, ends]
            each = sums.diff(dim=1, prepend=sums.new_zeros(2, 1)).T.tolist()
            for label, (hits, count) in zip(labels, each, strict=True):
                right.setdefault(label, [0.0] * len(PASSES))[depth] += hits
                total[label] = total.get(label, 0.0) + (count if depth == 0 else 0.0)
    return {
        label: [round(hits / max(1.0, total[label]), 4) for hits in found]
        for label, found in sorted(right.items())
    }


def _choices(model: Model, weights: Weights, hidden_TD: Tensor) -> Tensor:
    parts = torch.split(hidden_TD, LOSS_ROWS)
    return torch.cat([model.logits(weights, part).argmax(-1) for part in parts])


def train(
    model: Model,
    weights: Weights,
    head: dict[str, Tensor],
    loader: Iterable[tuple[int, Inputs, Tensor, Tensor]],
    *,
    seconds: float,
    compiled: bool,
    muon_rate: float,
    adam_rate: float,
    log_every: int,
) -> list[dict[str, float]]:
    """Train `head` in place for so long; returns the curve of the loss."""
    for weight in head.values():
        weight.requires_grad_()
    linears = {name: w for name, w in head.items() if is_linear(name)}
    norms = [w for name, w in head.items() if name not in linears]
    muon = Muon(linears, compiled=compiled)
    adam = torch.optim.AdamW(norms, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    row_losses = torch.compile(_row_losses, dynamic=False) if compiled else _row_losses
    curve: list[dict[str, float]] = []
    started = time.perf_counter()
    for step, (_, inputs, _, weights_T) in enumerate(loader, 1):
        if step <= 3:
            started = time.perf_counter()  # compiling is not training
        elapsed = time.perf_counter() - started
        # A rise by steps, then a straight fall to nothing by time.
        factor = min(1.0, step / WARMUP_STEPS) * max(0.0, 1 - elapsed / seconds)
        passes = Passes(model, weights, inputs, weights_T)
        loss = loss_of(model, head, weights, passes, row_losses)
        loss.backward()  # type: ignore[no-untyped-call]
        muon.step(linears, muon_rate * factor, 0.95, 0.01)
        adam.param_groups[0]["lr"] = adam_rate * factor
        adam.step()
        for weight in head.values():
            weight.grad = None
        if step % log_every == 0 or elapsed >= seconds:
            curve.append({"step": step, "seconds": round(elapsed, 1), "loss": float(loss.detach())})
            logger.info("step %d loss %.4f at %.0f s", step, float(loss.detach()), elapsed)
        if elapsed >= seconds:
            break
    return curve


def run(args: argparse.Namespace) -> None:
    """Train a head for the weights of a folder, measure it and write it."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device, config = args.device, pocket_config()
    compiled = device != "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Model(config, device, attend=choose_attend(device), dtype=dtype, compiled=compiled)
    loaded = load_checkpoint(args.trained)
    weights = {name: w.to(device, torch.float32) for name, w in loaded.items()}
    head = initial_head(config, args.seed, device)
    vocabulary = Vocabulary(args.tekken)
    short, long = shapes(args.tokens)
    with batches(args, args.first_batch, short, long) as loader:
        curve = train(
            model,
            weights,
            head,
            loader,
            seconds=args.seconds,
            compiled=compiled,
            muon_rate=args.muon_rate,
            adam_rate=args.adam_rate,
            log_every=args.log_every,
        )
    encoder = Encoder(vocabulary)
    held_out = (
        batch
        for kind in GRADED
        for batch in packs.held_out_batches(
            kind, range(args.items), encoder, vocabulary.control, short=short, long=long
        )
    )
    accepted = measure(model, head, weights, held_out, device)
    plain = {name: w.detach().to(torch.bfloat16).cpu() for name, w in head.items()}
    write_tiny_eagle(args.out, config, layers=1, replaced=plain)
    record = {
        "device": torch.cuda.get_device_name() if compiled else "cpu",
        "torch": torch.__version__,
        "seed": args.seed,
        "seconds": args.seconds,
        "curve": curve,
        "right_by_depth": accepted,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for label, shares in accepted.items():
        logger.info("%s: %s", label, " ".join(f"{share:.3f}" for share in shares))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pocket.eagle", description=__doc__)
    parser.add_argument("trained", type=Path, help="the trainer's checkpoint folder")
    parser.add_argument("out", type=Path, help="the draft model to write; must not exist")
    parser.add_argument("--tekken", type=Path, required=True, help="tekken.json")
    parser.add_argument("--batches", type=Path, required=True, help="scratch folder for batches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--adam-rate", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--most-ahead", type=int, default=200)
    parser.add_argument("--first-batch", type=int, default=0)
    parser.add_argument("--items", type=int, default=200, help="held-out items of each kind")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--tokens", type=int, help="tokens of a batch (trials on small machines)")
    return parser.parse_args(arguments)


def main() -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(parse())


if __name__ == "__main__":
    main()
