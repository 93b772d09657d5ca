"""`halfbyte completion`: what a shell needs to complete commands, flags and files."""

import argparse
import importlib

EXAMPLE = """\
  halfbyte completion bash
  # its output belongs into ~/.local/share/bash-completion/completions/halfbyte;
  # zsh looks for ~/.zfunc/_halfbyte"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="which shell")


def run(args: argparse.Namespace) -> int:
    import shtab

    from halfbyte.cli.main import COMMANDS

    root = argparse.ArgumentParser(prog="halfbyte")
    root.add_argument("--version", action="store_true", help="show the version")
    commands = root.add_subparsers(dest="command")
    for name, (module_name, what) in COMMANDS.items():
        module = importlib.import_module(f"halfbyte.cli.{module_name}")
        module.add_arguments(commands.add_parser(name, help=what, description=what))
    print(shtab.complete(root, args.shell))
    return 0
