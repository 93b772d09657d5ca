"""Compiling the C: caching, a missing or failing compiler, an unwritable cache, forks, threads."""

import os
import platform
import shutil
import subprocess
import sys
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


PORTABLE = """
import sys, torch
from halfbyte.kernels import native, native_build, reference
from halfbyte.kernels.dispatch import Rotation
from halfbyte.kernels.paged import PagedContext
native_build._FLAGS = ("-O0", "-march=x86-64", *native_build._FLAGS[2:])
sys.path.insert(0, {tests!r})
from bounded import assert_bounded
assert native.unavailable("cpu") is None
torch.manual_seed(0)
bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
x = torch.randn(19, 64).to(bf16)
for name, arguments in (
    ("bf16", (torch.randn(37, 64).to(bf16),)),
    ("fp8", ((torch.randn(37, 64) * 50).to(e4m3), torch.rand(37))),
    ("nvfp4", (torch.randint(0, 256, (37, 32), dtype=torch.uint8),
               (torch.rand(37, 4) * 400).to(e4m3), torch.rand(37))),
):
    decoded = getattr(reference, "prepare_" + name)(*arguments).w_OI
    weight = getattr(native, "prepare_" + name)(*arguments)
    result = native.linear_bf16(x, weight)
    assert_bounded(result, x @ decoded.T, x.double() @ decoded.double().T)
    assert torch.equal(native.linear_bf16(x[4:5], weight), result[4:5])
cache = torch.zeros(20, 16, 2, 32).to(e4m3)
values = torch.randn(300, 2, 32).to(bf16)
native.store_kv(values, values, cache, cache, torch.arange(300), 0.01, 0.01)
twin = torch.zeros_like(cache)
reference.store_kv(values, values, twin, twin, torch.arange(300), 0.01, 0.01)
assert torch.equal(cache.view(torch.uint8), twin.view(torch.uint8))
rest = (cache, cache, 0.01, 0.01, torch.arange(20).int()[None], torch.tensor([300]).int())
q = torch.randn(5, 6, 32).to(bf16)
starts = torch.tensor([0, 5]).int()
context = PagedContext(*rest, starts, 0.2)
exact = reference.paged_attention(q.float(), context)
assert_bounded(native.paged_attention(q, context), exact.to(bf16), exact)
gate_up = torch.randn(3, 48).to(bf16)
exact = reference.silu_mul(gate_up.float())
assert_bounded(native.silu_mul(gate_up), exact.to(bf16), exact)
codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:48 * 15].view(15, 48).clone()
codes[codes & 0x7F == 0x7F] = 3
weight = (codes.view(e4m3), torch.tensor(0.3), torch.tensor(0.04))
for made, wanted in zip(native.fp8_to_nvfp4(*weight), reference.fp8_to_nvfp4(*weight)):
    assert torch.equal(made.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
assert torch.equal(native.largest_fp8_code(weight[0]), reference.largest_fp8_code(weight[0]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere it is the only path")
def test_the_portable_path_computes_the_same(tmp_path: Path) -> None:
    """Compiled for the oldest 64-bit x86, where neither AVX-512 nor AVX is used."""
    code = PORTABLE.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
