import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from halfbyte.checkpoint.identity import MANIFEST_NAME
from halfbyte.checkpoint.manifest import hash_file, hash_stored, read_manifest
from halfbyte.checkpoint.shard_plan import Shapes
from halfbyte.checkpoint.shards import INDEX_NAME, read_header, read_whole, scan
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.errors import CapacityError, CheckpointError, FormatError, UsageError


def some_tensors(count: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    dtypes = [torch.bfloat16, torch.float8_e4m3fn, torch.float32]
    tensors = {f"t{n:02d}": torch.randn(7, n + 1).to(dtypes[n % 3]) for n in range(count)}
    return {**tensors, "scalar": torch.tensor(0.25), "packed": torch.arange(5, dtype=torch.uint8)}


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


ONE = {"a": ((1,), torch.float32)}


def write(directory: Path, tensors: dict[str, torch.Tensor], limit: int = 10**10) -> Path:
    with ShardWriter(directory, shapes_of(tensors), limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return writer.finish()


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_one_file_without_an_index_if_it_fits(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "out", tensors)
    assert leftovers(tmp_path / "out") == [MANIFEST_NAME, "model.safetensors"]
    back = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].float().equal(tensor.float())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(limit=st.integers(1, 1200))
def test_shards_and_index_for_any_limit(
    tmp_path_factory: pytest.TempPathFactory, limit: int
) -> None:
    out = tmp_path_factory.mktemp("shards") / "out"
    tensors = some_tensors()
    write(out, tensors, limit)
    found = scan(out)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert read_whole(found[name]).float().equal(tensor.float())
    names = [n for n in leftovers(out) if n.endswith(".safetensors")]
    if names == ["model.safetensors"]:
        return
    count = len(names)
    assert names == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in tensors.values()),
        "total_size": sum(t.nbytes for t in tensors.values()),
    }
    for shard in names:
        stored = read_header(out / shard)[0].values()
        assert sum(t.num_bytes for t in stored) <= limit or len(stored) == 1


def test_views_and_strides_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    write(tmp_path / "out", {"t": base.T, "part": base[1:3, 2:4], "half": base[::2]})
    back = load_file(tmp_path / "out/model.safetensors")
    assert back["t"].equal(base.T) and back["part"].equal(base[1:3, 2:4])
    assert back["half"].equal(base[::2])


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, some_tensors(), 300)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_output_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UsageError, match="out exists; choose another name"):
        ShardWriter(out, ONE)
    assert leftovers(tmp_path) == ["out"] and leftovers(out) == ["precious"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file exists"):
        ShardWriter(tmp_path / "file", ONE)


def test_an_empty_output_directory_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", {"a": torch.zeros(1)})
    assert leftovers(tmp_path / "out") == [MANIFEST_NAME, "model.safetensors"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ShardWriter(out, ONE) as writer:
        writer.add("a", torch.zeros(1))
        out.mkdir()
        (out / "other").write_text("x")
        with pytest.raises(UsageError, match="exists"):
            writer.finish()
    assert leftovers(tmp_path) == ["out"] and leftovers(out) == ["other"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with ShardWriter(tmp_path / "out", shapes_of(some_tensors()), 40) as writer:
            for name, tensor in some_tensors().items():
                writer.add(name, tensor)
            raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        run()
    assert leftovers(tmp_path) == []


def test_leaving_without_finish_publishes_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", ONE) as writer:
        writer.add("a", torch.zeros(1))
    assert leftovers(tmp_path) == []


def test_nothing_is_visible_before_finish(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", shapes_of(some_tensors()), 40) as writer:
        for name, tensor in some_tensors().items():
            writer.add(name, tensor)
        writer.write_json("config.json", {"a": 1})
        assert not (tmp_path / "out").exists()
        writer.finish()
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"a": 1}
    assert leftovers(tmp_path) == ["out"]


def test_tensors_without_data_or_with_odd_types_are_refused(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path / "out", {"w": ((3,), torch.float32)}) as writer,
        pytest.raises(FormatError, match="w: a tensor on the meta device"),
    ):
        writer.add("w", torch.empty(3, device="meta"))
    with pytest.raises(FormatError, match=r"w: torch\.complex64 cannot be stored"):
        ShardWriter(tmp_path / "out", {"w": ((3,), torch.complex64)})
    assert leftovers(tmp_path) == []


def test_a_tensor_that_was_promised_and_never_came_is_our_mistake(tmp_path: Path) -> None:
    tensors = some_tensors()
    with ShardWriter(tmp_path / "out", shapes_of(tensors)) as writer:
        for name in tensors.keys() - {"scalar"}:
            writer.add(name, tensors[name])
        with pytest.raises(AssertionError, match=r"never added: \['scalar'\]"):
            writer.finish()
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    calls = 0

    def fill_up(handle: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", fill_up)
    with pytest.raises(CapacityError, match=r"disk full while .* nothing was left behind"):
        write(tmp_path / "out", some_tensors(), 100)
    assert leftovers(tmp_path) == []


FULL = """
import resource, signal, sys, torch
from halfbyte.checkpoint.writer import ShardWriter
from halfbyte.errors import CapacityError
# A limit on file size stands in for a disk that is full: the kernel refuses the write.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    shapes = {f"t{number}": ((1 << 18,), torch.float32) for number in range(4)}
    with ShardWriter(sys.argv[1], shapes) as writer:
        for number in range(4):
            writer.add(f"t{number}", torch.zeros(1 << 18, dtype=torch.float32))
        writer.finish()
except CapacityError:
    sys.exit(7)
"""


def test_a_write_the_kernel_refuses_leaves_nothing(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "out")], check=False, timeout=50
    )
    assert done.returncode == 7
    assert leftovers(tmp_path) == []


def test_the_manifest_holds_origin_and_hashes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", shapes_of(some_tensors()), 300) as writer:
        for name, tensor in some_tensors().items():
            writer.add(name, tensor)
        writer.write_file("note.txt", b"abc")
        writer.finish({"source": "test"})
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.made_of == {"source": "test"}
    found = scan(tmp_path / "out")
    assert set(manifest.tensors) == set(found)
    for name, stored in found.items():
        data = read_whole(stored).reshape(-1).view(torch.uint8).numpy().tobytes()
        assert manifest.tensors[name] == hashlib.sha256(data).hexdigest() == hash_stored(stored)
    assert manifest.files["note.txt"] == hashlib.sha256(b"abc").hexdigest()
    assert INDEX_NAME in manifest.files
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("content", ["{", '{"made_of": {}}', '{"made_of": {}, "tensors": 3}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_the_target_is_returned_and_an_earlier_attempt_leaves_nothing_in_it(
    tmp_path: Path,
) -> None:
    """A process of the same number may have been killed: what it left is no part of this one."""
    rest = tmp_path / f".out.partial-{os.getpid()}"
    rest.mkdir()
    (rest / "old.bin").write_bytes(b"old")
    made = write(tmp_path / "out", some_tensors())
    assert made == tmp_path / "out"
    assert leftovers(made) == [MANIFEST_NAME, "model.safetensors"]
    assert leftovers(tmp_path) == ["out"]


def test_data_begins_at_a_multiple_of_eight_whatever_the_names(tmp_path: Path) -> None:
    """Readers map files into memory and look at wide values in place."""
    for length in range(1, 10):
        made = write(tmp_path / f"out{length}", {"n" * length: torch.ones(40)})
        (file,) = made.glob("*.safetensors")
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert header % 8 == 0, length
        text = file.read_bytes()[8 : 8 + header]
        assert len(text) - len(text.rstrip()) < 8  # no more blanks than that takes
        assert file.stat().st_size == 8 + header + 160
        assert load_file(file)["n" * length].equal(torch.ones(40))


def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path) -> None:
    own = Path(__file__)
    assert hash_file(own) == hashlib.sha256(own.read_bytes()).hexdigest()
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=f"{path.name}: "):
            hash_file(path)
