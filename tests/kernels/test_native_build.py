"""Compiling the C: caching, a missing or failing compiler, an unwritable cache, forks, threads."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from halfbyte.errors import UnsupportedError
from halfbyte.kernels import native, native_build

pytestmark = pytest.mark.skipif(
    native.unavailable("cpu") is not None, reason="no C compiler on this machine"
)


def fake_compiler(directory: Path, script: str) -> None:
    directory.mkdir()
    for name in ("cc", "gcc", "clang"):
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="no C compiler on PATH"):
        native_build.library_path()


def test_failing_compiler_is_quoted_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_compiler(tmp_path / "bin", "echo 'x.c:1: error: no such thing' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UnsupportedError, match="error: no such thing"):
        native_build.library_path()
    assert not list((tmp_path / "cache" / "halfbyte").iterdir())


def test_second_start_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count = tmp_path / "count"
    fake_compiler(
        tmp_path / "bin",
        f'echo run >> {count}\nwhile [ "$1" != "-o" ]; do shift; done; echo made > "$2"',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = native_build.library_path()
    assert native_build.library_path() == first
    assert count.read_text() == "run\n"
    assert first.read_text() == "made\n"
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_unwritable_cache_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_compiler(tmp_path / "bin", 'while [ "$1" != "-o" ]; do shift; done; echo made > "$2"')
    (tmp_path / "cache").write_text("a file where the directory should be")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = native_build.library_path()
    assert path.read_text() == "made\n"
    shutil.rmtree(path.parent)


def large_product() -> tuple[torch.Tensor, native.PanelWeight]:
    w_OI = torch.randn(512, 512).to(torch.bfloat16)
    weight = native.prepare_bf16(w_OI)
    assert isinstance(weight, native.PanelWeight)
    return torch.randn(64, 512).to(torch.bfloat16), weight


def test_two_engines_may_call_at_once() -> None:
    """Callers from several Python threads share the pool; each gets its own result, whole."""
    x_TI, weight = large_product()
    expected = native.linear_bf16(x_TI, weight)
    wrong: list[int] = []

    def work() -> None:
        for turn in range(50):
            if not torch.equal(native.linear_bf16(x_TI, weight), expected):
                wrong.append(turn)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_on() -> None:
    """The pool's threads do not survive a fork; the child must not wait for them."""
    x_TI, weight = large_product()
    expected = native.linear_bf16(x_TI, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.linear_bf16(x_TI, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
