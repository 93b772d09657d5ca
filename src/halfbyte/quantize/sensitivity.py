"""What each format would cost the final distribution, linear by linear, one layer in memory.

The text is run forward through the source, keeping what enters each layer on the disk. Behind the
last layer a token is drawn at every position from the model's own distribution, and the gradient of
its log-probability goes back, layer by layer in reverse. Where it meets the output of a linear, its
product with the error that a format would make there, squared and halved, is to second order what
that error adds to the KL divergence at this position (decision 0153). The head's cost is measured
as it is: the divergence of its logits. Costs of linears add up to an estimate of a recipe's.

What comes out is a file of JSON; a run that was killed goes on after its last layer.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import halfbyte
from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.backward import Passed, run_backward, run_head_backward
from halfbyte.calibrate.budget import MemoryBudget
from halfbyte.calibrate.stream import READERS, head_statistics, stream_layers
from halfbyte.checkpoint.metadata import read_json
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.config import ModelConfig
from halfbyte.errors import CheckpointError
from halfbyte.files import make_directory
from halfbyte.log import logger
from halfbyte.model.rope import RotaryTable
from halfbyte.modules import (
    Mode,
    WeightFormat,
    fused_partners,
    quantizable_linears,
)
from halfbyte.quantize.groups import Group, groups_of, unmeasured_groups
from halfbyte.quantize.journal import Journal
from halfbyte.quantize.layer import read_weight
from halfbyte.quantize.losses import HeadCost, losses_of
from halfbyte.quantize.staging import locked, work_directory

VERSION = 1
# Tokens that are looked at; more of them tell little more (decision 0153).
TOKENS = 4096
_SEED = 0
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Measuring:
    """What is measured, of what, and where its files lie.

    rows   token ids; the first `TOKENS` of them are looked at
    made   what the rows are, for the fingerprint
    mode   what linears compute where the result will run (`declared` rounds their inputs, too)
    file   the result; work in progress is kept beside it, hidden
    """

    checkpoint: Checkpoint
    rows: Sequence[Tensor]
    made: Mapping[str, Any]
    source: Mapping[str, Any]
    file: Path
    mode: Mode = "declared"
    device: str = "cpu"
    restart: bool = False


def measure_sensitivity(
    measuring: Measuring,
    budget: MemoryBudget | None = None,
    on_step: Progress | None = None,
) -> list[Group]:
    """Measure every group, or take what the file has if it was made of the same.

    on_step  told of steps done and in all: every layer forward and back

    Raises UsageError for a run in progress that was made of something else, CheckpointError,
    FormatError and CapacityError as `quantize` does.
    """
    fingerprint = _fingerprint(measuring)
    found = read_sensitivity(measuring.file, fingerprint, measuring.checkpoint)
    if found is not None and not measuring.restart:
        logger.info("sensitivity: taken from %s", measuring.file)
        return found
    work = work_directory(measuring.file)
    with locked(work):
        losses = _Run(measuring, fingerprint, work, budget or MemoryBudget(None), on_step).run()
        content = {"halfbyte_sensitivity": VERSION, "made_of": fingerprint, "losses": losses}
        partial = work / "result"
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(measuring.file)
        shutil.rmtree(work)
    return _groups(measuring.checkpoint, losses)


def read_sensitivity(
    file: Path, fingerprint: Mapping[str, Any], checkpoint: Checkpoint
) -> list[Group] | None:
    """The groups of a file that was made of the same; None if there is none.

    Raises CheckpointError for a file that is no such thing.
    """
    if not file.exists():
        return None
    content = read_json(file)
    if content.get("halfbyte_sensitivity") != VERSION or not isinstance(
        content.get("losses"), dict
    ):
        raise CheckpointError(f"{file} is no sensitivity of ours; remove it or name another output")
    if content.get("made_of") != json.loads(json.dumps(fingerprint)):
        logger.warning("%s was made of another source, text or mode; it is made anew", file)
        return None
    return _groups(checkpoint, content["losses"])


def read_losses(file: Path, groups: Sequence[Group]) -> Mapping[str, Mapping[WeightFormat, float]]:
    """First member of each group -> format -> loss, from a file that may be of any text or mode.

    Raises CheckpointError for a file that is no such thing, or of another model.
    """
    losses = read_json(file).get("losses")
    if not isinstance(losses, dict):
        raise CheckpointError(f"{file} is no sensitivity of ours; remove it or name another output")
    for group in groups:
        found = losses.get(group.members[0])
        if not isinstance(found, dict) or set(found) != set(group.sizes):
            raise CheckpointError(f"{file}: has no costs of {group.name}; it is of another model")
    return losses


# Inputs, outputs and gradients of all tokens in one layer are kept in bf16 until its linears are
# through; beside them lies the layer, or a group as stored, decoded and encoded.
def sensitivity_bytes(config: ModelConfig, tokens: int = TOKENS) -> tuple[int, int]:
    """Bytes of memory and of disk that measuring takes, interpreter aside."""
    linears = [x for x in quantizable_linears(config) if x.layer == 0]
    weights = [x.out_features * x.in_features for x in linears]
    inputs = {x.name: x.in_features for x in linears if fused_partners(x.name)[0] == x.name}
    kept = 2 * tokens * (sum(inputs.values()) + 2 * sum(x.out_features for x in linears))
    head = 0 if config.text.tied_head else 4 * config.text.vocab_size * config.text.width
    memory = max(kept + max(2 * sum(weights), 8 * max(weights)), head)
    return memory, 2 * tokens * config.text.width * (config.text.num_layers + 3)


def _groups(
    checkpoint: Checkpoint, losses: Mapping[str, Mapping[WeightFormat, float]]
) -> list[Group]:
    groups = unmeasured_groups(checkpoint.config, checkpoint.quantization)
    return [replace(group, losses=losses[group.members[0]]) for group in groups]


def _fingerprint(measuring: Measuring) -> dict[str, Any]:
    return {
        "source": measuring.source,
        "text": measuring.made,
        "mode": measuring.mode,
        "tokens": sum(row.numel() for row in measuring.rows),
        "device": torch.device(measuring.device).type,
        "versions": {"halfbyte": halfbyte.__version__, "torch": metadata.version("torch")},
    }


class _Run:
    """The steps of one measurement: layers forward, the head, layers back."""

    def __init__(
        self,
        measuring: Measuring,
        fingerprint: Mapping[str, Any],
        work: Path,
        budget: MemoryBudget,
        on_step: Progress | None,
    ) -> None:
        self._checkpoint = measuring.checkpoint
        self._text = measuring.checkpoint.config.text
        self._mode = measuring.mode
        self._rows = list(measuring.rows)
        self._device = torch.device(measuring.device)
        self._work = work
        self._budget = budget
        self._on_step = on_step
        groups = unmeasured_groups(self._checkpoint.config, self._checkpoint.quantization)
        self._choices = {group.members[0]: tuple(group.sizes) for group in groups}
        self._journal = Journal(work / "journal")
        if self._journal.exists() and not measuring.restart:
            self._entries = self._journal.resume(fingerprint)
            logger.info("sensitivity: going on after %d finished steps", len(self._entries))
        else:
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._entries = []
            self._journal.start(fingerprint)

    def run(self) -> dict[str, dict[WeightFormat, float]]:
        """Take the steps that are left; returns first member -> format -> loss, in model order."""
        try:
            self._forward()
            self._backward()
        finally:
            self._journal.close()
        found = {k: v for entry in self._entries for k, v in entry.get("losses", {}).items()}
        return {members[0]: found[members[0]] for members in groups_of(self._checkpoint.config)}

    def _note(self, **entry: Any) -> None:
        self._journal.append(entry)
        self._entries.append(entry)
        if self._on_step is not None:
            self._on_step(len(self._entries), 2 * self._text.num_layers + 1)

    def _open(self, folder: str) -> Activations:
        place = self._work / folder
        make_directory(place)
        lengths = [row.numel() for row in self._rows]
        return Activations(lengths, self._text.width, place, in_memory=False)

    def _forward(self) -> None:
        first = len(self._entries)
        if first >= self._text.num_layers:
            return
        activations = self._open("inputs")
        try:
            if first:
                activations.resume(first, self._entries[-1]["inputs"])
            for statistics in stream_layers(
                self._checkpoint,
                self._rows,
                device=self._device,
                activations=activations,
                budget=self._budget,
            ):
                activations.settle()
                observed = {tap: float(x) for tap, x in statistics.observed.items()}
                self._note(inputs=activations.checksum, observed=observed)
        finally:
            activations.close()

    def _checksum(self, layer: int) -> int | None:
        """That of the stored inputs of a layer; nobody noted that of the first, the embeddings."""
        return None if layer == 0 else int(self._entries[layer - 1]["inputs"])

    def _backward(self) -> None:
        layers = self._text.num_layers
        left = 2 * layers + 1 - len(self._entries)
        gradients = self._open("gradients")
        try:
            if left == layers + 1:
                self._head(gradients)
                left -= 1
            else:
                gradients.resume(left, self._entries[-1]["gradients"])
            for layer in range(left - 1, -1, -1):
                losses = self._layer(layer, gradients)
                self._note(gradients=gradients.checksum, losses=losses)
                gradients.forget(layer + 1)
                (self._work / "inputs" / f"activations-{layer + 1}").unlink(missing_ok=True)
        finally:
            gradients.close()

    def _head(self, gradients: Activations) -> None:
        checkpoint, layers = self._checkpoint, self._text.num_layers
        inputs = self._open("inputs")
        try:
            inputs.resume(layers, self._checksum(layers))
            losses = {}
            name = "embedding" if self._text.tied_head else "head"
            self._budget.check(checkpoint.num_bytes(f"{name}.weight"))
            head_VD = checkpoint.decoded(name, device=self._device)
            norm_D = checkpoint.tensor("norm.weight").to(self._device)
            cost = None
            if not self._text.tied_head:
                statistics = head_statistics(checkpoint, inputs, device=self._device)
                observed = float(statistics.input_of("head"))
                cost = HeadCost(head_VD, self._choices["head"], observed, self._mode)
            generator = torch.Generator().manual_seed(_SEED)
            for number in range(len(self._rows)):
                self._budget.check()
                x_TD = inputs.read(number).to(self._device)
                passed = run_head_backward(self._text, norm_D, head_VD, x_TD, generator)
                if cost is not None:
                    cost.add(passed.hidden_TD, passed.logits_TV)
                gradients.write(number, passed.before_TD.cpu())
            gradients.advance(layers)
            gradients.settle()
            if cost is not None:
                losses["head"] = cost.means()
        finally:
            inputs.close()
        self._note(gradients=gradients.checksum, losses=losses)

    def _layer(self, layer: int, gradients: Activations) -> dict[str, dict[WeightFormat, float]]:
        checkpoint, prefix = self._checkpoint, f"decoder.{layer}"
        inputs = self._open("inputs")
        shorts = [short for readers in READERS.values() for short in readers]
        weights = {}
        for short in shorts:
            self._budget.check(2 * checkpoint.num_bytes(f"{prefix}.{short}.weight"))
            weights[short] = checkpoint.decoded(f"{prefix}.{short}", device=self._device)
        for norm in ("attention_norm", "mlp_norm"):
            weights[norm] = checkpoint.tensor(f"{prefix}.{norm}.weight").to(self._device)
        table = RotaryTable(self._text, self._device)
        passed: list[Passed] = []
        try:
            inputs.resume(layer, self._checksum(layer))
            for number, row in enumerate(self._rows):
                self._budget.check()
                rotation = table.at(torch.arange(row.numel(), device=self._device))
                x_TD = inputs.read(number).to(self._device)
                after_TD = gradients.read(number).to(self._device)
                found = run_backward(self._text, weights, x_TD, after_TD, rotation)
                gradients.write(number, found.before_TD.cpu())
                passed.append(found._replace(before_TD=found.before_TD[:0]))
            gradients.advance(layer)
            gradients.settle()
        finally:
            inputs.close()
        weights.clear()
        observed = self._entries[layer]["observed"]
        return {
            f"{prefix}.{readers[0]}": losses_of(
                [read_weight(checkpoint, f"{prefix}.{short}", self._device) for short in readers],
                tap,
                self._choices[f"{prefix}.{readers[0]}"],
                passed,
                observed[tap],
                self._mode,
                self._budget,
            )
            for tap, readers in READERS.items()
        }


def text_digest(rows: Sequence[Tensor]) -> str:
    """SHA-256 of all token ids, which tells these rows from others."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.numel().to_bytes(8, "little"))
        digest.update(row.numpy().tobytes())
    return digest.hexdigest()


def some_rows(rows: Sequence[Tensor], tokens: int = TOKENS) -> list[Tensor]:
    """So many tokens of evenly spaced rows; the last of them is cut."""
    total = sum(row.numel() for row in rows)
    step = max(1, total // tokens)
    taken: list[Tensor] = []
    left = tokens
    for row in rows[::step]:
        if left <= 1:
            break
        taken.append(row[:left])
        left -= taken[-1].numel()
    return [row for row in taken if row.numel() > 1]
