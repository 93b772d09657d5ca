"""`python -m pocket.train`: train the model, in one sitting or several.

Linears learn by Muon, the rest by AdamW; the rate rises, stays, and falls to zero over the last
part of the time that it is given. A state folder holds everything that going on needs; the
checkpoint of every save is bf16 safetensors under canonical names, in files of at most 15 MiB.
"""

import argparse
import json
import logging
import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.checkpoint.inventory import expected_tensors
from halfbyte.checkpoint.metadata import unquantized
from halfbyte.checkpoint.reader import Checkpoint
from pocket import packs
from pocket.encode import ANSWER, Encoder
from pocket.mixture import AT_LENGTH, GRADED, SHARES
from pocket.model import (
    Attend,
    Inputs,
    Model,
    attend_flash,
    attend_flash_repeated,
    attend_one_by_one,
    initial_weights,
    pocket_config,
)
from pocket.vocabulary import Vocabulary

logger = logging.getLogger("pocket")
FILE_BYTES = 15 << 20
# Rows whose logits are computed at a time.
LOSS_ROWS = 16384
# How long a batch may take to come before something must be wrong.
PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How one sitting trains.

    seconds         wall time of the sitting from the first step, the fall of the rate included
    decay_seconds   the rate falls to zero over the last so many; 0 leaves it up for a next sitting
    steps           the sitting ends after this step, if not 0
    decay_steps     the rate falls to zero over the last so many of `steps` instead: then the same
                    weights come out every time on the same device and software
    shares          shares of kinds that differ from `mixture.SHARES`, in percent
    """

    seconds: float
    decay_seconds: float
    steps: int = 0
    decay_steps: int = 0
    muon_rate: float = 0.006
    adam_rate: float = 0.001
    warmup_steps: int = 200
    seed: int = 1
    eval_every_s: float = 60.0
    eval_items: int = 96
    shares: Mapping[str, float] = field(default_factory=dict)


class Muon:
    """Momentum, orthogonalized: matrices of one shape are treated together.

    Source: Keller Jordan et al., Muon (2024): the quintic Newton-Schulz iteration.
    """

    def __init__(self, weights: dict[str, Tensor], *, compiled: bool) -> None:
        self.groups: dict[tuple[int, ...], list[str]] = {}
        for name, weight in weights.items():
            # Tall and wide matrices of the same sides share a group, turned alike.
            self.groups.setdefault(tuple(sorted(weight.shape)), []).append(name)
        self.momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._orthogonal = torch.compile(_orthogonal, dynamic=False) if compiled else _orthogonal

    @torch.no_grad()
    def step(self, weights: dict[str, Tensor], rate: float, momentum: float, decay: float) -> None:
        """Take in the gradients."""
        for group in self.groups.values():
            updates = []
            for name in group:
                weight, buffer = weights[name], self.momentum[name]
                assert weight.grad is not None, name
                buffer.lerp_(weight.grad, 1 - momentum)
                update = weight.grad.lerp(buffer, momentum)
                updates.append(update if update.shape[0] <= update.shape[1] else update.T)
            found = self._orthogonal(torch.stack(updates))
            for name, update in zip(group, found.unbind(0), strict=True):
                weight = weights[name]
                tall = weight.shape[0] > weight.shape[1]
                factor = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - rate * decay)
                weight.add_(update.T if tall else update, alpha=-rate * factor)


def _orthogonal(x_BOI: Tensor) -> Tensor:
    """Nearly orthogonal matrices with the same row and column spaces."""
    x = x_BOI.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    orthogonal: Tensor = x.float()
    return orthogonal


def is_linear(name: str) -> bool:
    """Whether Muon trains this tensor."""
    other = name in ("embedding.weight", "head.weight", "encoder.patch.weight")
    return "norm" not in name and not other


def rate_factor(step: int, elapsed_s: float, settings: Settings, *, first_step: int = 0) -> float:
    """Share of the full rate: a warm-up by steps, a fall to zero by steps or by time."""
    rise = min(1.0, (step - first_step + 1) / settings.warmup_steps)
    if settings.decay_steps > 0:
        return rise * min(1.0, max(0.0, (settings.steps - step) / settings.decay_steps))
    if settings.decay_seconds <= 0:
        return rise
    left = (settings.seconds - elapsed_s) / settings.decay_seconds
    return rise * min(1.0, max(0.0, left))


def choose_attend(device: str) -> Attend:
    """The fastest attention that agrees with the plain one here, gradients included."""
    if device == "cpu":
        return attend_one_by_one
    generator = torch.Generator(device).manual_seed(0)
    bounds = torch.tensor([0, 37, 300, 300, 512, 512], dtype=torch.int32, device=device)

    def found(attend: Attend, causal: bool) -> list[Tensor]:
        generator.manual_seed(0)
        q, k, v = (
            torch.randn(
                512, n, 64, generator=generator, device=device, dtype=torch.bfloat16
            ).requires_grad_()
            for n in (6, 2, 2)
        )
        out = attend(q, k, v, bounds, 512, causal)
        out.float().square().sum().backward()  # type: ignore[no-untyped-call]
        return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    for attend in (attend_flash, attend_flash_repeated):
        try:
            for causal in (True, False):
                for ours, plain in zip(
                    found(attend, causal), found(attend_one_by_one, causal), strict=True
                ):
                    error = (ours.float() - plain.float()).norm() / plain.float().norm()
                    if not error < 0.02:
                        raise RuntimeError(f"differs from plain attention by {error:.3f}")
            logger.info("attention: %s", attend.__name__)
            return attend
        except Exception as error:  # whatever this torch does not offer
            logger.warning("%s: %s", attend.__name__, error)
    return attend_one_by_one


def to_device(batch: packs.Batch, device: str) -> tuple[Inputs, Tensor, Tensor]:
    """(inputs, targets, weights) of a batch."""
    shape = packs.LONG if batch.is_long else packs.SHORT

    def move(array: Any, dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.from_numpy(array)
        if device != "cpu":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor if dtype is None else tensor.to(dtype)

    inputs = Inputs(
        move(batch.tokens_T.astype("int32"), torch.int64),
        move(batch.positions_T, torch.int64),
        move(batch.image_index_T, torch.int64),
        move(batch.token_bounds),
        move(batch.patches_PC),
        move(batch.grid_P2),
        move(batch.patch_bounds),
        shape.document_tokens,
        packs.IMAGE_PATCHES,
    )
    targets = move(batch.targets_T.astype("int32"), torch.int64)
    return inputs, targets, move(batch.weights_T, torch.float32) / 100


class Loader:
    """Batches by number from the folder where workers put them, moved ahead of their use."""

    def __init__(self, folder: Path, device: str, start: int, *, ahead: int = 4) -> None:
        self._folder, self._device = folder, device
        self._next = start
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(ahead)
        self._waiting: deque[Any] = deque()
        self._is_closed = False
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[tuple[int, Inputs, Tensor, Tensor]]:
        while True:
            while len(self._waiting) < self._ahead:
                self._waiting.append((self._next, self._pool.submit(self._load, self._next)))
                self._next += 1
            number, future = self._waiting.popleft()
            started = time.perf_counter()
            moved = future.result()
            assert moved is not None, "read from a closed loader"
            self.waited_s += time.perf_counter() - started
            yield number, *moved

    def close(self) -> None:
        """End the waiting for batches that nobody will use."""
        self._is_closed = True
        self._pool.shutdown(cancel_futures=True)

    def _load(self, number: int) -> tuple[Inputs, Tensor, Tensor] | None:
        path = packs.path_of(self._folder, number)
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists():
            if self._is_closed:
                return None
            if time.monotonic() > deadline:
                raise TimeoutError(f"batch {number} did not come within {PATIENCE_S:.0f} s")
            time.sleep(0.01)
        batch = packs.Batch.load(path)
        path.unlink()
        return to_device(batch, self._device)


def _row_losses(hidden_RD: Tensor, head: Tensor, targets_R: Tensor) -> Tensor:
    logits = F.linear(hidden_RD, head.to(hidden_RD.dtype)).float()
    return F.cross_entropy(logits, targets_R, reduction="none")


class Trainer:
    """Weights, optimizers and what was seen so far."""

    def __init__(
        self, *, model: Model, weights: dict[str, Tensor], settings: Settings, compiled: bool
    ) -> None:
        self.model, self.settings = model, settings
        self.weights = {name: w.requires_grad_() for name, w in weights.items()}
        linears = {name: w for name, w in self.weights.items() if is_linear(name)}
        self.muon = Muon(linears, compiled=compiled)
        self._linears = linears
        rest = [w for name, w in self.weights.items() if not is_linear(name)]
        self.adam = torch.optim.AdamW(
            [{"params": rest, "rate": settings.adam_rate}],
            lr=settings.adam_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=rest[0].device.type == "cuda",
        )
        self._losses = torch.compile(_row_losses, dynamic=False) if compiled else _row_losses
        self.step_number = 0
        self.seconds = 0.0
        self.tokens = 0
        self.curve: list[dict[str, Any]] = []

    def loss(self, inputs: Inputs, targets_T: Tensor, weights_T: Tensor) -> Tensor:
        """Weighted mean cross-entropy."""
        hidden = self.model.hidden(self.weights, inputs)
        head = self.weights["head.weight"]
        total = sum(
            (self._losses(h, head, t) * w).sum()
            for h, t, w in zip(
                torch.split(hidden, LOSS_ROWS),
                torch.split(targets_T, LOSS_ROWS),
                torch.split(weights_T, LOSS_ROWS),
                strict=True,
            )
        )
        return total / weights_T.sum()

    def step(self, inputs: Inputs, targets_T: Tensor, weights_T: Tensor, factor: float) -> Tensor:
        """One step; returns the loss without waiting for it."""
        loss = self.loss(inputs, targets_T, weights_T)
        loss.backward()  # type: ignore[no-untyped-call]
        adam = [w for g in self.adam.param_groups for w in g["params"]]
        torch.nn.utils.clip_grad_norm_(adam, 1.0)
        momentum = 0.85 + 0.1 * min(1.0, self.step_number / 300)
        self.muon.step(self._linears, self.settings.muon_rate * factor, momentum, 0.01)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * factor
        self.adam.step()
        for weight in self.weights.values():
            weight.grad = None
        self.step_number += 1
        self.tokens += len(targets_T)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Everything that going on needs."""
        return {
            "weights": {n: w.detach() for n, w in self.weights.items()},
            "momentum": self.muon.momentum,
            "adam": self.adam.state_dict(),
            "step": self.step_number,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "curve": self.curve,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
            for name, buffer in self.muon.momentum.items():
                buffer.copy_(state["momentum"][name])
        self.adam.load_state_dict(state["adam"])
        self.step_number, self.seconds = state["step"], state["seconds"]
        self.tokens, self.curve = state["tokens"], state["curve"]


def measure(trainer: Trainer, batches: list[packs.Batch], device: str) -> dict[str, Any]:
    """By label: share of items whose answers greedy decoding would give to the letter.

    If at every position of an answer the likeliest token is the right one, greedy decoding gives
    it; where several answers are right, the share is a lower bound. `loss` is nats an answer token.
    """
    right: dict[str, float] = {}
    total: dict[str, int] = {}
    loss: dict[str, float] = {}
    tokens: dict[str, float] = {}
    for batch in batches:
        inputs, targets_T, weights_T = to_device(batch, device)
        # With gradients, though they are not used: so the compiled kernels serve here too.
        hidden = trainer.model.hidden(trainer.weights, inputs).detach()
        wrong, losses = [], []
        for h, t in zip(
            torch.split(hidden, LOSS_ROWS), torch.split(targets_T, LOSS_ROWS), strict=True
        ):
            logits = trainer.model.logits(trainer.weights, h).detach()
            wrong.append(logits.argmax(-1) != t)
            losses.append(F.cross_entropy(logits, t, reduction="none"))
        is_answer = weights_T >= ANSWER / 100
        columns = torch.stack(
            (torch.cat(wrong) & is_answer, torch.cat(losses) * is_answer, is_answer)
        )
        sums = columns.double().cumsum(1).cpu()
        ends = torch.from_numpy(batch.token_bounds[1 : len(batch.kinds) + 1]).long() - 1
        each = sums[:, ends].diff(dim=1, prepend=sums.new_zeros(3, 1))
        for label, (misses, nats, count) in zip(batch.kinds.tolist(), each.T.tolist(), strict=True):
            right[label] = right.get(label, 0) + (misses == 0)
            total[label] = total.get(label, 0) + 1
            loss[label] = loss.get(label, 0.0) + nats
            tokens[label] = tokens.get(label, 0.0) + count
    return {
        label: {
            "exact": round(right[label] / total[label], 4),
            "loss": round(loss[label] / max(1.0, tokens[label]), 5),
            "n": total[label],
        }
        for label in sorted(total)
    }


def save_checkpoint(weights: dict[str, Tensor], folder: Path) -> None:
    """bf16 weights in files of at most `FILE_BYTES`."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, weight in weights.items():
        tensor = weight.detach().to(torch.bfloat16).cpu().contiguous()
        if size + tensor.nbytes > FILE_BYTES and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"weights-{number}.safetensors")


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Weights by canonical name: what `save_checkpoint` wrote, or an exported checkpoint's."""
    if (folder / "config.json").exists():
        exported = Checkpoint.open(folder)
        names = expected_tensors(exported.config, unquantized(exported.config))
        formats = exported.quantization.formats
        return {
            name: exported.decoded(linear, torch.float32)
            if linear in formats
            else exported.tensor(name)
            for name in names
            for linear in [name.removesuffix(".weight")]
        }
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        found |= load_file(path)
    return found


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        seconds=args.seconds,
        decay_seconds=args.decay_seconds,
        steps=args.steps,
        decay_steps=args.decay_steps,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        eval_every_s=args.eval_every,
        eval_items=args.eval_items,
        shares=dict(args.shares),
    )


def shapes(tokens: int | None) -> tuple[packs.Shape, packs.Shape]:
    """Short and long batches, of fewer tokens where the command says so."""
    if not tokens:
        return packs.SHORT, packs.LONG
    patches = max(packs.IMAGE_PATCHES, tokens // 8)
    short, long = (
        replace(shape, tokens=tokens, patches=patches) for shape in (packs.SHORT, packs.LONG)
    )
    return short, long


def _trainer(args: argparse.Namespace, state: dict[str, Any] | None) -> Trainer:
    """The model with first weights, a warm start's, or those of the state."""
    device = args.device
    config = pocket_config(
        layers=args.layers,
        width=args.width,
        mlp_width=args.mlp_width,
        vision_layers=args.vision_layers,
        vision_width=args.vision_width,
    )
    compiled = device != "cpu" and not args.eager
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Model(config, device, attend=choose_attend(device), dtype=dtype, compiled=compiled)
    weights = initial_weights(config, args.seed, device)
    if args.warm_start is not None:
        loaded = load_checkpoint(args.warm_start)
        weights = {name: loaded[name].to(device, torch.float32) for name in weights}
    trainer = Trainer(model=model, weights=weights, settings=_settings(args), compiled=compiled)
    if state is not None:
        trainer.restore(state)
    count = sum(weight.numel() for weight in weights.values())
    logger.info("%d parameters; %s", count, asdict(trainer.settings))
    return trainer


def run(args: argparse.Namespace) -> None:
    """One sitting."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    args.batches.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "state.pt"
    state = torch.load(state_file, map_location=args.device) if state_file.exists() else None
    start = state["step"] if state else args.first_batch
    short, long = shapes(args.tokens)
    vocabulary = Vocabulary(args.tekken)
    encoder = Encoder(vocabulary)

    def held_out(num_items: int) -> list[packs.Batch]:
        return [
            batch
            for kind in (*GRADED, *AT_LENGTH)
            for batch in packs.held_out_batches(
                kind,
                range(num_items if kind in GRADED else num_items // 8),
                encoder,
                vocabulary.control,
                short=short,
                long=long,
            )
        ]

    with batches(args, start, short, long, dict(args.shares)) as loader:
        _loop(_trainer(args, state), loader, held_out, args)


@contextmanager
def batches(
    args: argparse.Namespace,
    start: int,
    short: packs.Shape,
    long: packs.Shape,
    changed: Mapping[str, float] | None = None,
) -> Iterator[Loader]:
    """Batches from number `start` on while the body runs, made by processes beside it.

    args     of a command with --tekken, --batches, --device, --seed, --workers and --most-ahead
    changed  shares of kinds that differ from `mixture.SHARES`, in percent
    """
    # A folder of its own: batches that an earlier run left behind are other ones.
    with tempfile.TemporaryDirectory(dir=args.batches, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        workers = packs.start_workers(
            args.tekken,
            folder,
            seed=args.seed,
            num_workers=args.workers,
            start=start,
            most_ahead=args.most_ahead,
            short=short,
            long=long,
            changed=changed,
        )
        loader = Loader(folder, args.device, start)
        try:
            yield loader
        finally:
            loader.close()
            for worker in workers:
                worker.terminate()
                worker.join()


def _loop(
    trainer: Trainer,
    loader: Loader,
    held_out: Callable[[int], list[packs.Batch]],
    args: argparse.Namespace,
) -> None:
    settings, device = trainer.settings, args.device
    before = trainer.seconds
    few = held_out(settings.eval_items)
    started = last_eval = last_save = time.perf_counter()
    recent: deque[Tensor] = deque(maxlen=50)
    first_step = trainer.step_number
    for number, inputs, targets, weights in loader:
        elapsed = time.perf_counter() - started
        if trainer.step_number - first_step <= 3:
            # Compiling is not training.
            started += elapsed
            elapsed = 0.0
        factor = rate_factor(trainer.step_number, elapsed, settings, first_step=first_step)
        is_over = elapsed >= settings.seconds or (args.steps and trainer.step_number >= args.steps)
        recent.append(trainer.step(inputs, targets, weights, factor))
        if trainer.step_number % 20 == 0 and device != "cpu":
            torch.cuda.synchronize()  # so that time means work done
        trainer.seconds = before + elapsed
        now = time.perf_counter()
        if trainer.step_number % args.log_every == 0:
            loss = float(torch.stack(list(recent)).mean())
            rate = (trainer.step_number - first_step) * len(targets) / max(elapsed, 1e-9)
            logger.info(
                "step %d batch %d loss %.4f rate %.3f %.0fk tokens/s waited %.1f s at %.0f s",
                trainer.step_number,
                number,
                loss,
                factor,
                rate / 1e3,
                loader.waited_s,
                trainer.seconds,
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss {loss} at step {trainer.step_number}")
        if is_over:
            _save(trainer, args)  # before anything can go wrong in the last evaluation
        if now - last_eval > settings.eval_every_s or is_over:
            items = held_out(args.final_items) if is_over and args.final_items else few
            skills = measure(trainer, items, device)
            entry = {
                "step": trainer.step_number,
                "tokens": trainer.tokens,
                "seconds": round(trainer.seconds, 1),
                "loss": float(torch.stack(list(recent)).mean()),
                "rate": factor,
                "skills": skills,
            }
            trainer.curve.append(entry)
            spoken = " ".join(f"{k} {s['exact']:.2f}/{s['loss']:.3f}" for k, s in skills.items())
            logger.info("skills at step %d: %s", trainer.step_number, spoken)
            last_eval = time.perf_counter()
        if now - last_save > args.save_every or is_over:
            _save(trainer, args)
            last_save = time.perf_counter()
        if is_over:
            return


def _save(trainer: Trainer, args: argparse.Namespace) -> None:
    scratch = args.out / "checkpoint.part"
    save_checkpoint(trainer.weights, scratch)
    record = {
        "settings": asdict(trainer.settings),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "first_batch": args.first_batch,
        "batch_tokens": args.tokens or packs.SHORT.tokens,
        "warm_start": args.warm_start and checkpoint_identity(args.warm_start),
        "step": trainer.step_number,
        "tokens": trainer.tokens,
        "seconds": trainer.seconds,
        "curve": trainer.curve,
    }
    (scratch / "record.json").write_text(json.dumps(record, indent=1))
    final = args.out / "checkpoint"
    if final.exists():
        for path in final.iterdir():
            path.unlink()
        final.rmdir()
    scratch.rename(final)
    torch.save(trainer.state(), args.out / "state.part")
    (args.out / "state.part").rename(args.out / "state.pt")
    logger.info("saved at step %d", trainer.step_number)


def _share(text: str) -> tuple[str, float]:
    kind, _, percent = text.partition("=")
    if kind not in SHARES:
        raise argparse.ArgumentTypeError(f"{kind!r} is no kind; there are {', '.join(SHARES)}")
    return kind, float(percent)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pocket.train", description=__doc__)
    parser.add_argument("--tekken", type=Path, required=True, help="tekken.json")
    parser.add_argument("--out", type=Path, required=True, help="state and checkpoints")
    parser.add_argument("--batches", type=Path, required=True, help="scratch folder for batches")
    parser.add_argument("--warm-start", type=Path, help="checkpoint folder to begin with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--decay-seconds", type=float, default=200.0)
    parser.add_argument("--steps", type=int, default=0, help="end after this step, if not 0")
    parser.add_argument(
        "--decay-steps", type=int, default=0, help="fall over the last of --steps, not by time"
    )
    parser.add_argument("--first-batch", type=int, default=0)
    parser.add_argument("--muon-rate", type=float, default=0.006)
    parser.add_argument("--adam-rate", type=float, default=0.001)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--most-ahead", type=int, default=1500)
    parser.add_argument("--eval-every", type=float, default=60.0)
    parser.add_argument("--eval-items", type=int, default=96)
    parser.add_argument("--final-items", type=int, default=0, help="items a kind at the end")
    parser.add_argument("--save-every", type=float, default=120.0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument(
        "--shares",
        nargs="*",
        type=_share,
        default=[],
        metavar="KIND=PERCENT",
        help="other shares of the training tokens than mixture.SHARES",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--mlp-width", type=int, default=768)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--vision-width", type=int, default=256)
    parser.add_argument("--tokens", type=int, help="tokens of a batch (trials on small machines)")
    return parser.parse_args(arguments)


def main() -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(parse())


if __name__ == "__main__":
    main()
