import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import CheckpointError
from halfbyte.fidelity.baseline import (
    TAIL_SAMPLES,
    TOP_TOKENS,
    Baseline,
    Compact,
    compact,
    divergence,
    load_baseline,
    save_baseline,
)

VOCAB = 1500


def distributions(seed: int, positions: int = 400, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(positions, VOCAB, generator=generator) * spread).log_softmax(-1)


def nearby(logprobs: torch.Tensor, distance: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(77)
    noise = torch.randn(logprobs.shape, generator=generator) * distance
    return (logprobs + noise).log_softmax(-1)


def kept(logprobs: torch.Tensor, seed: int = 0) -> tuple[Compact, torch.Tensor]:
    targets = torch.arange(logprobs.shape[0]) % VOCAB
    return compact(logprobs, targets, torch.Generator().manual_seed(seed)), targets


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("distance", [0.05, 0.5])
def test_estimate_is_the_full_divergence_within_its_stated_error(
    spread: float, distance: float
) -> None:
    base = distributions(1, spread=spread)
    other = nearby(base, distance)
    full = (base.exp() * (base - other)).sum(-1).double()
    found = divergence(kept(base)[0], other)
    assert (found.lower <= full + ROUNDING).all()
    error = (found.kl.mean() - full.mean()).abs()
    standard_error = (found.variance.sum().sqrt() / len(full)).clamp_min(1e-9)
    # Four standard errors, and what rounding log-probs to f16 may do.
    assert error <= 4 * standard_error + ROUNDING


# f16 keeps 11 bits of log-probs: 2**-12 of each, weighed by its probability, so at most 2**-12 of
# the entropy, which is under log(1500) = 7.4.
ROUNDING = 7.4 * 2.0**-12


def test_a_model_does_not_diverge_from_itself() -> None:
    base = distributions(2)
    found = divergence(kept(base)[0], base)
    assert found.kl.abs().max() <= ROUNDING
    assert found.lower.abs().max() <= ROUNDING


def test_position_without_a_tail_counts_its_top_only() -> None:
    logits = torch.full((1, VOCAB), -1e4)
    logits[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    base = logits.log_softmax(-1)
    found = divergence(kept(base)[0], nearby(base, 0.1))
    assert torch.isfinite(found.kl).all() and torch.isfinite(found.lower).all()
    assert found.variance.tolist() == [0.0]


def baseline() -> Baseline:
    positions, _ = kept(distributions(3, positions=7))
    windows = ((1, 2, 3, 4, 5), (6, 7, 8, 9))
    return Baseline("big", "declared", 123, VOCAB, "0" * 64, windows, positions)


def test_file_gives_back_what_was_kept(tmp_path: Path) -> None:
    written = baseline()
    save_baseline(tmp_path / "b.safetensors", written)
    read = load_baseline(tmp_path / "b.safetensors")
    assert read.windows == written.windows
    assert (read.name, read.mode, read.bytes) == ("big", "declared", 123)
    for ours, theirs in zip(read.positions, written.positions, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert torch.equal(read.of_window(1).top_ids, written.positions.top_ids[4:])
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    per_position = TOP_TOKENS * 6 + TAIL_SAMPLES * 6 + 8
    assert (tmp_path / "b.safetensors").stat().st_size < 7 * per_position + 1500


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read as a baseline"):
        load_baseline(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(CheckpointError, match="cannot be read as a baseline"):
        load_baseline(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a baseline"):
        load_baseline(path)
    truncated = tmp_path / "t.safetensors"
    save_baseline(truncated, baseline())
    truncated.write_bytes(truncated.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read as a baseline"):
        load_baseline(truncated)


def test_who_may_read_a_baseline_is_for_umask_to_say(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            save_baseline(tmp_path / "b", baseline())
        finally:
            os.umask(before)
        assert (tmp_path / "b").stat().st_mode & 0o777 == mode
