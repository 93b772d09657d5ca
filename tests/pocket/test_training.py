"""Packing, the optimizer, the course of the rate, and going on from a saved state."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pocket.encode import Encoder
from pocket.model import Model, attend_one_by_one, initial_weights, pocket_config
from pocket.packs import LONG_EVERY, Shape, held_out_batches, training_batch
from pocket.train import (
    Muon,
    Settings,
    Trainer,
    load_checkpoint,
    measure,
    parse,
    rate_factor,
    run,
    save_checkpoint,
    to_device,
)
from pocket.vocabulary import Vocabulary

from pocket import packs

SHORT = Shape(2048, 80, 1024, 2048, 80)
# For steps: they must be quick.
SMALL = Shape(768, 60, 768, 64, 30)
LONG = Shape(8192, 40, 8192, 1024, 30)
TINY = {"layers": 1, "width": 128, "mlp_width": 128, "vision_layers": 1, "vision_width": 128}


def same(left: packs.Batch, right: packs.Batch) -> bool:
    return all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in packs.Batch.__slots__
    )


def test_a_batch_follows_from_its_number(tmp_path: Path, vocabulary: Vocabulary) -> None:
    encoder, control = Encoder(vocabulary), vocabulary.control
    batch = training_batch(3, 7, encoder, control, SHORT, LONG)
    assert same(batch, training_batch(3, 7, Encoder(vocabulary), control, SHORT, LONG))
    assert not same(batch, training_batch(4, 7, encoder, control, SHORT, LONG))
    batch.save(tmp_path / "b.npz")
    assert same(batch, packs.Batch.load(tmp_path / "b.npz"))


@pytest.mark.parametrize("number", [0, 9])
def test_every_row_of_a_batch_belongs_to_one_sequence(number: int, vocabulary: Vocabulary) -> None:
    shape = LONG if packs.is_long(number) else SHORT
    batch = training_batch(number, 1, Encoder(vocabulary), vocabulary.control, SHORT, LONG)
    for bounds, total, longest in (
        (batch.token_bounds, shape.tokens, shape.document_tokens),
        (batch.patch_bounds, shape.patches, packs.IMAGE_PATCHES),
    ):
        assert bounds[0] == 0 and bounds[-1] == total
        assert (np.diff(bounds) >= 0).all() and np.diff(bounds).max() <= longest
    # Positions begin anew with each document, and nothing is learnt across its end.
    starts = batch.token_bounds[: len(batch.kinds)]
    assert (batch.positions_T[starts] == 0).all()
    ends = batch.token_bounds[1 : len(batch.kinds) + 1] - 1
    assert (batch.weights_T[ends] == 0).all()
    learnt = np.flatnonzero(batch.weights_T)
    assert (batch.targets_T[learnt] == batch.tokens_T[learnt + 1]).all()
    # Every image token has a square of its own, in order.
    found = batch.image_index_T[batch.image_index_T >= 0]
    assert (found == np.arange(len(found))).all()


def test_a_sitting_may_change_the_mixture(vocabulary: Vocabulary) -> None:
    encoder, control = Encoder(vocabulary), vocabulary.control
    changed = dict.fromkeys((kind for kind in packs.shares(long=False) if kind != "drill"), 0.0)
    batch = training_batch(0, 1, encoder, control, SHORT, LONG, changed)
    assert set(batch.kinds.tolist()) == {"drill"}
    assert dict(parse(["--tekken=t", "--out=o", "--batches=b", "--shares", "hard=2.5"]).shares) == {
        "hard": 2.5
    }
    with pytest.raises(SystemExit):
        parse(["--tekken=t", "--out=o", "--batches=b", "--shares", "nothing=2"])


def test_a_worker_whose_batch_is_awaited_never_waits(tmp_path: Path) -> None:
    """Later batches may fill the folder while one is missing: that one must still be made."""
    for number in range(5, 50):
        packs.path_of(tmp_path, number).touch()
    assert packs._first_waiting(tmp_path, 4) + 10 >= 4
    assert packs._first_waiting(tmp_path, 60) + 10 < 60


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    settings = Settings(seconds=100, decay_seconds=40, warmup_steps=10)
    assert rate_factor(0, 0, settings) == pytest.approx(0.1)
    assert rate_factor(50, 30, settings) == 1
    assert rate_factor(50, 80, settings) == pytest.approx(0.5)
    assert rate_factor(50, 101, settings) == 0
    assert rate_factor(50, 99, replace(settings, decay_seconds=0)) == 1
    # A later sitting rises again.
    assert rate_factor(500, 0, settings, first_step=500) == pytest.approx(0.1)


def test_the_rate_falls_by_steps_where_the_command_says_so() -> None:
    """Time then counts for nothing: the same weights on a slow and on a fast machine."""
    settings = Settings(seconds=100, decay_seconds=40, warmup_steps=10, steps=80, decay_steps=20)
    for elapsed in (0.0, 99.0):
        assert rate_factor(0, elapsed, settings) == pytest.approx(0.1)
        assert rate_factor(60, elapsed, settings) == 1
        assert rate_factor(70, elapsed, settings) == pytest.approx(0.5)
        assert rate_factor(80, elapsed, settings) == rate_factor(90, elapsed, settings) == 0


def test_a_batch_that_no_document_fits_into_is_refused(vocabulary: Vocabulary) -> None:
    """It would have no loss at all, and its gradients would be no numbers."""
    encoder, control = Encoder(vocabulary), vocabulary.control
    with pytest.raises(ValueError, match="no document of long_recall fits into 512 tokens"):
        training_batch(LONG_EVERY - 1, 1, encoder, control, SHORT, replace(LONG, tokens=512))


def test_muon_steps_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    weights = {
        name: torch.zeros(shape).requires_grad_()
        for name, shape in {"wide": (16, 48), "tall": (48, 16)}.items()
    }
    muon = Muon(weights, compiled=False)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape)
    muon.step(weights, rate=1.0, momentum=0.9, decay=0.0)
    for name, factor in (("wide", 1.0), ("tall", 3**0.5)):
        values = torch.linalg.svdvals(weights[name].detach() / factor)
        assert values.min() > 0.6 and values.max() < 1.3


def tiny_trainer(seed: int = 0) -> Trainer:
    config = pocket_config(**TINY)
    model = Model(config, "cpu", attend=attend_one_by_one, dtype=torch.float32, compiled=False)
    settings = Settings(10, 0, warmup_steps=1, muon_rate=0.01, adam_rate=0.005)
    return Trainer(
        model=model, weights=initial_weights(config, seed, "cpu"), settings=settings, compiled=False
    )


def test_a_few_steps_teach_a_batch_and_a_state_goes_on_alike(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    batch = next(
        iter(
            held_out_batches(
                "languages",
                range(8),
                Encoder(vocabulary),
                vocabulary.control,
                short=SMALL,
            )
        )
    )
    inputs, targets, weights = to_device(batch, "cpu")
    trainer = tiny_trainer()
    before = trainer.loss(inputs, targets, weights).item()
    for _ in range(4):
        trainer.step(inputs, targets, weights, 1.0)
    assert trainer.loss(inputs, targets, weights).item() < before - 1
    torch.save(trainer.state(), tmp_path / "state.pt")
    other = tiny_trainer(seed=5)
    other.restore(torch.load(tmp_path / "state.pt"))
    losses = [t.step(inputs, targets, weights, 1.0).item() for t in (trainer, other)]
    assert losses[0] == losses[1]
    assert all(torch.equal(w, other.weights[n]) for n, w in trainer.weights.items())
    save_checkpoint(trainer.weights, tmp_path / "checkpoint")
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert all(torch.equal(w.to(torch.bfloat16), loaded[n]) for n, w in trainer.weights.items())


def test_measuring_counts_answers_without_a_miss(vocabulary: Vocabulary) -> None:
    trainer = tiny_trainer()
    batch = next(
        iter(
            held_out_batches(
                "languages",
                range(6),
                Encoder(vocabulary),
                vocabulary.control,
                short=SMALL,
            )
        )
    )
    found = measure(trainer, [batch], "cpu")["languages/none"]
    assert found["n"] == len(batch.kinds) and found["exact"] == 0 and found["loss"] > 5
    inputs, targets, weights = to_device(batch, "cpu")
    for _ in range(10):
        trainer.step(inputs, targets, weights, 1.0)
    learnt = measure(trainer, [batch], "cpu")["languages/none"]
    assert learnt["loss"] < found["loss"] / 1.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sitting_ends_with_a_checkpoint_and_the_next_goes_on(
    tmp_path: Path, tekken: Path
) -> None:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]

    def sit(steps: int) -> argparse.Namespace:
        args = parse(
            [
                f"--tekken={tekken}",
                f"--out={tmp_path / 'out'}",
                f"--batches={tmp_path / 'batches'}",
                "--device=cpu",
                "--workers=1",
                "--tokens=2048",
                f"--steps={steps}",
                "--seconds=1000",
                "--eval-items=1",
                "--log-every=1",
                *sizes,
            ]
        )
        run(args)
        return args

    sit(2)
    first = load_checkpoint(tmp_path / "out" / "checkpoint")
    sit(4)
    assert any(
        not torch.equal(w, first[n])
        for n, w in load_checkpoint(tmp_path / "out" / "checkpoint").items()
    )
