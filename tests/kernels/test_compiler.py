"""Sources as they go to the CUDA compiler, without one."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from halfbyte.kernels.cuda import compiler


def test_a_build_for_racecheck_is_kept_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvrtc = SimpleNamespace(nvrtcVersion=lambda major, minor: 0)
    monkeypatch.setattr(compiler, "load_nvrtc", lambda: nvrtc)
    monkeypatch.setattr(compiler, "compile_source", lambda source, *_: source.encode())
    monkeypatch.delenv(compiler.RACECHECK_VARIABLE, raising=False)
    plain = compiler.compile_kernel("prefill", {"N": 256}, directory=tmp_path)
    monkeypatch.setenv(compiler.RACECHECK_VARIABLE, "1")
    checked = compiler.compile_kernel("prefill", {"N": 256}, directory=tmp_path)
    assert b"#define EVERY_LANE_RELEASES 1\n" in checked
    assert checked.replace(b"#define EVERY_LANE_RELEASES 1\n", b"") == plain
    monkeypatch.delenv(compiler.RACECHECK_VARIABLE)
    assert compiler.compile_kernel("prefill", {"N": 256}, directory=tmp_path) == plain
