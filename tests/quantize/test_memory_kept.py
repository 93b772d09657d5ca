"""`--memory` is kept, as the system sees it, however wrong the plan is.

Runs are processes of their own on a model whose layers are large beside what else they hold.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.machine import held
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.staging import work_directory
from halfbyte.recipe.schema import load_recipe

pytestmark = pytest.mark.skipif(held() is None, reason="this system does not say what is held")

MIB = 1 << 20
LAYERS = 2

# The plan is replaced by one that promises everything, or nothing but the layer at work. Without a
# budget the next layer is all there before work goes on, so that what speed costs does not hang on
# the machine.
_RUN = """
import json, sys
from pathlib import Path
from concurrent.futures import wait
from halfbyte.calibrate.stream import _Loader
from halfbyte.errors import CapacityError
from halfbyte.quantize import job
from halfbyte.quantize.memory import MemoryPlan
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe
begin = _Loader.prefetch
folder, output, plan, budget = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]) or None
def prefetch(self, layer):
    begin(self, layer)
    if self._next is not None and budget is None:
        wait([self._next.loading])
_Loader.prefetch = prefetch
job.plan_memory = lambda *_, **__: MemoryPlan(0, plan == "lavish", plan == "lavish")
config = job.QuantizeConfig(
    Path(folder, "source"), Path(folder, output), load_recipe("fp8"),
    calibration_tokens=Path(folder, "tokens"), memory_bytes=budget, with_errors=False)
done, said = [], ""
try:
    quantize(config, lambda layer, _: done.append(layer), owns_process=True)
except CapacityError as error:
    said = str(error)
status = Path("/proc/self/status").read_text().split()
print(json.dumps([done, said, int(status[status.index("VmHWM:") + 1]) << 10]))
"""


@dataclass(frozen=True)
class Outcome:
    done: list[int]
    said: str
    peak_bytes: int


def started(folder: Path, output: str, plan: str, budget_bytes: int = 0) -> Callable[[], Outcome]:
    """A run that has begun; calling what comes back waits for its end."""
    arguments = [folder, output, plan, budget_bytes]
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        # Runs go beside each other; threads that wait for a core take it from the others.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def outcome() -> Outcome:
        said, _ = process.communicate()
        assert process.returncode == 0, f"{output}: the run ended with {process.returncode}"
        return Outcome(*json.loads(said))

    return outcome


def content(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    config = tiny_config(layers=LAYERS)
    wide = replace(config, text=replace(config.text, width=1024, mlp_width=10240))
    write_tiny_checkpoint(folder / "source", config=wide, dialect="mistral-fp8")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (3, 32), generator=generator)
    save_file({"batch0.input_ids": ids}, folder / "tokens")
    return folder


# The work takes some seconds; a machine that does much else beside may take its time.
@pytest.mark.timeout(300)
def test_whatever_the_plan_says_the_budget_is_kept_and_the_bytes_are_the_same(folder: Path) -> None:
    runs = started(folder, "lean", "lean"), started(folder, "lavish", "lavish")
    lean, lavish = (outcome() for outcome in runs)
    everything = content(folder / "lean")
    assert content(folder / "lavish") == everything
    # What is held for speed does not fit: it is given up. And the layer at work does not fit: the
    # run ends.
    tight, too_little = (lean.peak_bytes + lavish.peak_bytes) // 2, lean.peak_bytes - 50 * MIB
    assert lavish.peak_bytes > lean.peak_bytes + 25 * MIB, "speed has cost no memory"
    runs = started(folder, "kept", "lavish", tight), started(folder, "ended", "lavish", too_little)
    kept, ended = (outcome() for outcome in runs)
    assert (kept.done, kept.said) == ([1, 2], "") and kept.peak_bytes <= tight
    assert content(folder / "kept") == everything
    assert ended.peak_bytes <= too_little
    assert "with nothing in memory besides the layer at work" in ended.said
    assert "finished steps are kept" in ended.said
    assert work_directory(folder / "ended").is_dir() and not (folder / "ended").exists()
    # It goes on where there is more.
    config = QuantizeConfig(
        folder / "source",
        folder / "ended",
        load_recipe("fp8"),
        calibration_tokens=folder / "tokens",
        with_errors=False,
    )
    resumed: list[int] = []
    quantize(config, lambda layer, _: resumed.append(layer))
    assert ended.done + resumed == [1, 2]
    assert content(folder / "ended") == everything
