"""A model's distributions over a text in a compact form, to compare with another model later.

The real models never fit side by side and full distributions of 131072 tokens would be half a
megabyte a position, so a position keeps (decision 0019):

    top      its K most likely tokens with their log-probs
    tail     S tokens drawn from the rest in proportion to their probability, with log-probs
    mass     the probability of the rest
    target   the log-prob of the token that came

The divergence from the kept distribution p to another, full one q is then

    sum over top of p log(p / q)   exact up to the rounding of log-probs to f16
    + mass * mean over tail of log(p / q)   an unbiased estimate

and never less than the same with mass * log(mass / q's mass there) for its second term.

File: safetensors. `token_ids` int32 (windows, W) (-1 beyond the end of a shorter last window),
`top_ids` int32 (N, K), `top_logprobs` f16 (N, K), `tail_ids` int32 (N, S), `tail_logprobs` f16
(N, S), `tail_mass` f32 (N,), `target_logprobs` f32 (N,); N counts the positions with a target,
window after window. The header's metadata says what was run. With multiple-choice items also
`choice_ids` int32 (items, C), `letter_ids` int32 (items, L), both padded with -1, and `right`,
`answers` int32 (items,). With several texts `origins` int32 (windows,) says which each is of.

Shapes: N positions, V vocabulary, K top tokens, S tail samples, W tokens of a window,
C tokens of a choice's prompt, L letters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoint.shards import read_header
from halfbyte.errors import CheckpointError, in_words
from halfbyte.fidelity.choices import EncodedItem

FORMAT = "halfbyte-baseline-1"
TOP_TOKENS = 96
TAIL_SAMPLES = 32
_TENSORS = (
    "token_ids",
    "top_ids",
    "top_logprobs",
    "tail_ids",
    "tail_logprobs",
    "tail_mass",
    "target_logprobs",
)
_CHOICE_TENSORS = ("choice_ids", "letter_ids", "right", "answers")
_FACTS = ("name", "mode", "bytes", "vocab_size", "text_sha256")


class Compact(NamedTuple):
    """What is kept of the distributions of N positions; see the file's head."""

    top_ids: Tensor
    top_logprobs: Tensor
    tail_ids: Tensor
    tail_logprobs: Tensor
    tail_mass: Tensor
    target_logprobs: Tensor


class Divergence(NamedTuple):
    """KL divergence per position, in nats, f64 (N,).

    kl        unbiased estimate
    lower     a bound that holds for every position
    variance  of the estimate, from the spread of the tail's samples
    """

    kl: Tensor
    lower: Tensor
    variance: Tensor


@dataclass(frozen=True, slots=True)
class Baseline:
    """A compact baseline, and the model and texts that it is of.

    windows  token ids of each window
    origins  which text each window is of; empty for a single text
    choices  multiple-choice items, if any, and `answers`: the option found most likely
    """

    name: str
    mode: str
    bytes: int
    vocab_size: int
    text_sha256: str
    windows: tuple[tuple[int, ...], ...]
    positions: Compact
    choices: tuple[EncodedItem, ...] = ()
    answers: tuple[int, ...] = ()
    origins: tuple[int, ...] = ()

    def of_window(self, index: int) -> Compact:
        """The kept distributions at the positions of one window."""
        start = sum(len(window) - 1 for window in self.windows[:index])
        stop = start + len(self.windows[index]) - 1
        return Compact(*(tensor[start:stop] for tensor in self.positions))


def compact(logprobs_NV: Tensor, target_ids_N: Tensor, generator: torch.Generator) -> Compact:
    """Keep top, tail and target of full distributions (f32 log-probs)."""
    top_logprobs, top_ids = logprobs_NV.topk(TOP_TOKENS, dim=-1)
    tail_NV = logprobs_NV.exp().scatter_(1, top_ids, 0.0)
    tail_mass = tail_NV.sum(-1, dtype=torch.float64).float()
    # A position whose rest has underflowed to nothing still needs something to draw; its mass of
    # zero makes the draw count for nothing.
    tail_NV[tail_mass == 0] = 1.0
    tail_ids = torch.multinomial(tail_NV, TAIL_SAMPLES, replacement=True, generator=generator)
    return Compact(
        top_ids.int(),
        top_logprobs.half(),
        tail_ids.int(),
        logprobs_NV.gather(1, tail_ids).half(),
        tail_mass,
        logprobs_NV.gather(1, target_ids_N[:, None])[:, 0],
    )


def divergence(base: Compact, logprobs_NV: Tensor) -> Divergence:
    """KL(base || candidate) of each position; `logprobs_NV` are the candidate's, full."""
    top_ids = base.top_ids.long()
    base_top = base.top_logprobs.double()
    other_top = logprobs_NV.gather(1, top_ids).double()
    head = (base_top.exp() * (base_top - other_top)).sum(-1)
    mass = base.tail_mass.double()
    ratio = base.tail_logprobs.double() - logprobs_NV.gather(1, base.tail_ids.long()).double()
    other_mass = logprobs_NV.exp().scatter(1, top_ids, 0.0).sum(-1, dtype=torch.float64)
    # The log-sum inequality. Where the base has no tail the term is 0.
    bound = mass * (mass.clamp_min(1e-30).log() - other_mass.clamp_min(1e-30).log())
    kl = head + mass * ratio.mean(-1)
    variance = mass.square() * ratio.var(-1) / ratio.shape[-1]
    empty = mass == 0
    return Divergence(torch.where(empty, head, kl), head + bound, torch.where(empty, 0.0, variance))


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file; its directory must exist. Nothing half-written is left behind."""
    tensors = {"token_ids": _padded(baseline.windows)} | {
        name: tensor.contiguous() for name, tensor in baseline.positions._asdict().items()
    }
    if len(set(baseline.origins)) > 1:
        tensors["origins"] = torch.tensor(baseline.origins, dtype=torch.int32)
    if baseline.choices:
        tensors |= {
            "choice_ids": _padded([choice.token_ids for choice in baseline.choices]),
            "letter_ids": _padded([choice.letter_ids for choice in baseline.choices]),
            "right": torch.tensor([c.right for c in baseline.choices], dtype=torch.int32),
            "answers": torch.tensor(baseline.answers, dtype=torch.int32),
        }
    facts = {name: getattr(baseline, name) for name in _FACTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        # safetensors makes a file of the owner's alone; who may read is for umask to say.
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, {"format": FORMAT, "facts": json.dumps(facts)})
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths as one int32 tensor, -1 beyond their ends."""
    padded = torch.full((len(rows), max(map(len, rows))), -1, dtype=torch.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return padded


def _unpadded(padded: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(value for value in row if value >= 0) for row in padded.tolist())


def load_baseline(path: Path) -> Baseline:
    """Read a file that `save_baseline` wrote; raises CheckpointError for anything else."""
    try:
        read_header(path)  # which says in our words what is wrong with it
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a baseline: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is not a baseline of format {FORMAT}")
            facts = json.loads(metadata["facts"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            has_choices = "choice_ids" in file.keys()  # noqa: SIM118  (no mapping)
            kept = {n: file.get_tensor(n) for n in _CHOICE_TENSORS} if has_choices else {}
            has_origins = "origins" in file.keys()  # noqa: SIM118
            origins = tuple(file.get_tensor("origins").tolist()) if has_origins else ()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a baseline: {in_words(error)}") from error
    windows = _unpadded(tensors.pop("token_ids"))
    num_positions = sum(len(window) - 1 for window in windows)
    if any(tensor.shape[0] != num_positions for tensor in tensors.values()):
        raise CheckpointError(f"{path}: positions do not match the windows ({num_positions})")
    if origins and len(origins) != len(windows):
        raise CheckpointError(
            f"{path}: says of {len(origins)} windows which text they are of; it has {len(windows)}"
        )
    choices, answers = _choices(kept) if kept else ((), ())
    return Baseline(
        **{name: facts[name] for name in _FACTS},
        windows=windows,
        positions=Compact(**tensors),
        choices=choices,
        answers=answers,
        origins=origins,
    )


def _choices(kept: Mapping[str, Tensor]) -> tuple[tuple[EncodedItem, ...], tuple[int, ...]]:
    prompts, letters = _unpadded(kept["choice_ids"]), _unpadded(kept["letter_ids"])
    right = kept["right"].tolist()
    choices = tuple(EncodedItem(*row) for row in zip(prompts, letters, right, strict=True))
    return choices, tuple(kept["answers"].tolist())


def concatenate(parts: Sequence[Compact]) -> Compact:
    """Join the positions of several windows into one baseline."""
    return Compact(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
