"""Activations between layers: what is written is what is read, also after a crash."""

import errno
import os
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from halfbyte.calibrate.activations import Activations
from halfbyte.errors import CheckpointError

ROWS = (3, 1, 5)


def rows_of(layer: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    return [torch.randn(tokens, 4, generator=generator).bfloat16() for tokens in ROWS]


def run(activations: Activations, layer: int) -> None:
    for number, row in enumerate(rows_of(layer)):
        activations.write(number, row)
    activations.advance(layer)


@pytest.mark.parametrize("in_memory, on_disk", [(True, False), (True, True), (False, True)])
def test_rows_come_back(tmp_path: Path, in_memory: bool, on_disk: bool) -> None:
    activations = Activations(ROWS, 4, tmp_path if on_disk else None, in_memory=in_memory)
    for layer in range(3):
        run(activations, layer)
        for number, row in enumerate(rows_of(layer)):
            assert torch.equal(activations.read(number), row)
        activations.forget(layer - 1)
    activations.close()
    assert [path.name for path in tmp_path.iterdir()] == (["activations-2"] if on_disk else [])


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_killed_run_goes_on_with_whole_rows(tmp_path: Path, in_memory: bool) -> None:
    killed = Activations(ROWS, 4, tmp_path)
    run(killed, 0)
    run(killed, 1)
    killed.write(0, rows_of(2)[0])  # killed in the middle of a layer
    killed.close()
    again = Activations(ROWS, 4, tmp_path, in_memory=in_memory)
    again.resume(1)
    for number, row in enumerate(rows_of(1)):
        assert torch.equal(again.read(number), row)
    run(again, 2)
    assert torch.equal(again.read(2), rows_of(2)[2])
    again.close()


@pytest.mark.parametrize("written", range(len(ROWS) + 1))
def test_released_rows_are_read_from_disk_whenever_that_is(tmp_path: Path, written: int) -> None:
    activations = Activations(ROWS, 4, tmp_path)
    run(activations, 0)
    for number, row in enumerate(rows_of(1)):
        if number == written:
            activations.release()
        assert torch.equal(activations.read(number), rows_of(0)[number])
        activations.write(number, row)
    activations.advance(1)
    activations.release()
    for number, row in enumerate(rows_of(1)):
        assert torch.equal(activations.read(number), row)
        assert activations.read(number) is not activations.read(number), "still in memory"
    activations.close()


def test_rows_that_are_nowhere_else_are_not_released() -> None:
    activations = Activations(ROWS, 4)
    run(activations, 0)
    activations.release()
    assert torch.equal(activations.read(1), rows_of(0)[1])


def test_stored_rows_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    (tmp_path / "activations-1").write_bytes(b"short")
    for layer in (0, 1):
        with pytest.raises(CheckpointError, match=f"inputs of layer {layer}"):
            Activations(ROWS, 4, tmp_path).resume(layer)


@pytest.mark.parametrize("in_memory, on_disk", [(True, False), (True, True), (False, True)])
def test_a_lent_buffer_may_be_filled_again_when_it_is_given_back(
    tmp_path: Path, in_memory: bool, on_disk: bool
) -> None:
    """As a GPU's rows come: late, in a few buffers that are used over and over."""
    activations = Activations(ROWS, 4, tmp_path if on_disk else None, in_memory=in_memory)
    free: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(2):
        free.put(torch.empty(max(ROWS), 4, dtype=torch.bfloat16))
    for layer in range(3):
        for number, row in enumerate(rows_of(layer)):
            buffer = free.get()
            lent = buffer[: row.shape[0]]
            activations.write_lent(
                number,
                lent,
                ready=lambda lent=lent, row=row: lent.copy_(row),  # type: ignore[misc]
                done=lambda buffer=buffer: free.put(buffer.fill_(torch.nan)),  # type: ignore[misc]
            )
        activations.advance(layer)
        for number, row in enumerate(rows_of(layer)):
            assert torch.equal(activations.read(number), row)
    activations.close()


def test_an_error_of_the_disk_is_raised_and_nothing_counts_as_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    activations = Activations(ROWS, 4, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            run(activations, 0)
    activations.close()
    syncing = Activations(ROWS, 4, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        run(syncing, 0)
        with pytest.raises(OSError, match="No space"):
            syncing.settle()
    syncing.close()
    assert not (tmp_path / "activations-0").exists()


def test_size_is_that_of_the_tensors() -> None:
    assert Activations(ROWS, 4).num_bytes == sum(ROWS) * 4 * 2
