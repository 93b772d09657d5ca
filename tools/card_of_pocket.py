"""The page that shows a card: Pocket's, made by the commands that anybody has.

Pocket is quantized without data (which gives the same bytes on every machine), and its card is
written from two kept runs in tests/data/card/pocket. `python -m tools.card_of_pocket` writes the
page; a test holds it to what the commands make.
"""

import re
import sys
import tempfile
from pathlib import Path

from halfbyte.cli.main import main as halfbyte

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "card-of-pocket.md"
RUNS = ROOT / "tests" / "data" / "card" / "pocket"
_INTRO = """\
# A card: Pocket's

Made by these commands, and held to them by a test. Pocket is the small model of this repository;
its scores are those of a model that babbles, what they are worth stands beside them.

```sh
halfbyte quantize pocket/model mixed/ --recipe medium-3.5 --method none
short="--suite pocket --max-tokens 256 --reasoning-effort none"
halfbyte evaluate pocket/model $short --out evals/fp8
halfbyte evaluate mixed/ $short --out evals/mixed
halfbyte card mixed/ --runs evals/fp8 evals/mixed --title Pocket-NVFP4 --licence apache-2.0
```
"""


def page() -> str:
    """The page's text; versions of torch are left out, since they are the machine's."""
    with tempfile.TemporaryDirectory() as scratch:
        mixed = Path(scratch) / "mixed"
        quiet = ["--log-level", "error"]
        source = str(ROOT / "pocket" / "model")
        quantize = ["quantize", source, str(mixed), "--recipe", "medium-3.5", "--method", "none"]
        runs = [str(RUNS / arm) for arm in ("fp8", "mixed")]
        about = ["--title", "Pocket-NVFP4", "--licence", "apache-2.0"]
        for command in ([*quantize, *quiet], ["card", str(mixed), "--runs", *runs, *about]):
            if halfbyte(command):
                raise SystemExit(f"failed: {' '.join(command)}")
        card = (mixed / "README.md").read_text(encoding="utf-8")
    card = re.sub(r"torch \d[\w.+]*", "torch", card)
    return f"{_INTRO}\n````markdown\n{card.rstrip()}\n````\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
