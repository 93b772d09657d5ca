"""Compiles `kernels/cpu/*.c` with the machine's C compiler and caches the shared library.

The file name holds a hash of the sources, the flags, the compiler and the CPU's features, so a
library is never loaded where it was not made for. It is written under a temporary name and
renamed, so that processes starting together never see half a file.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from halfbyte.errors import UnsupportedError
from halfbyte.log import logger

_SOURCES = Path(__file__).parent / "cpu"
_COMPILERS = ("cc", "gcc", "clang")
# No contraction: see `fused` in vectors.h.
_FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off"),
    *("-std=gnu11", "-fPIC", "-shared", "-pthread"),
)
_LIBRARIES = ("-lm",)
_COMPILE_TIMEOUT_S = 120


def library_path() -> Path:
    """The shared library of this machine, compiled if it is not in the cache.

    Raises UnsupportedError if there is no compiler, or it fails; the message says which.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise UnsupportedError(
            f"there is no C compiler on PATH (looked for {', '.join(_COMPILERS)}); "
            "without one weights are "
            "decoded when loaded, answers take about twice as long, and near ties they may differ"
        )
    sources = sorted(_SOURCES.glob("*.c"))
    name = f"cpu-{_fingerprint(compiler)}.so"
    cached = _cache_directory() / name
    if cached.is_file():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _compile(compiler, sources, cached)
    except OSError as error:
        logger.warning("%s cannot be written (%s); compiling for this process only", cached, error)
        directory = Path(tempfile.mkdtemp(prefix="halfbyte-native-"))
        try:
            return _compile(compiler, sources, directory / name)
        except OSError as second:
            raise UnsupportedError(
                f"there is no room for the compiled kernels: {second}"
            ) from second


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "halfbyte"


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted([*_SOURCES.glob("*.c"), *_SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    status = os.stat(compiler)
    facts = (*_FLAGS, compiler, status.st_size, int(status.st_mtime), _cpu_features())
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:24]


def _cpu_features() -> str:
    """What -march=native depends on, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    told = [line for line in lines if line.startswith(wanted)]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(told))])


def _compile(compiler: str, sources: list[Path], target: Path) -> Path:
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    os.close(descriptor)
    command = [compiler, *_FLAGS, *map(str, sources), "-o", partial, *_LIBRARIES]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "")
            raise UnsupportedError(f"{compiler} could not compile the CPU kernels: {first}")
        Path(partial).replace(target)
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(f"{compiler} took over {_COMPILE_TIMEOUT_S} s") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return target
