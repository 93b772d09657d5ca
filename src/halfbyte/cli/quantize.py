"""`halfbyte quantize`: calibrate and quantize a checkpoint by a recipe."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.engine_flags import add_accept
from halfbyte.cli.outputs import output_file
from halfbyte.errors import UsageError
from halfbyte.progress import TimeLeft, say_next

if TYPE_CHECKING:
    from halfbyte.config import ModelConfig
    from halfbyte.quantize.budget import Asked
    from halfbyte.quantize.job import QuantizeConfig
    from halfbyte.recipe.schema import Recipe

EXAMPLE = """\
  halfbyte quantize models/small models/mixed
  halfbyte quantize models/fp8 models/mixed --recipe medium-3.5
  halfbyte quantize models/fp8 models/mixed --recipe medium-3.5 --text our_documents.txt
  halfbyte quantize models/fp8 models/mixed --recipe medium-3.5 --blend our_chats.jsonl
  halfbyte quantize models/fp8 models/small --budget 84GB
  halfbyte quantize models/fp8 models/small --fit rtx-pro-6000 --context 65536"""

METHODS = ("max", "headroom", "mse", "weighted", "gptq", "smooth", "gptq-smooth", "none")
# A budget asks for the least loss in its bytes, and this method has it (decision 0170).
BUDGET_METHOD = "gptq-smooth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="checkpoint directory, bf16 or Mistral FP8; or owner/name@commit with --hub"
    )
    parser.add_argument("output", type=Path, help="directory to make; must not exist")
    add_recipe(parser)
    add_budget(parser)
    add_no_vision(parser)
    parser.add_argument("--context", type=parse_tokens, help="tokens of a request, for --fit")
    parser.add_argument(
        "--products",
        dest="mode",
        choices=("declared", "weight_only"),
        default="declared",
        help="what --budget reckons with: inputs rounded as the formats declare, or left alone, as "
        "on hardware without FP4 products (%(default)s)",
    )
    add_calibration(parser)
    parser.add_argument(
        "--hub", action="store_true", help="fetch the source, and what --data lacks"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="how scales are chosen, instead of the recipe's way, which for --budget and --fit is "
        f"{BUDGET_METHOD}; none needs no data",
    )
    parser.add_argument(
        "--profile",
        choices=("ieee", "cuda", "direct"),
        default="ieee",
        help="whose arithmetic: the reference's on CPUs, on GPUs, or one rounding (%(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where layers run (%(default)s)")
    parser.add_argument(
        "--memory",
        type=parse_bytes,
        help="host memory that is not exceeded, as 12GiB: a run that would ends, and can go on",
    )
    parser.add_argument(
        "--gpu-memory", type=parse_bytes, help="GPU memory to stay within; a device must be given"
    )
    parser.add_argument(
        "--shard-size", type=parse_bytes, default=10 * 10**9, help="largest shard (10GB)"
    )
    parser.add_argument(
        "--report",
        type=output_file,
        metavar="FILE.html",
        help="write a page of errors, ranges, times and memory; beside it the same as .json",
    )
    parser.add_argument(
        "--restart", action="store_true", help="drop an unfinished run instead of going on with it"
    )
    add_accept(parser)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the calibration text; `halfbyte plan` has them as well."""
    parser.add_argument(
        "--calibration-tokens",
        type=Path,
        metavar="FILE",
        help="safetensors file with batch0.input_ids and so on, int64 [rows, tokens]",
    )
    parser.add_argument(
        "--blend",
        help="calibration data, not the recipe's: a blend's name or .yaml, or your own rows, JSON "
        "lines with messages, text, or prompt and response",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="calibrate on this text (.txt, .md), UTF-8"
    )
    parser.add_argument("--data", type=Path, help="folder with data sets, laid out as on the hub")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe`, which lists what there is; `plan` and `inspect plan` have it as well."""
    from halfbyte.recipe.schema import library_recipes

    known = ", ".join(library_recipes())
    parser.add_argument(
        "--recipe",
        help=f"a recipe of the library ({known}), or a .yaml file; left out, the one fitted to the "
        "model's depth, which is said",
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the flags that have a recipe made to measure; `halfbyte plan` has them as well."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--budget",
        type=parse_bytes,
        metavar="SIZE",
        help="have formats chosen, linear by linear, for least loss in weight files of this size, "
        "as 84GB, instead of by a recipe",
    )
    group.add_argument(
        "--fit",
        metavar="GPU",
        help="likewise, in what one GPU (h100, rtx-pro-6000, ...) has for weights beside a request "
        "of --context tokens",
    )


def add_no_vision(parser: argparse.ArgumentParser) -> None:
    """Add `--no-vision`; `halfbyte plan` has it as well."""
    parser.add_argument(
        "--no-vision",
        action="store_true",
        help="leave the vision tower out, which otherwise stays in bf16: a text model is written",
    )


def parse_tokens(text: str) -> int:
    """Read a number of tokens, at least 1, from the command line."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_bytes(text: str) -> int:
    """Read `12GiB`, `10GB`, `1.5TB` or `4096B`; without a unit it is refused: few mean bytes."""
    binary = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
    units = {**binary, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "b": 1}
    lowered = text.strip().lower()
    unit = next((unit for unit in units if lowered.endswith(unit)), "")
    try:
        value = float(lowered.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 12GiB or 10GB") from None
    if not unit:
        number = text.strip()
        raise argparse.ArgumentTypeError(f"{text!r} has no unit; write {number}GiB or {number}GB")
    if not 0 < value < 2**60:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range")
    return int(value)


def by_method(recipe: "Recipe", method: str | None, *, is_measured: bool) -> "Recipe":
    """The recipe with the scales of a method, where one is given; its cache stays as it is.

    is_measured  a budget will choose the formats: BUDGET_METHOD holds where no method is given
    """
    from halfbyte.quantize.scales import METHODS as SCALES_OF

    if method is None and is_measured:
        method = BUDGET_METHOD
    if method is None:
        return recipe
    return replace(recipe, scales=replace(SCALES_OF[method], cache=recipe.scales.cache))


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.hub import locate
    from halfbyte.checkpoint.metadata import read_config
    from halfbyte.quantize.job import QuantizeConfig
    from halfbyte.quantize.page import write_report
    from halfbyte.quantize.pipeline import quantize
    from halfbyte.recipe.fitted import named_or_fitted

    blend = chosen_blend(args)
    source = locate(args.source, allow_hub=args.hub)
    is_measured = args.budget is not None or args.fit is not None
    if args.context is not None and args.fit is None:
        raise UsageError("--context says how much cache --fit leaves room for; give --fit, too")
    if is_measured and args.recipe is not None:
        raise UsageError("--recipe and --budget or --fit exclude each other: both choose formats")
    chosen, said = named_or_fitted(args.recipe, lambda: read_config(source.directory)[0])
    recipe = by_method(chosen, args.method, is_measured=is_measured)
    if said is not None and not is_measured:
        print(said)
    config = QuantizeConfig(
        source=source.directory,
        origin=source.origin,
        output=args.output,
        recipe=recipe,
        profile=args.profile,
        calibration_tokens=args.calibration_tokens,
        blend=blend,
        data_folder=args.data,
        allow_hub=args.hub,
        device=args.device,
        memory_bytes=args.memory,
        gpu_memory_bytes=args.gpu_memory,
        max_shard_bytes=args.shard_size,
        with_errors=args.report is not None,
        restart=args.restart,
        accept=tuple(args.accept),
        has_vision=not args.no_vision,
    )
    if is_measured:
        config = replace(config, recipe=_made_to_measure(args, config))
    result = quantize(
        config,
        owns_process=True,
        on_layer=TimeLeft("layers"),
    )
    if args.report is not None:
        print("report: {} and {}".format(*write_report(result.record, args.report)))
    print(
        f"{result.output}: {result.num_bytes / 1e9:.3f} GB from {result.num_source_bytes / 1e9:.3f}"
        f" GB, {result.num_calibration_tokens} calibration tokens, {result.seconds:.1f} s"
    )
    say_next(
        f"halfbyte verify {shlex.quote(str(args.output))} "
        f"--against {shlex.quote(str(source.directory))}",
        f"halfbyte serve {shlex.quote(str(args.output))}",
    )
    return 0


def _made_to_measure(args: argparse.Namespace, config: "QuantizeConfig") -> "Recipe":
    """The recipe of --budget or --fit, which is written beside the output and said."""
    from halfbyte.checkpoint.metadata import read_config
    from halfbyte.checkpoint.writer import check_target
    from halfbyte.quantize.budget import made_to_measure, recipe_file, summary
    from halfbyte.recipe.schema import load_recipe

    check_target(config.output)
    asked = asked_for(args, read_config(config.source)[0])
    found = made_to_measure(
        config,
        asked,
        config.recipe.scales,
        mode=args.mode,
        on_step=TimeLeft("steps of measuring"),
        owns_process=True,
    )
    print(summary(found))
    if args.method is None:
        print(f"scales by --method {BUDGET_METHOD}, for least loss; --method max takes less time")
    file = recipe_file(config.output)
    print(f"{file}: the recipe, with what every format would cost each group")
    return load_recipe(file)


def asked_for(args: argparse.Namespace, config: "ModelConfig") -> "Asked":
    """Bytes of --budget, or what --fit leaves room for."""
    from halfbyte.quantize.budget import Asked, room_on

    if args.fit is not None:
        return room_on(args.fit, args.context, config)
    size = args.budget
    said = f"{size / 1e9:g}GB" if size >= 10**9 else f"{size / 1e6:g}MB"
    return Asked(size, f"--budget {said}")


def chosen_blend(args: argparse.Namespace) -> str | None:
    """The calibration data that was named by either flag."""
    from halfbyte.calibrate.rows import TEXT_SUFFIXES

    if args.text is None:
        blend: str | None = args.blend
        return blend
    if args.blend is not None:
        raise UsageError("--text and --blend exclude each other: a .yaml blend can name both")
    if not args.text.name.endswith(TEXT_SUFFIXES):
        kinds = " or ".join(TEXT_SUFFIXES)
        raise UsageError(f"--text {args.text}: a {kinds} file was expected; rows go to --blend")
    return str(args.text)


def kept(args: argparse.Namespace) -> str:
    """A sentence about what a quantization leaves when Ctrl-C ends it."""
    from halfbyte.quantize.budget import sensitivity_file
    from halfbyte.quantize.staging import work_directory

    work = work_directory(args.output)
    measuring = work_directory(sensitivity_file(args.output))
    if measuring.exists():
        return f"measured steps are kept in {measuring}; the same command goes on with them"
    if not work.exists():
        return "no layer was finished and nothing is kept; give the same command again"
    return f"finished layers are kept in {work}; the same command goes on with them"
