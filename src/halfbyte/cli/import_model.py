"""`halfbyte import SOURCE OUT`: checkpoints in our layout, from GGUF, wider weights or bf16."""

import argparse
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.progress import TimeLeft

EXAMPLE = """  halfbyte import smollm2 build/demo/bf16
  halfbyte import build/demo/bf16 build/demo/fp8 --to mistral-fp8
  halfbyte import build/demo/bf16 build/images/bf16 --untrained-tower"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a llama .gguf file, `smollm2` (from its package), or a checkpoint: one in f32 or f16 "
        "becomes bf16",
    )
    parser.add_argument("out", type=Path, help="the directory to write; must not exist")
    parser.add_argument(
        "--to",
        choices=["bf16", "mistral-fp8"],
        default="bf16",
        help="mistral-fp8: from a bf16 checkpoint, the FP8 dialect of Mistral's releases "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="GGUF: take the tokenizer files of this directory instead"
    )
    parser.add_argument(
        "--untrained-tower",
        nargs="?",
        type=int,
        const=0,
        metavar="SEED",
        help="from a bf16 text checkpoint, one that takes images: a small vision tower with random "
        "weights, to show that images get through; its answers about them mean nothing",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=Path,
        metavar="FILE.safetensors",
        help="mistral-fp8: token ids to measure inputs with, tensors batch{i}.input_ids "
        "(default: the text in the package)",
    )


def run(args: argparse.Namespace) -> int:
    if args.untrained_tower is not None:
        return _with_tower(args)
    if args.to == "mistral-fp8":
        return _to_fp8(args)
    if args.calibration_tokens is not None:
        raise UsageError("--calibration-tokens belongs to --to mistral-fp8")
    from halfbyte.checkpoint.gguf import import_gguf, packaged_file

    path = Path(args.source)
    if path.is_dir():
        if path.suffix == ".gguf" and not any(path.glob("*.safetensors")):
            raise UsageError(
                f"{path} is a directory, not a GGUF file, and no checkpoint either: it holds no "
                ".safetensors"
            )
        return _to_bf16(path, args)
    source = path if path.suffix == ".gguf" else packaged_file(args.source)
    config = import_gguf(source, args.out, tokenizer=args.tokenizer)
    print(f"{args.out}: bf16, {config.text.num_layers} layers, from {source.name}")
    return 0


def _with_tower(args: argparse.Namespace) -> int:
    if args.to != "bf16" or args.tokenizer is not None or args.calibration_tokens is not None:
        raise UsageError("--untrained-tower goes with no other option; quantize what it writes")
    if not Path(args.source).is_dir():
        raise UsageError(f"{args.source}: import it first; --untrained-tower takes a checkpoint")
    from halfbyte.checkpoint.fp8_source import NOTE_FILE
    from halfbyte.checkpoint.untrained_tower import add_untrained_tower

    config = add_untrained_tower(Path(args.source), args.out, seed=args.untrained_tower)
    assert config.vision is not None
    print(
        f"{args.out}: bf16 with an untrained tower of {config.vision.num_layers} layers, images up "
        f"to {config.vision.image_size} pixels; {NOTE_FILE} says what that means"
    )
    return 0


def _to_bf16(source: Path, args: argparse.Namespace) -> int:
    if args.tokenizer is not None:
        raise UsageError("--tokenizer belongs to GGUF files; the source's own files are copied")
    from halfbyte.checkpoint.convert import convert_to_bf16

    config = convert_to_bf16(source, args.out)
    print(f"{args.out}: bf16, {config.text.num_layers} layers, from {source}")
    return 0


def _to_fp8(args: argparse.Namespace) -> int:
    if args.tokenizer is not None:
        raise UsageError("--tokenizer belongs to GGUF files; the source's own files are copied")
    from halfbyte.quantize.fp8_source import make_fp8_source

    make_fp8_source(
        Path(args.source),
        args.out,
        calibration_tokens=args.calibration_tokens,
        on_layer=TimeLeft("layers measured"),
    )
    print(f"{args.out}: Mistral FP8, from {args.source}")
    return 0
