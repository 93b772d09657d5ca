"""`halfbyte bench WHAT ...`: one measurement, one record."""

import argparse
import importlib

# name -> (module in halfbyte.cli, what it measures)
BENCHMARKS: dict[str, tuple[str, str]] = {
    "cpu": ("bench_cpu", "decode and prefill on this machine's processors"),
    "load": (
        "bench_load",
        "a served checkpoint or any server under load: users, agents, a long prompt",
    ),
    "serve": ("bench_serve", "what HTTP and engine add, what the prefix cache saves, stalls"),
    "engine": ("bench_engine", "decode and prefill of a whole geometry on a Hopper GPU"),
    "kernels": ("bench_kernels", "each product of a decoder layer on a Hopper GPU"),
}

EXAMPLE = """\
  halfbyte bench load build/demo/mixed
  halfbyte bench cpu build/demo/mixed --base build/demo/bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    for name, (module, what) in BENCHMARKS.items():
        choice = choices.add_parser(name, help=what, description=what)
        importlib.import_module(f"halfbyte.cli.{module}").add_arguments(choice)


def run(args: argparse.Namespace) -> int:
    status: int = importlib.import_module(f"halfbyte.cli.{BENCHMARKS[args.benchmark][0]}").run(args)
    return status
