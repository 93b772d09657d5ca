"""The table of docs/guide/sister-models.md: what each model weighs, and where it fits.

`python -m tools.sister_table` writes it from the published configs in tests/data/sisters, the
recipe that would be taken, and what `halfbyte plan` computes of them; with `--check` it fails if
the page is stale.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from halfbyte.checkpoint.fields import model_config
from halfbyte.checkpoint.native_fields import native_config
from halfbyte.config import ModelConfig
from halfbyte.quantize.hosting import GPUS, host_on, kv_token_bytes
from halfbyte.recipe.fitted import fitted_recipe
from halfbyte.recipe.plan import make_plan, plan_size

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guide" / "sister-models.md"
CONFIGS = ROOT / "tests" / "data" / "sisters"
BEGIN, END = "<!-- generated: sister-table -->\n", "<!-- end generated -->"
# Smallest memory first; those without FP4 of their own serve NVFP4 weights as well.
_SHOWN = ("l40s", "h100", "rtx-pro-6000", "h200", "b200")
_MODELS = {
    "devstral-2-123b": "Devstral 2 123B",
    "devstral-small-2-24b": "Devstral Small 2 24B",
    "ministral-3-14b": "Ministral 3 14B",
    "ministral-3-8b": "Ministral 3 8B",
    "ministral-3-3b": "Ministral 3 3B",
    "mistral-small-3.2-24b": "Mistral Small 3.1, 3.2, Magistral Small 2509",
    "devstral-small-1-24b": "Devstral Small 1, Magistral Small 2506, 2507",
    "mistral-large-2-123b": "Mistral Large 2 123B",
    "pixtral-large-124b": "Pixtral Large 124B",
}


def table() -> str:
    """One row a model; KV tokens of one GPU beside the weights, by GPU."""
    heads = ["model", "source", "recipe", "file", "KV a token", *_SHOWN]
    rows = [heads, ["---", *["---:" if name != "recipe" else "---" for name in heads[1:]]]]
    rows += [_row(stem, name) for stem, name in _MODELS.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(stem: str, name: str) -> list[str]:
    raw = json.loads((CONFIGS / f"{stem}.json").read_text("utf-8"))
    read = native_config if "dim" in raw else model_config
    is_tied = bool(raw.get("text_config", {}).get("tie_word_embeddings"))
    config = read(raw, has_head=not is_tied)
    recipe = fitted_recipe(config).recipe
    plan = make_plan(recipe, config)
    is_fp8 = "quantization_config" in raw
    source = replace(
        plan, formats=dict.fromkeys(plan.formats, "fp8" if is_fp8 else "bf16"), kv_cache="bf16"
    )
    kv = kv_token_bytes(plan, config.text)
    hosted = [
        host_on(GPUS[gpu], 1, plan, config, context=1024, requests=1).kv_tokens for gpu in _SHOWN
    ]
    return [
        name,
        f"{_gb(plan_size(source, config).num_bytes)} {'FP8' if is_fp8 else 'bf16'}",
        recipe.name,
        _gb(plan_size(plan, config).num_bytes),
        f"{kv / 1e3:.0f} kB",
        *(_tokens(found, config) for found in hosted),
    ]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _tokens(count: int, config: ModelConfig) -> str:
    """Thousands of tokens of KV; how many whole contexts these are where it is at least one."""
    if count == 0:
        return "-"
    whole = count // config.text.max_positions
    return f"{count / 1e3:,.0f}k" + (f" ({whole}x)" if whole else "")


def page(text: str) -> str:
    """The page with its table as it should be."""
    begin = text.index(BEGIN) + len(BEGIN)
    return text[:begin] + "\n" + table() + "\n" + text[text.index(END) :]


def main() -> int:
    """Write the page, or say whether it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    args = parser.parse_args()
    text = PAGE.read_text("utf-8")
    if args.check:
        if page(text) != text:
            print(f"{PAGE.relative_to(ROOT)} is stale: python -m tools.sister_table")
            return 1
        return 0
    PAGE.write_text(page(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
