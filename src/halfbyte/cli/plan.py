"""`halfbyte plan`: what quantizing will need and give, and where the result will serve."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from halfbyte.cli.quantize import METHODS, add_recipe, by_method, parse_bytes

EXAMPLE = """  halfbyte plan models/fp8 --recipe medium-3.5
  halfbyte plan models/fp8 --recipe medium-3.5 --gpu h200 --tp 2 --context 262144 --requests 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="checkpoint directory; config.json (and the index) will do"
    )
    add_recipe(parser)
    parser.add_argument(
        "--method", choices=METHODS, help="as for quantize, instead of the recipe's way"
    )
    parser.add_argument("--samples", type=parse_count, help="calibration rows, not the recipe's")
    parser.add_argument("--tokens-per-sample", type=parse_count, help="likewise")
    parser.add_argument("--device", default="cpu", help="where layers would run (%(default)s)")
    parser.add_argument("--memory", type=parse_bytes, help="as for quantize")
    parser.add_argument("--gpu-memory", type=parse_bytes, help="as for quantize")
    parser.add_argument("--disk-speed", type=parse_bytes, help="a second, instead of measuring")
    parser.add_argument("--no-timing", action="store_true", help="measure nothing, say no time")
    parser.add_argument("--gpu", nargs="+", help="h100, h200, b200, …; all if left out")
    parser.add_argument("--tp", type=parse_count, nargs="+", help="GPUs that share the model")
    parser.add_argument("--context", type=parse_count, help="tokens of a request; the model's most")
    parser.add_argument("--requests", type=parse_count, default=1, help="at once (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def parse_count(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    from halfbyte.machine import available_bytes
    from halfbyte.quantize.capacity import Text, estimate, format_estimate, measure
    from halfbyte.quantize.hosting import format_hosting, host, host_here
    from halfbyte.quantize.survey import survey
    from halfbyte.recipe.plan import make_plan
    from halfbyte.recipe.schema import load_recipe

    source, recipe = survey(args.source), by_method(load_recipe(args.recipe), args.method)
    plan = make_plan(recipe, source.config)
    wanted = recipe.calibration
    is_data_free = recipe.scales.activations == "none"
    text = Text(
        rows=0 if is_data_free else args.samples or wanted.samples,
        tokens_per_row=args.tokens_per_sample or wanted.tokens_per_sample,
    )
    hosted = host(
        plan,
        source.config,
        gpus=args.gpu,
        widths=args.tp,
        context=args.context or source.config.text.max_positions,
        requests=args.requests,
    )
    available = available_bytes()
    if args.gpu is None and args.tp is None and available is not None:
        here = host_here(
            available,
            plan,
            source.config,
            context=hosted[0].context,
            requests=args.requests,
        )
        hosted.append(here)
    speeds = None
    if not args.no_timing:
        speeds = measure(source, device=args.device, read_bytes=args.disk_speed)
    made = estimate(
        source,
        plan,
        text,
        device=args.device,
        memory_bytes=args.memory,
        gpu_memory_bytes=args.gpu_memory,
        speeds=speeds,
    )
    if args.json:
        value = {**asdict(made), "basis": source.basis, "hosting": [asdict(x) for x in hosted]}
        print(json.dumps(value, indent=1))
    else:
        print(f"{format_estimate(source, made)}\n\n{format_hosting(hosted)}")
    return 0
