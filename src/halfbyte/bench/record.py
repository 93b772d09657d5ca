"""Benchmark records: one JSON file per measurement, with all it takes to judge and repeat it.

`write` is called by whatever measured; `docs` renders the tables of README and
benchmarks/README.md from the files. A number that has no record is not published.

A record: `name`, `question` (one line), `command`, `date`, `commit` and `dirty`, `machine`
(processor, cores, memory, device, versions), `figures` (what pages show; `halfbyte.figures`),
`results` (all that was found, in the benchmark's own form), `samples` (every timed sample by name,
with its unit). Where one checkpoint was measured, `checkpoint` is its identity, and a model card of
that checkpoint shows the figures of its speed.
"""

import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.identity import checkpoint_identity
from halfbyte.figures import Figure, figure_fields
from halfbyte.files import write_json

VERSIONS_OF = ("torch", "triton", "transformers", "nvidia-modelopt", "llama-cpp-python", "halfbyte")


def write(
    path: Path,
    *,
    name: str,
    question: str,
    command: str,
    figures: Sequence[Figure] = (),
    results: Mapping[str, Any],
    samples: Mapping[str, Sequence[float]] | None = None,
    checkpoint: Path | str | None = None,
    measured_on: Mapping[str, Any] | None = None,
) -> None:
    """Write a record. `samples` hold every timing, not only the median.

    checkpoint   the directory that was measured, or its identity: a card of it takes the figures
    measured_on  the machine, in the form of `machine`; this one if left out
    """
    commit, dirty = revision()
    identity = checkpoint_identity(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    record: dict[str, Any] = {
        "name": name,
        "question": question,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "dirty": dirty,
        "machine": dict(machine() if measured_on is None else measured_on),
        **({} if identity is None else {"checkpoint": identity}),
        "figures": [figure_fields(figure) for figure in figures],
        "results": dict(results),
        "samples": {key: list(values) for key, values in (samples or {}).items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def own_command() -> str:
    """The `halfbyte` command that runs, so that it can be repeated elsewhere.

    Paths inside the working directory are relative to it.
    """
    here = f"{Path.cwd()}{os.sep}"
    return shlex.join(["halfbyte", *(word.replace(here, "") for word in sys.argv[1:])])


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies: one of them, the nearest by rank."""
    ordered = sorted(values)
    return ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile of the samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU if there is one, and the versions that matter."""
    import torch

    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS_OF if (found := installed(name))},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def installed(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def revision() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it has changes; (None, None) outside of one."""
    root = Path(__file__).resolve().parents[3]
    try:
        commit, changes = (
            subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "src"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changes)
