"""The `halfbyte` command: finds the subcommand, imports only its module, turns errors into text.

A command is a module of this room with `add_arguments(parser)`, `EXAMPLE` and `run(args)`, and with
`kept(args)` where Ctrl-C leaves something to go on with: half a sentence on what and how. Its hall
is imported when it runs, so that `halfbyte --help` answers at once.
"""

import argparse
import importlib
import os
import sys
from types import ModuleType
from typing import NoReturn

import halfbyte
from halfbyte import log
from halfbyte.cli.config_file import apply_config
from halfbyte.errors import HalfbyteError, cut_middle, how_to_get
from halfbyte.machine import keep_one_heap, let_threads_sleep
from halfbyte.printable import printable_output

# name -> (module in halfbyte.cli, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "import, quantize, compare and serve a small real model, start to end"),
    "import": ("import_model", "make a checkpoint in our layout from a GGUF file or package"),
    "inspect": ("inspect", "say what a checkpoint is, or print the plan of a recipe"),
    "plan": ("plan", "what quantizing will need and give: bytes, memory, time, serving"),
    "blend": ("blend", "what a calibration blend is, or its rows as tokens in a file"),
    "quantize": ("quantize", "calibrate and quantize a checkpoint by a recipe"),
    "verify": ("verify", "prove that a checkpoint is whole and consistent"),
    "compare": ("compare", "perplexity, KL divergence and agreement of two checkpoints"),
    "serve": ("serve", "serve a checkpoint behind an OpenAI-compatible API"),
    "chat": ("chat", "talk to a checkpoint or a server in the terminal"),
    "evaluate": ("evaluate", "run benchmarks against a checkpoint or an endpoint"),
    "grade": ("grade", "grade recorded attempts again, without asking the model"),
    "compare-evals": ("compare_evals", "paired comparison of two evaluation runs"),
    "report": ("report", "one HTML page from records of evaluations or of a comparison"),
    "card": ("card", "a model card from records"),
    "publish": ("publish", "send a checkpoint and its card to the hub, checked (a dry run first)"),
    "bench": ("bench", "measure speed and write a record"),
    "completion": ("completion", "print a script that completes commands and flags in a shell"),
}
# Commands that run the engine and no other implementation beside it.
_SERVING = ("serve", "chat", "evaluate")
# extra of pyproject.toml -> modules that only it brings
_EXTRAS = {
    "eval": ("inspect_ai", "openai", "math_verify", "if_verifiable", "llama_index"),
    "demo": ("gguf", "matplotlib"),
    "otel": ("opentelemetry",),
    "hub": ("huggingface_hub",),
}
_NOTHING_KEPT = "nothing is kept of this command; give it again to start over"


def help_text() -> str:
    """The text of `halfbyte --help`: every command in a line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: halfbyte COMMAND [options]     halfbyte COMMAND --help for one of them",
            "",
            "Quantize a Mistral-class FP8 checkpoint to mixed NVFP4/FP8, serve it, measure it.",
            "",
            *lines,
            "",
            "example: halfbyte quantize fp8/ mixed/ --recipe medium-3.5 && halfbyte serve mixed/",
        ]
    )


class Parser(argparse.ArgumentParser):
    """A command's flags. A mistake in them is one line, as every other mistake is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help says what there is\n")


def build_parser(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one command, its example as the epilog."""
    parser = Parser(
        prog=f"halfbyte {name}",
        description=COMMANDS[name][1],
        epilog=f"example:\n{module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"]
    )
    module.add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 is success, 1 a failed check, 2 a mistake in what was asked, 130 Ctrl-C.

    Whatever it prints of files, servers and models commands the terminal nothing.
    """
    try:
        try:
            with printable_output():
                return _run(argv)
        finally:
            # What is still in the buffer is written here, where its reader may have left.
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before a command began or after it ended
        print("interrupted: nothing was running", file=sys.stderr)
        return 130


def _run(argv: list[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"halfbyte {halfbyte.__version__}")
        return 0
    name = arguments.pop(0)
    if name not in COMMANDS:
        print(
            f"error: there is no command {name!r}; there are: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    if name in _SERVING or (name == "bench" and arguments[:1] == ["serve"]):
        let_threads_sleep()
        keep_one_heap()
    module = importlib.import_module(f"halfbyte.cli.{COMMANDS[name][0]}")
    parser = build_parser(name, module)
    try:
        apply_config(parser, arguments)
    except HalfbyteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args = parser.parse_args(arguments)
    log.configure(level=args.log_level)
    try:
        status: int = module.run(args)
    except HalfbyteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if args.log_level == "debug" or _is_ours(error.name):
            raise
        print(f"error: {name} needs {error.name}; {_how_to_get(error.name)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise  # an OSError, but no failure: `main` knows what it means
    except OSError as error:
        # What the system refuses is the machine's matter or the user's, wherever it comes up.
        if args.log_level == "debug":
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {cut_middle(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # A second Ctrl-C while this is said changes nothing.
        kept = vars(module).get("kept")
        print(f"interrupted: {_NOTHING_KEPT if kept is None else kept(args)}", file=sys.stderr)
        return 130
    return status


def _is_ours(name: str | None) -> bool:
    """Whether a module that was not found is ours: then the fault is, too."""
    return name is None or name.partition(".")[0] == "halfbyte"


def _how_to_get(name: str | None) -> str:
    """The extra that brings a module, by the installed package's own metadata."""
    for extra, modules in _EXTRAS.items():
        if (name or "").partition(".")[0] in modules:
            return how_to_get(extra)
    return (
        "it is missing from this installation; install halfbyte again: pip install . in its folder"
    )
