"""`--memory` is kept, as the system sees it from outside, however wrong the plan is.

Runs are processes of their own on a model whose layers are large beside everything else.
"""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.machine import held
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.quantize.staging import work_directory

pytestmark = pytest.mark.skipif(held() is None, reason="this system does not say what is held")

MIB = 1 << 20
LAYERS = 2

# The plan is replaced by one that promises everything, or nothing but the layer at work. Without a
# budget the next layer is all there before work goes on, so that what speed costs does not hang on
# the machine. Before the process ends it waits to be looked at.
_RUN = """
import sys
from pathlib import Path
from concurrent.futures import wait
from halfbyte.calibrate.stream import _Loader
from halfbyte.errors import CapacityError
from halfbyte.quantize import job
from halfbyte.quantize.memory import MemoryPlan
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe
source, output, tokens = map(Path, sys.argv[1:4])
is_lavish, budget = sys.argv[4] == "lavish", int(sys.argv[5]) or None
begin = _Loader.prefetch
def prefetch(self, layer):
    begin(self, layer)
    if self._next is not None and budget is None:
        wait([self._next.loading])
_Loader.prefetch = prefetch
job.plan_memory = lambda *_, **__: MemoryPlan(0, is_lavish, is_lavish)
config = job.QuantizeConfig(source, output, load_recipe("fp8"), calibration_tokens=tokens,
                            memory_bytes=budget, with_errors=False)
done = []
try:
    quantize(config, lambda layer, _: done.append(layer), owns_process=True)
except CapacityError as error:
    print(error)
print(done, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Outcome:
    said: list[str]
    peak_bytes: int


def run(folder: Path, output: str, plan: str, budget_bytes: int = 0) -> Outcome:
    arguments = [folder / "source", folder / output, folder / "tokens", plan, budget_bytes]
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        said: list[str] = []
        while not said or not said[-1].startswith("["):
            line = process.stdout.readline()
            assert line, f"ended with {process.wait()} after {said}"
            said.append(line.strip())
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        process.stdin.close()
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
    return Outcome(said, peak)


def content(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    config = tiny_config(layers=LAYERS)
    wide = replace(config, text=replace(config.text, width=1024, mlp_width=20480))
    write_tiny_checkpoint(folder / "source", config=wide, dialect="mistral-fp8")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (3, 32), generator=generator)
    save_file({"batch0.input_ids": ids}, folder / "tokens")
    return folder


@pytest.mark.timeout(120)
def test_whatever_the_plan_says_the_budget_is_kept_and_the_bytes_are_the_same(folder: Path) -> None:
    lean, lavish = run(folder, "lean", "lean"), run(folder, "lavish", "lavish")
    everything = content(folder / "lean")
    assert content(folder / "lavish") == everything
    # What is held for speed does not fit: it is given up.
    tight = (lean.peak_bytes + lavish.peak_bytes) // 2
    assert lavish.peak_bytes > lean.peak_bytes + 50 * MIB, "speed has cost no memory"
    kept = run(folder, "kept", "lavish", tight)
    assert kept.said == ["[1, 2]"] and kept.peak_bytes <= tight
    assert content(folder / "kept") == everything
    # The layer at work does not fit: the run ends, and goes on where there is more.
    too_little = lean.peak_bytes - 100 * MIB
    ended = run(folder, "ended", "lavish", too_little)
    assert ended.peak_bytes <= too_little
    assert "with nothing in memory besides the layer at work" in ended.said[0]
    assert "finished steps are kept" in ended.said[0]
    assert work_directory(folder / "ended").is_dir() and not (folder / "ended").exists()
    resumed = run(folder, "ended", "lavish")
    assert json.loads(ended.said[-1]) + json.loads(resumed.said[-1]) == [1, 2]
    assert content(folder / "ended") == everything
