"""`halfbyte bench kernels`: each product of a decoder layer on one GPU, one record."""

import argparse

from halfbyte.cli.outputs import output_file

EXAMPLE = "  halfbyte bench kernels --record benchmarks/records/kernels-h200.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compare", action="store_true", help="also time other block shapes")
    parser.add_argument("--record", type=output_file, help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    import torch

    from halfbyte.bench.gpu import kernel_figures, measure_ceilings, results_and_samples
    from halfbyte.bench.kernels_bench import TOKENS, format_rows, run_kernels
    from halfbyte.bench.record import own_command, write
    from halfbyte.kernels.cuda.library import KernelLibrary

    device = torch.device("cuda")
    library = KernelLibrary(device)
    ceilings = measure_ceilings(device)
    rows = run_kernels(library, TOKENS, compares=args.compare)
    print(ceilings)
    print(format_rows(rows, ceilings.copy_tb_per_s))
    if args.record is not None:
        config = {"tokens": list(TOKENS)}
        results, samples = results_and_samples(ceilings, config, rows)
        write(
            args.record,
            name=args.record.stem,
            question="What share of the copy rate does the streaming linear reach "
            "at each shape and batch?",
            command=own_command(),
            figures=kernel_figures(results),
            results=results,
            samples=samples,
        )
    return 0
