"""`halfbyte blend`: what a calibration blend is, or its rows as tokens in a file."""

import argparse
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.outputs import output_file
from halfbyte.errors import UsageError

if TYPE_CHECKING:
    from halfbyte.calibrate.blend import Blend
    from halfbyte.calibrate.draw import CalibrationData

EXAMPLE = """  halfbyte blend nemotron-v3
  halfbyte blend nemotron-v3 --model fp8/ --data datasets/ --out rows.safetensors
  halfbyte quantize fp8/ mixed/ --recipe medium-3.5 --calibration-tokens rows.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("blend", help="a blend of the library (nemotron-v3, builtin, …) or a .yaml")
    parser.add_argument("--model", type=Path, help="draw rows with this checkpoint's tokenizer")
    parser.add_argument(
        "--out", type=output_file, help="write them here (.safetensors), the record beside"
    )
    parser.add_argument("--data", type=Path, help="folder with data sets, laid out as on the hub")
    parser.add_argument("--hub", action="store_true", help="fetch what the folder lacks")
    parser.add_argument(
        "--exclude", type=Path, nargs="+", default=[], metavar="JSONL",
        help="evaluation items; rows that share 13 words in a row with one are left out",
    )  # fmt: skip
    parser.add_argument("--samples", type=int)
    parser.add_argument("--tokens-per-sample", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--mode", choices=["plain", "template", "packed"])


def run(args: argparse.Namespace) -> int:
    from halfbyte.calibrate.blend import load_blend

    blend = load_blend(args.blend)
    names = ("samples", "tokens_per_sample", "seed", "mode")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in changes.items():
        least = {"samples": 1, "tokens_per_sample": 2, "seed": 0}.get(name)
        if least is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least {least}")
    blend = replace(blend, **changes)
    if args.model is None:
        if args.out is not None:
            raise UsageError("--out needs --model: tokens are those of a checkpoint")
        print(_described(blend))
        return 0
    data = _drawn(blend, args)
    print(_summary(data))
    return 0


def _described(blend: "Blend") -> str:
    from halfbyte.calibrate.blend import resolve_dataset
    from halfbyte.calibrate.draw import share_out

    lines = [
        f"blend {blend.name}: {blend.samples} rows of up to {blend.tokens_per_sample} tokens, mode "
        f"{blend.mode}, {blend.select} of the first {blend.window}, seed {blend.seed}"
    ]
    quotas = share_out(blend.samples, [source.weight for source in blend.sources])
    for source, quota in zip(blend.sources, quotas, strict=True):
        lines.append(f"{quota:>6}  {source.label}")
        if source.dataset is None:
            continue
        dataset = resolve_dataset(source, blend.name)
        pin = f"pinned to {dataset.revision}" if dataset.revision else "not pinned"
        lines.append(f"        {dataset.id}, {pin}: {', '.join(dataset.splits)}")
        lines += [f"        without {split}: {why}" for split, why in dataset.skipped.items()]
    return "\n".join(lines)


def _drawn(blend: "Blend", args: argparse.Namespace) -> "CalibrationData":
    from halfbyte.calibrate.draw import draw, write_rows
    from halfbyte.calibrate.overlap import read_prompts
    from halfbyte.calibrate.sources import DataAccess

    prompts = chain.from_iterable(map(read_prompts, args.exclude))
    access = DataAccess(folder=args.data, allow_hub=args.hub)
    data = draw(blend, args.model, access=access, evaluation_prompts=prompts)
    if args.out is not None:
        write_rows(data, args.out)
    return data


def _summary(data: "CalibrationData") -> str:
    record = data.provenance
    rows = [
        f"{member['taken_rows']:>6} rows {member['num_tokens']:>9} tokens  {member['name']}"
        for member in record["members"]
    ]
    total = f"{record['num_rows']:>6} rows {record['num_tokens']:>9} tokens  in all, the longest"
    return "\n".join([*rows, f"{total} {record['longest_row_tokens']}"])
