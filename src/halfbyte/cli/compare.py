"""`halfbyte compare BASE CANDIDATE --text F`, with either side from an earlier run."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.outputs import output_file
from halfbyte.errors import UsageError
from halfbyte.files import write_json
from halfbyte.progress import TimeLeft, say_next

if TYPE_CHECKING:
    from collections.abc import Sequence

    from halfbyte.fidelity.seen import ImagePrompt

EXAMPLE = """  halfbyte compare build/demo/bf16 build/demo/mixed --text held_out.txt
  halfbyte compare big-fp8/ --text held_out.txt --save-baseline fp8.safetensors
  halfbyte compare big-mixed/ --baseline fp8.safetensors
  halfbyte compare fp8/ mixed/ --text held_out.txt --choices quick
  halfbyte compare fp8/ mixed/ --text held_out.txt --pictures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="DIR", help="BASE CANDIDATE, or one with a baseline"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="held-out text, UTF-8; three or more give intervals across texts",
    )
    parser.add_argument(
        "--mode",
        choices=["weight_only", "declared"],
        default="weight_only",
        help="what the candidate's quantized linears compute: declared also rounds activations",
    )
    parser.add_argument(
        "--save-baseline",
        type=output_file,
        metavar="FILE",
        help="keep BASE's distributions for later",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="compare with a kept base instead of BASE"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="also write the figures here"
    )
    parser.add_argument("--tokens", type=int, help="use only so many tokens of the text")
    parser.add_argument(
        "--window-tokens", type=int, default=512, help="tokens scored in one go (%(default)s)"
    )
    parser.add_argument(
        "--choices",
        metavar="NAME",
        help="also compare the answers to a multiple-choice set: quick, mmlu_pro, gpqa_diamond",
    )
    parser.add_argument(
        "--pictures",
        nargs="?",
        const="drawn",
        metavar="SOURCE",
        help="also compare what is said about pictures: drawn ones, or a folder or rows of yours",
    )
    parser.add_argument("--data", type=Path, help="folder with the items, as for evaluate")
    parser.add_argument("--limit", type=int, help="at most so many items, evenly spread")


def run(args: argparse.Namespace) -> int:
    _check(args)
    # Imported here so that --help needs no torch.
    from halfbyte.checkpoint.identity import checkpoint_identity
    from halfbyte.fidelity import models as fidelity
    from halfbyte.fidelity.baseline import load_baseline, save_baseline
    from halfbyte.fidelity.choices import encode_choices
    from halfbyte.fidelity.seen import image_prompts

    choices = (
        encode_choices(args.models[0], args.choices, args.data, args.limit) if args.choices else ()
    )
    options = {
        "choices": choices,
        "max_tokens": args.tokens,
        "window_tokens": args.window_tokens,
        "progress": TimeLeft("windows"),
    }
    if args.save_baseline is not None:
        kept = fidelity.make_baseline(args.models[0], args.text, **options)
        save_baseline(args.save_baseline, kept)
        print(f"kept {len(kept.windows)} windows of {kept.name} in {args.save_baseline}")
        if len(args.models) == 1:
            return 0
    if args.baseline is not None:
        candidate = (args.models[0].name, args.models[0], args.mode)
        comparison = fidelity.compare_with_baseline(
            load_baseline(args.baseline), candidate, progress=TimeLeft("windows")
        )
    else:
        base, other = args.models
        candidates = [(other.name, other, args.mode)]
        prompts = (
            image_prompts(base, args.pictures, args.limit) if args.pictures is not None else ()
        )
        comparison = fidelity.compare_models(
            base, candidates, args.text, prompts=prompts, **options
        )
        _warn_clipped(args.models, prompts)
    print(comparison.table())
    if args.json is not None:
        told = comparison.as_dict()
        # So that a card knows whose figures they are.
        (candidate_row,) = told["candidates"]
        candidate_row["checkpoint"] = checkpoint_identity(args.models[-1])
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, told)
    page = [f"halfbyte report {shlex.quote(str(args.json))}"] if args.json is not None else []
    say_next(
        *page,
        f"halfbyte serve {shlex.quote(str(args.models[-1]))}",
        "halfbyte evaluate plan --suite seed",
    )
    return 0


def _warn_clipped(models: "Sequence[Path]", prompts: "Sequence[ImagePrompt]") -> None:
    """Say which of the checkpoints clips image rows by its static FP8 scales."""
    import torch

    from halfbyte.checkpoint.reader import Checkpoint
    from halfbyte.quantize.clipping import checkpoint_clipping, warn_clipped

    rows = [torch.tensor(prompt.token_ids) for prompt in prompts]
    pictures = tuple(prompt.images for prompt in prompts)
    for directory in models:
        clipping = checkpoint_clipping(Checkpoint.open(directory), rows, pictures)
        warn_clipped(clipping, "chosen", f"the FP8 input scales of {directory}")


def _check(args: argparse.Namespace) -> None:
    if args.baseline is not None and args.save_baseline is not None:
        raise UsageError("--baseline and --save-baseline exclude each other")
    if args.baseline is not None and len(args.models) != 1:
        raise UsageError("with --baseline name the candidate alone")
    if args.baseline is None and args.text is None:
        raise UsageError("no text is given; say which by --text FILE")
    if args.baseline is not None and args.choices is not None:
        raise UsageError("--baseline holds its own items; leave out --choices")
    if args.baseline is not None and args.text is not None:
        raise UsageError("--baseline holds its own tokens; leave out --text")
    if args.pictures is not None and (args.baseline or args.save_baseline) is not None:
        raise UsageError("--pictures needs both models at once; a kept baseline holds text alone")
    wanted = (1, 2) if args.save_baseline is not None else (2,)
    if args.baseline is None and len(args.models) not in wanted:
        raise UsageError("say `compare BASE CANDIDATE --text FILE`")
    if args.window_tokens < 2:
        raise UsageError(f"--window-tokens {args.window_tokens} must be at least 2")
    for flag, most in (("--tokens", args.tokens), ("--limit", args.limit)):
        if most is not None and most < 1:
            raise UsageError(f"{flag} {most} must be at least 1")
