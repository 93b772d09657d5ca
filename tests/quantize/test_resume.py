"""What a run goes on with is proved: the source, the staged output, activations, the journal."""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.checkpoint.shards import StoredTensor, scan
from halfbyte.checkpoint.writer import OutputInProgress
from halfbyte.errors import CheckpointError, HalfbyteError, UsageError
from halfbyte.model.tiny import write_tiny_checkpoint
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.staging import work_directory
from halfbyte.recipe.schema import load_recipe

RECIPE = load_recipe("medium-3.5")
LAYERS, DONE = 6, 3


class _KilledError(BaseException):
    """Stands for a signal: nothing catches it."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, tokens, and what a run left that died after `DONE` layers."""
    root = tmp_path_factory.mktemp("killed")
    write_tiny_checkpoint(root / "source", layers=LAYERS, dialect="mistral-fp8")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (3, 24), generator=generator)
    save_file({"batch0.input_ids": ids}, root / "tokens.safetensors")

    def kill(layer: int, _: int) -> None:
        if layer == DONE:
            raise _KilledError

    with pytest.raises(_KilledError):
        quantize(job(root), kill)
    return root


def job(root: Path) -> QuantizeConfig:
    return QuantizeConfig(
        root / "source",
        root / "out",
        RECIPE,
        calibration_tokens=root / "tokens.safetensors",
        with_errors=False,
    )


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt; as after a move, no file is the one that it was."""
    shutil.copytree(killed, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, offset: int) -> None:
    """Change one bit and put the file's times back."""
    before = path.stat()
    with path.open("rb+") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def read_by(root: Path, *, finished: bool) -> list[StoredTensor]:
    """Tensors of the source that the dead run had read, or had not; declared input scales aside,
    which calibration replaces.
    """
    ahead = tuple(f"model.layers.{layer}." for layer in range(DONE, LAYERS))
    stored = scan(root / "source").values()
    return [
        tensor
        for tensor in stored
        if tensor.name.startswith(ahead) != finished
        and not tensor.name.endswith("activation_scale")
    ]


def test_a_source_that_only_moved_is_gone_on_with(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(job(copy))
    straight = tmp_path / "straight"
    straight.mkdir()
    for name in ("source", "tokens.safetensors"):
        os.rename(copy / name, straight / name)
    quantize(job(straight))
    names = sorted(path.name for path in (straight / "out").iterdir())
    assert names == sorted(path.name for path in (copy / "out").iterdir())
    for name in names:
        assert (straight / "out" / name).read_bytes() == (copy / "out" / name).read_bytes()


@pytest.mark.parametrize("seed", range(12))
def test_a_bit_that_changed_where_the_dead_run_had_read_is_noticed(seed: int, copy: Path) -> None:
    """Anywhere, with the time put back: what is published must not be half of either."""
    rng = random.Random(seed)
    tensor = rng.choice(read_by(copy, finished=True))
    flip(copy / "source" / tensor.path.name, tensor.offset + rng.randrange(tensor.num_bytes))
    with pytest.raises(HalfbyteError) as caught:
        quantize(job(copy))
    # A bit in one of the few places that every run hashes is told before all others.
    said = str(caught.value)
    assert tensor.name in said or "source.model.safetensors.sha256 was" in said
    assert "--restart" in said
    assert not (copy / "out").exists()


def test_a_bit_that_changes_in_the_same_file_is_noticed(copy: Path) -> None:
    """Where nothing was moved: the system's own time of change tells that contents must be read."""
    with pytest.raises(_KilledError):
        quantize(job_restarted(copy), _kill_after_done)
    tensor = next(x for x in read_by(copy, finished=True) if x.name.endswith("down_proj.weight"))
    flip(tensor.path, tensor.offset + 9999)
    with pytest.raises(UsageError, match=r"has changed since .*--restart|sha256 was"):
        quantize(job(copy))


def test_a_source_that_changes_under_a_run_is_not_published(copy: Path) -> None:
    tensor = next(x for x in read_by(copy, finished=True) if x.name.endswith("down_proj.weight"))

    def change(layer: int, _: int) -> None:
        if layer == LAYERS:
            flip(tensor.path, tensor.offset + 9999)

    with pytest.raises(UsageError, match=r"down_proj\.weight has changed since"):
        quantize(job_restarted(copy), change)
    assert not (copy / "out").exists()


def job_restarted(root: Path) -> QuantizeConfig:
    shutil.rmtree(work_directory(root / "out"))
    return job(root)


def _kill_after_done(layer: int, _: int) -> None:
    if layer == DONE:
        raise _KilledError


def test_nothing_is_read_twice_where_nothing_was_touched(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(killed, tmp_path / "copy")
    with pytest.raises(_KilledError):
        quantize(job_restarted(tmp_path / "copy"), _kill_after_done)

    def refuse(tensor: torch.Tensor) -> int:
        raise AssertionError("content was read although the file is as it was")

    monkeypatch.setattr("halfbyte.quantize.source_proof.Reading.note", lambda *_: None)
    monkeypatch.setattr("halfbyte.quantize.source_proof._checksum", refuse)
    monkeypatch.setattr(OutputInProgress, "publish", lambda _: None)
    quantize(job(tmp_path / "copy"))


@pytest.mark.parametrize("seed", range(8))
def test_a_staged_bit_that_changed_is_noticed(seed: int, copy: Path) -> None:
    rng = random.Random(seed)
    output = work_directory(copy / "out") / "checkpoint"
    stored = scan(output)
    ahead = tuple(f"model.layers.{layer}." for layer in range(DONE, LAYERS))
    tensor = rng.choice([x for x in stored.values() if not x.name.startswith(ahead)])
    flip(tensor.path, tensor.offset + rng.randrange(tensor.num_bytes))
    with pytest.raises(UsageError, match=rf"{tensor.name} is not as the last run left .*--restart"):
        quantize(job(copy))
    flip(tensor.path, rng.randrange(8, 200))
    with pytest.raises(UsageError, match=r"header is not as the last run left .*--restart"):
        quantize(job(copy))


def test_stored_activations_that_changed_are_noticed(copy: Path) -> None:
    path = work_directory(copy / "out") / f"activations-{DONE}"
    flip(path, 1234)
    with pytest.raises(CheckpointError, match=r"inputs of layer 3 are not what .*--restart"):
        quantize(job(copy))


GARBAGE = [b"garbage", b"{}", b"[]", b"null", b"\xff\xfe", b'{"entry": 1}', b"[" * 50_000, b""]


@pytest.mark.parametrize("line", range(1 + 1 + DONE))
@pytest.mark.parametrize("garbage", [*GARBAGE, b"a bit"], ids=lambda x: x[:12].hex())
def test_garbage_in_the_journal_is_a_sentence(copy: Path, line: int, garbage: bytes) -> None:
    path = work_directory(copy / "out") / "journal"
    lines = path.read_bytes().split(b"\n")
    if garbage == b"a bit":
        changed = bytearray(lines[line])
        changed[len(changed) // 2] ^= 1
        garbage = bytes(changed)
    lines[line] = garbage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UsageError, match=rf"journal: line {line + 1} .*--restart"):
        quantize(job(copy))
