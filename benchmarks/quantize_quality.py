"""What each calibration method costs a real small model: perplexity and KL divergence side by side.

Question: on SmolLM2-135M-Instruct, how far are the mixed checkpoints calibrated by each method
from the bf16 model, and how far is NVFP4 everywhere?

Method: the FP8 source is made of the bf16 model and quantized in every way of `VARIANTS`, or those
that `--variants` names, on the same rows of the text in the package. With `--keep` checkpoints
that a run before has finished are taken as they are. Each checkpoint scores held-out text through
the engine's own path, in mode `declared` (weights, activations and cache rounded as FP4 hardware
would; what the format promises) and in mode `weight_only` (what an engine without FP4 products
does). KL is per token over the full vocabulary, its interval a t interval over windows; every two
variants are also compared paired, position by position. No clock is read: load does not matter.

Reading the result: half of the loss of the mixed format comes from FP4 activations. None of this
predicts the 128B model: 135M parameters have no room, so this is a stress test. NVFP4 everywhere is
there as a warning: attention and the edge layers earn their bytes. The text is short and one: its
intervals speak of it alone, and the paired ones (`pairs`) tell methods apart whose own overlap.
`--text` takes a longer one.

`docs/guide/choosing-a-format.md` draws the record: bytes against KL.

Last record: benchmarks/records/quantize_quality.json.

Run: PYTHONPATH=src python benchmarks/quantize_quality.py && python -m tools.docs
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte import log
from halfbyte.bench import record
from halfbyte.checkpoint.gguf import import_gguf, packaged_file
from halfbyte.checkpoint.manifest import read_manifest
from halfbyte.fidelity.comparison import ModelRow, PairRow
from halfbyte.fidelity.models import compare_models
from halfbyte.figures import Against, Figure
from halfbyte.quantize.budget import Asked, made_to_measure
from halfbyte.quantize.fp8_source import make_fp8_source
from halfbyte.quantize.job import QuantizeConfig
from halfbyte.quantize.pipeline import quantize
from halfbyte.quantize.scales import METHODS
from halfbyte.recipe.schema import load_recipe

RECORD = Path(__file__).parent / "records" / "quantize_quality.json"
HELD_OUT = Path(__file__).parents[1] / "src/halfbyte/fidelity/data/held_out.txt"
# Name -> recipe, method. A budget has the bytes of the first variant, which is made before it.
VARIANTS: Mapping[str, tuple[str, str]] = {
    "max": ("medium-3.5", "max"),
    "headroom": ("medium-3.5", "headroom"),
    "mse": ("medium-3.5", "mse"),
    "weighted": ("medium-3.5", "weighted"),
    "gptq": ("medium-3.5", "gptq"),
    "smooth": ("medium-3.5", "smooth"),
    "gptq-smooth": ("medium-3.5", "gptq-smooth"),
    "data-free": ("medium-3.5", "none"),
    "budget": ("budget", "max"),
    "budget, gptq-smooth": ("budget", "gptq-smooth"),
    "NVFP4 everywhere": ("nvfp4-everywhere", "max"),
    "NVFP4 everywhere, gptq-smooth": ("nvfp4-everywhere", "gptq-smooth"),
}
MODES = ("declared", "weight_only")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--text", type=Path, default=HELD_OUT)
    parser.add_argument("--tokens", type=int, help="use only so many tokens of the text")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens-per-row", type=int, default=512)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--keep", action="store_true", help="go on with what lies in --work")
    parser.add_argument("--out", type=Path, default=RECORD)
    return parser.parse_args()


def make(args: argparse.Namespace) -> dict[str, Any]:
    """All checkpoints; returns the mean output SQNR of each method on NVFP4 linears."""
    if not args.keep:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "bf16").exists():
        import_gguf(packaged_file("smollm2"), args.work / "bf16")
    if not (args.work / "fp8").exists():
        make_fp8_source(args.work / "bf16", args.work / "fp8")
    errors: dict[str, Any] = {}
    for name in args.variants:
        recipe_name, method = VARIANTS[name]
        if directory_of(args, name).exists():
            continue
        is_budget = recipe_name == "budget"
        recipe = load_recipe("medium-3.5" if is_budget else recipe_name)
        wanted = replace(
            recipe.calibration, samples=args.rows, tokens_per_sample=args.tokens_per_row
        )
        recipe = replace(recipe, scales=METHODS[method], calibration=wanted)
        config = QuantizeConfig(
            args.work / "fp8", directory_of(args, name), recipe, with_errors=name == "max"
        )
        if is_budget:
            first = next(iter(VARIANTS))
            size = sum(x.stat().st_size for x in directory_of(args, first).glob("*.safetensors"))
            asked = Asked(size, f"the bytes of {first}")
            config = replace(config, recipe=made_to_measure(config, asked, recipe.scales).recipe)
        result = quantize(config)
        if name == "max":
            some = [x["output_db"] for x in result.linears if x["format"] == "nvfp4"]
            errors = {m: round(sum(x[m] for x in some) / len(some), 2) for m in some[0]}
    return errors


def directory_of(args: argparse.Namespace, name: str) -> Path:
    """Where the checkpoint of a variant lies."""
    directory: Path = args.work / name.replace(",", "").replace(" ", "-")
    return directory


def calibrated_on(directory: Path) -> int:
    """How many tokens a checkpoint of ours was calibrated on."""
    manifest = read_manifest(directory)
    assert manifest is not None, directory
    return int(manifest.made_of["calibration"]["tokens"])


def main() -> None:
    args = parse()
    log.configure(level="warning")
    errors = make(args)
    candidates = [("fp8", args.work / "fp8", "weight_only")]
    candidates += [
        (name, directory_of(args, name), mode) for name in args.variants for mode in MODES
    ]
    found = compare_models(
        args.work / "bf16",
        candidates,  # type: ignore[arg-type]
        args.text,
        max_tokens=args.tokens,
        progress=lambda done, of: print(f"window {done} of {of}", flush=True),
    )
    print(found.table())
    results: dict[str, Any] = {
        "text": args.text.name,
        "text_sha256": found.text_sha256,
        "scored_tokens": found.num_tokens,
        "windows": found.num_windows,
        "calibration_tokens": calibrated_on(directory_of(args, args.variants[0])),
        "output_db_of_nvfp4_linears": errors,
        "bf16_perplexity": round(found.base.perplexity, 3),
        "rows": [row_facts(row) for row in found.candidates],
        "pairs": [pair_facts(pair) for pair in found.pairs],
    }
    record.write(
        args.out,
        name="quantize_quality",
        question="Perplexity and KL of a real small model by calibration method?",
        command="PYTHONPATH=src python benchmarks/quantize_quality.py " + " ".join(sys.argv[1:]),
        figures=quality_figures(results),
        results=results,
    )
    if not args.keep:
        shutil.rmtree(args.work, ignore_errors=True)


def quality_figures(results: dict[str, Any]) -> list[Figure]:
    """How far each variant's answers are from bf16's, in both arithmetics."""
    worst, card = ({row["mode"]: row["kl_mean"] for row in results["rows"] if row["name"] == name}
                   for name in ("NVFP4 everywhere", "max"))  # fmt: skip
    figures = []
    for row in results["rows"]:
        conditions = {"model": "SmolLM2-135M", "weights": row["name"], "arithmetic": row["mode"]}
        against: tuple[Against, ...] = ()
        if row["mode"] in worst and row["name"] != "NVFP4 everywhere":
            against = (Against("NVFP4 everywhere", worst[row["mode"]]),)
        if row["mode"] in card and row["name"].startswith("budget"):
            was = card[row["mode"]]
            against += (Against("max", was), Against("at most", 0.85 * was, is_bound=True))
        figures.append(Figure("KL divergence from bf16", row["kl_mean"], "nats/token", "fidelity",
                              conditions, against))  # fmt: skip
    return figures


def pair_facts(pair: PairRow) -> dict[str, Any]:
    interval = pair.kl_interval
    return {
        "of": pair.second,
        "minus": pair.first,
        "kl_difference": round(pair.kl_difference, 5),
        "kl_interval": None if interval is None else [round(v, 5) for v in interval],
    }


def row_facts(row: ModelRow) -> dict[str, Any]:
    assert row.kl_mean is not None and row.top1_agreement is not None
    return {
        "name": row.name,
        "mode": row.mode,
        "megabytes": round(row.bytes / 1e6, 1),
        "perplexity": round(row.perplexity, 3),
        "kl_mean": round(row.kl_mean, 5),
        "kl_interval": None if row.kl_interval is None else [round(v, 5) for v in row.kl_interval],
        "top1_agreement": round(row.top1_agreement, 4),
        "kl_by_position": {k: round(v, 5) for k, v in (row.kl_by_position or {}).items()},
    }


if __name__ == "__main__":
    main()
