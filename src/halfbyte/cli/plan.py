"""`halfbyte plan`: what quantizing will need and give, and where the result will serve."""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.quantize import (
    METHODS,
    add_budget,
    add_calibration,
    add_no_vision,
    add_recipe,
    asked_for,
    by_method,
    chosen_blend,
    parse_bytes,
)
from halfbyte.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.quantize.capacity import CalibrationText, Speeds
    from halfbyte.quantize.hosting import Hosting, Quantizing
    from halfbyte.quantize.survey import Survey
    from halfbyte.recipe.plan import Plan
    from halfbyte.recipe.schema import Recipe

EXAMPLE = """  halfbyte plan models/fp8 --recipe medium-3.5
  halfbyte plan models/fp8 --recipe medium-3.5 --text our_documents.txt
  halfbyte plan models/fp8 --recipe medium-3.5 --gpu h200 --tp 2 --context 262144 --requests 8
  halfbyte plan models/fp8 --recipe medium-3.5 --gpu b200 --price-per-hour 4.50
  halfbyte plan models/fp8 --budget 84GB
  halfbyte plan models/fp8 --fit rtx-pro-6000 --context 65536"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="checkpoint directory; config.json (and the index) will do"
    )
    add_recipe(parser)
    add_budget(parser)
    add_no_vision(parser)
    parser.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE",
        help="for --budget and --fit: the costs that quantize has measured and left beside its "
        "output, as OUTPUT.sensitivity.json",
    )
    parser.add_argument(
        "--method", choices=METHODS, help="as for quantize, instead of the recipe's way"
    )
    add_calibration(parser)
    parser.add_argument("--samples", type=parse_count, help="calibration rows, not the recipe's")
    parser.add_argument("--tokens-per-sample", type=parse_count, help="likewise")
    parser.add_argument("--report", action="store_true", help="count what a report takes, too")
    parser.add_argument("--device", default="cpu", help="where layers would run (%(default)s)")
    parser.add_argument("--memory", type=parse_bytes, help="as for quantize")
    parser.add_argument("--gpu-memory", type=parse_bytes, help="as for quantize")
    parser.add_argument(
        "--disk-speed",
        type=parse_bytes,
        help="bytes a second, as 500MB; it is measured (else 2GB is assumed) if this is left out",
    )
    parser.add_argument("--no-timing", action="store_true", help="measure nothing, say no time")
    parser.add_argument(
        "--gpu",
        nargs="+",
        help="h100, h200, b200, rtx-pro-6000, …: where to serve, and how long quantizing takes "
        "there; all if left out. None has to be here",
    )
    parser.add_argument("--tp", type=parse_count, nargs="+", help="GPUs that share the model")
    parser.add_argument("--context", type=parse_count, help="tokens of a request; the model's most")
    parser.add_argument("--requests", type=parse_count, default=1, help="at once (%(default)s)")
    parser.add_argument(
        "--price-per-hour",
        type=parse_price,
        metavar="PRICE",
        help="of one GPU, or of this machine, in any currency: say what is to be paid",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def parse_count(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_price(text: str) -> float:
    """Read a price above 0 from the command line."""
    try:
        price = float(text)
    except ValueError:
        price = 0.0
    if not 0 < price < 1e6:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a price; write a number above 0, such as 4.50"
        )
    return price


def run(args: argparse.Namespace) -> int:
    from halfbyte.machine import age_s
    from halfbyte.quantize.capacity import CalibrationText, estimate_run
    from halfbyte.quantize.plan_text import (
        format_estimate,
        format_hosting,
        format_measuring,
        format_quantizing,
    )

    source = _source(args)
    is_measured = args.budget is not None or args.fit is not None
    recipe, plan, said = _chosen(args, source, is_measured=is_measured)
    hosted = _hosting(args, source, plan)
    text = (
        CalibrationText(0, 0)
        if recipe.scales.activations == "none"
        else _text(args, source, recipe)
    )
    # What loading the libraries and drawing the text took until here a run takes as well.
    starting_s = age_s() or time.process_time()
    speeds, busy = _speeds(args, source, plan, text)
    made = estimate_run(
        source,
        plan,
        text,
        device=args.device,
        memory_bytes=args.memory,
        gpu_memory_bytes=args.gpu_memory,
        speeds=speeds,
        starting_s=starting_s,
    )
    made = replace(made, busy=busy)
    elsewhere = _elsewhere(args, source, text, sum(made.output.values()))
    price = args.price_per_hour
    if args.json:
        value: dict[str, Any] = {
            **asdict(made),
            "source": {
                "directory": str(source.directory),
                "bytes": source.num_bytes,
                "tensors": source.num_tensors,
                "basis": source.basis,
            },
            "quantizing": [asdict(x) for x in elsewhere],
            "hosting": [asdict(x) for x in hosted],
            "price_per_hour": price,
            "recipe_because": said,
        }
        print(json.dumps(value, indent=1))
    else:
        if said is not None:
            print(f"{said}\n")
        print(format_estimate(source, made, price))
        if is_measured:
            print(format_measuring(source.config, made))
        print(f"\n{format_quantizing(elsewhere, price)}\n\n{format_hosting(hosted, price)}")
    return 0


def _source(args: argparse.Namespace) -> "Survey":
    """What is to be quantized, without its vision tower if that is left out."""
    from halfbyte.quantize.job import refuse_export
    from halfbyte.quantize.survey import survey

    source = survey(args.source)
    refuse_export(args.source, source.quantization)
    if not args.no_vision:
        return source
    if source.config.vision is None:
        raise UsageError(f"--no-vision: {args.source} has no vision tower to leave out")
    return replace(source, config=replace(source.config, vision=None))


def _chosen(
    args: argparse.Namespace, source: "Survey", *, is_measured: bool
) -> "tuple[Recipe, Plan, str | None]":
    """The recipe, the plan that follows from it or from a budget, and why it was chosen."""
    from halfbyte.quantize.budget import outline
    from halfbyte.recipe.fitted import named_or_fitted
    from halfbyte.recipe.plan import make_plan

    if is_measured and args.recipe is not None:
        raise UsageError("--recipe and --budget or --fit exclude each other: both choose formats")
    chosen, said = named_or_fitted(args.recipe, lambda: source.config)
    recipe = by_method(chosen, args.method, is_measured=is_measured)
    if not is_measured:
        return recipe, make_plan(recipe, source.config), said
    outlined, said = outline(source, asked_for(args, source.config), args.sensitivity)
    return recipe, replace(outlined, scales=recipe.scales), said


def _hosting(args: argparse.Namespace, source: "Survey", plan: "Plan") -> "list[Hosting]":
    """How the result would be served on the GPUs that were named, or on all and here."""
    from halfbyte.machine import available_bytes
    from halfbyte.quantize.hosting import host, host_here

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
        context = hosted[0].context
        hosted.append(
            host_here(available, plan, source.config, context=context, requests=args.requests)
        )
    return hosted


def _speeds(
    args: argparse.Namespace, source: "Survey", plan: "Plan", text: "CalibrationText"
) -> "tuple[Speeds | None, float | None]":
    """Speeds of this machine and what other programs took of it; None for what is not measured."""
    from halfbyte.quantize.capacity import measure_speeds

    if args.no_timing:
        return None, None
    watch = _watch()
    speeds = measure_speeds(
        source,
        plan,
        text,
        device=args.device,
        read_bytes=args.disk_speed,
        with_errors=args.report,
    )
    return speeds, None if watch is None else watch.usage().foreign


def _elsewhere(
    args: argparse.Namespace, source: "Survey", text: "CalibrationText", output_bytes: int
) -> "list[Quantizing]":
    """How long the run would take on each of the GPUs that were named, or on all."""
    from halfbyte.quantize.hosting import GPUS, quantizing_time

    moved = 2 * source.num_bytes + output_bytes
    moved += text.num_tokens * source.config.text.width * 2 * source.config.text.num_layers
    return [
        quantizing_time(
            GPUS[name],
            source.config,
            num_tokens=text.num_tokens,
            longest_row=text.tokens_per_row if text.rows else 0,
            moved_bytes=moved,
            disk_bytes_per_s=args.disk_speed,
        )
        for name in dict.fromkeys(args.gpu or GPUS)
    ]


def _watch() -> Any:
    """What notices other programs; None where the system does not say."""
    from halfbyte.bench.idle import Watch
    from halfbyte.errors import UnsupportedError

    try:
        return Watch()
    except UnsupportedError:
        return None


def _text(args: argparse.Namespace, source: "Survey", recipe: "Recipe") -> "CalibrationText":
    """The rows that a run would draw, or how many they may be where they cannot be drawn here."""
    from halfbyte.calibrate.draw import draw
    from halfbyte.calibrate.seeing import picture_bytes
    from halfbyte.calibrate.sources import DataAccess
    from halfbyte.calibrate.tokens import read_rows
    from halfbyte.errors import CheckpointError
    from halfbyte.quantize.capacity import CalibrationText
    from halfbyte.quantize.job import wanted_blend

    if args.calibration_tokens is not None:
        rows, pictures = read_rows(args.calibration_tokens)
        lengths = [row.numel() for row in rows]
        seen = picture_bytes(pictures, source.config)
        return CalibrationText(len(rows), max(lengths, default=0), sum(lengths), pictures=seen)
    blend = wanted_blend(recipe, chosen_blend(args))
    blend = replace(
        blend,
        samples=args.samples or blend.samples,
        tokens_per_sample=args.tokens_per_sample or blend.tokens_per_sample,
    )
    most = CalibrationText(blend.samples, blend.tokens_per_sample)
    if args.data is None and any(x.dataset is not None for x in blend.sources):
        return replace(most, not_drawn=f"the data sets of blend {blend.name} are not here: --data")
    try:
        data = draw(blend, source.directory, access=DataAccess(folder=args.data))
    except CheckpointError as error:
        return replace(most, not_drawn=f"they cannot be drawn: {error}")
    seen = picture_bytes(data.pictures, source.config)
    longest = max(map(len, data.rows))
    return CalibrationText(len(data.rows), longest, data.num_tokens, pictures=seen)
