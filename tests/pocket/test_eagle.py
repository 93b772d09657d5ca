"""The trainer of the EAGLE head: what it computes, which tokens count, and that it learns."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pocket.eagle import PASSES, Passes, guesses, initial_head, loss_of, measure, train
from pocket.eagle import _row_losses as row_losses
from pocket.encode import ANSWER, Encoder
from pocket.model import Inputs, Model, attend_one_by_one, initial_weights, pocket_config
from pocket.packs import Batch, Shape, held_out_batches
from pocket.train import to_device
from pocket.vocabulary import Vocabulary
from torch import Tensor

import tolerances
from bounded import relative
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.model.attention import DenseAttend
from halfbyte.model.load import load_eagle
from halfbyte.model.tiny import write_tiny_eagle

CONFIG = pocket_config(layers=2, width=128, mlp_width=128, vision_layers=1, vision_width=128)
SHAPE = Shape(384, 40, 256, 64, 30)


def model() -> Model:
    return Model(CONFIG, "cpu", attend=attend_one_by_one, dtype=torch.float32, compiled=False)


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.to(torch.bfloat16).float() for name, w in weights.items()}


@pytest.fixture(scope="module")
def batch(vocabulary: Vocabulary) -> Batch:
    """Several conversations of several turns."""
    encoder = Encoder(vocabulary)
    found = held_out_batches(
        "fact", range(8), encoder, vocabulary.control, split="train", short=SHAPE
    )
    return next(iter(found))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return rounded(initial_weights(CONFIG, 1, "cpu"))


def test_the_head_that_is_written_computes_what_was_trained(
    tmp_path: Path, batch: Batch, weights: dict[str, Tensor]
) -> None:
    """Each document as the served draft model computes it alone, in bf16."""
    inputs, _, weights_T = to_device(batch, "cpu")
    head = rounded(initial_head(CONFIG, 2, "cpu"))
    plain = {name: w.to(torch.bfloat16) for name, w in head.items()}
    write_tiny_eagle(tmp_path / "head", CONFIG, layers=1, replaced=plain)
    served = load_eagle(Checkpoint.open_eagle(tmp_path / "head"), CONFIG.text)
    passes = Passes(model(), weights, inputs, weights_T)
    ours_TD = guesses(model(), head, passes.next_TD, passes.hidden_TD, inputs).detach()
    bounds = batch.token_bounds[: len(batch.kinds) + 1].tolist()
    assert len(bounds) > 4
    for start, end in pairwise(bounds):
        # The last entry has no next token.
        own = slice(start, end - 1)
        count = end - 1 - start
        found = served(
            passes.next_TD[own].bfloat16(),
            passes.hidden_TD[own].bfloat16(),
            torch.arange(count),
            DenseAttend([0, count]),
        )
        assert relative(found, ours_TD[own]) <= tolerances.EAGLE_LAYERS


def test_an_entry_counts_if_what_it_guesses_is_an_answers_token(
    batch: Batch, weights: dict[str, Tensor]
) -> None:
    """By plain loops over documents: entry p guesses token p + 2, in every pass."""
    inputs, _, weights_T = to_device(batch, "cpu")
    passes = Passes(model(), weights, inputs, weights_T)
    wanted_T = torch.zeros(len(weights_T))
    for start, end in pairwise(batch.token_bounds.tolist()):
        for entry in range(start, end - 2):
            # Place p of the weights is that of predicting token p + 1.
            wanted_T[entry] = float(batch.weights_T[entry + 1] >= ANSWER)
    found = [counts_T for _, counts_T in passes.guesses_of(model(), initial_head(CONFIG, 0, "cpu"))]
    assert len(found) == len(PASSES)
    assert all(torch.equal(counts_T, wanted_T) for counts_T in found)
    assert 0 < wanted_T.sum() < len(weights_T) / 2


def test_a_perfect_head_loses_the_entropy_alone(weights: dict[str, Tensor]) -> None:
    hidden_RD = torch.randn(5, CONFIG.text.width, generator=torch.Generator().manual_seed(0))
    output = weights["head.weight"]
    log_RV = (hidden_RD @ output.T).log_softmax(-1)
    entropy = -(log_RV.exp() * log_RV).sum(-1)
    torch.testing.assert_close(row_losses(hidden_RD, hidden_RD, output), entropy)
    worse = row_losses(hidden_RD.roll(1, 0), hidden_RD, output)
    assert (worse > entropy).all()


def test_steps_teach_the_head_what_the_model_would_say(
    batch: Batch, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch seen again and again; the model's own weights stay as they are."""
    monkeypatch.setattr("pocket.eagle.WARMUP_STEPS", 1)
    inputs, targets, weights_T = to_device(batch, "cpu")
    # A louder output head, so that the model has opinions that can be learnt.
    loud = weights | {"head.weight": weights["head.weight"] * 20}
    head = initial_head(CONFIG, 3, "cpu")

    def found() -> tuple[float, list[float]]:
        passes = Passes(model(), loud, inputs, weights_T)
        loss = loss_of(model(), head, loud, passes, row_losses).item()
        return loss, measure(model(), head, loud, [batch], "cpu")["fact"]

    loss_before, right_before = found()
    again: list[tuple[int, Inputs, Tensor, Tensor]] = [(0, inputs, targets, weights_T)] * 8
    curve = train(
        model(), loud, head, again,
        seconds=1e6, compiled=False, muon_rate=0.15, adam_rate=0.005, log_every=4,
    )  # fmt: skip
    loss, right = found()
    assert [entry["step"] for entry in curve] == [4, 8]
    assert loss < loss_before / 1.5, (loss_before, loss)
    assert right[0] > right_before[0] + 0.2, (right_before, right)
    assert all(0 <= share <= 1 for share in right)
    assert all(w.grad is None for w in loud.values())
