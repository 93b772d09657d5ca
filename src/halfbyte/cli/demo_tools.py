"""What both halves of the demo use: who tells the story, how a model is quantized and served."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from halfbyte.child import served
from halfbyte.errors import UnsupportedError
from halfbyte.printable import own_stream
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.recipe.schema import load_recipe

# Rows and tokens of each: 4,096 tokens at most, enough for maxima of a small model, and quick.
CALIBRATION = (16, 256)


@dataclass
class Narrator:
    """Says what happens on stdout and keeps it, so that the README can show a real run."""

    lines: list[str] = field(default_factory=list)
    num_steps: int = 5

    def say(self, text: str = "") -> None:
        """Print a line and keep it for the record."""
        print(text, flush=True)
        self.lines.extend(text.splitlines() or [""])

    @contextmanager
    def step(self, number: int, what: str) -> Iterator[None]:
        """Announce a step, and say afterwards how long it took."""
        self.say(f"\n[{number}/{self.num_steps}] {what}")
        started = time.perf_counter()
        yield
        self.say(f"      done in {time.perf_counter() - started:.1f} s")

    def progress(self, unit: str) -> Callable[[int, int], None]:
        """A callback that counts on one line of a terminal and is silent elsewhere."""

        def show(done: int, total: int) -> None:
            if sys.stdout.isatty():
                end = "\r" + " " * 40 + "\r" if done == total else ""
                line = f"\r      {unit} {done} of {total}{end}"
                print(line, end="", flush=True, file=own_stream(sys.stdout))

        return show


def quantized(
    source: Path, target: Path, name: str, calibration: tuple[int, int], narrator: Narrator
) -> int:
    """Quantize by a recipe of the library; returns the number of calibration tokens."""
    recipe = load_recipe(name)
    samples, tokens = calibration
    rows = replace(recipe.calibration, samples=samples, tokens_per_sample=tokens)
    result = quantize(
        QuantizeConfig(
            source=source,
            output=target,
            recipe=replace(recipe, calibration=rows),
            with_errors=False,
        ),
        on_layer=narrator.progress("layer"),
    )
    return result.num_calibration_tokens


def size_of(directory: Path) -> str:
    """Size of a checkpoint's weights as text, in decimal megabytes."""
    return f"{weight_bytes(directory) / 1e6:.0f} MB"


def weight_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a checkpoint."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@contextmanager
def serving(directory: Path, narrator: Narrator) -> Iterator[str]:
    """`halfbyte serve directory` on a free port, as a user would start it; yields its address."""
    log = directory.parent / "server.log"
    started = time.perf_counter()
    with served(directory, log=log, start_limit_s=60.0) as server:
        narrator.say(f"      server ready after {time.perf_counter() - started:.1f} s")
        yield server.url
        status = server.end()
    if status != 0:
        raise UnsupportedError(f"the server ended with status {status}; its log is {log}")
    narrator.say("      server stopped cleanly")
