"""docs/cli.md: every command with its flags, from the parsers themselves.

`python -m tools.cli_reference` writes the page; with `--check` it fails if the page is stale.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from halfbyte.cli.main import COMMANDS, build_parser
from halfbyte.engine.options import EngineConfig, options

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
_HEAD = """\
# Command line

Generated from the program by `python -m tools.cli_reference`; `halfbyte COMMAND --help` says the
same. Every command takes `--log-level` (debug, info, warning, error). Exit statuses: 0 success, 1 a
failed check, 2 a mistake in what was asked, 130 Ctrl-C.
"""


def reference_page() -> str:
    """The text of docs/cli.md."""
    parts = [_HEAD.rstrip()]
    for name, (module_name, what) in COMMANDS.items():
        module = importlib.import_module(f"halfbyte.cli.{module_name}")
        parser = build_parser(name, module)
        parts.append(_command(f"halfbyte {name}", what, parser, level=2))
        parts.append(f"```sh\n{_unindented(module.EXAMPLE)}\n```")
    parts.append(_engine_fields())
    return "\n\n".join(parts) + "\n"


def _engine_fields() -> str:
    rows = [
        f"| `{one.name}` | `{one.default!r}` | {f'`{option.flag}`' if option.flag else ''} | "
        f"{_cell(option.help % {'default': one.default})} |"
        for one, option in zip(fields(EngineConfig), options().values(), strict=True)
    ]
    head = (
        "## Fields of EngineConfig",
        "What a Python program gives `halfbyte.Engine(...)` by name. Those with a flag are also "
        "keys of\na `--config` file, by the flag's name.",
        "\n".join(["| field | default | flag | what |", "|---|---|---|---|", *rows]),
    )
    return "\n\n".join(head)


def _command(name: str, what: str, parser: argparse.ArgumentParser, level: int) -> str:
    parts = [f"{'#' * level} {name}", what[0].upper() + what[1:] + "."]
    rows = [_row(action) for action in parser._actions if _is_shown(action)]
    if rows:
        parts.append("\n".join(["| argument | default | what |", "|---|---|---|", *rows]))
    for choices in _subcommands(parser):
        helps = {action.dest: action.help or "" for action in choices._choices_actions}
        parts += [
            _command(f"{name} {choice}", helps.get(choice) or choice, inner, level + 1)
            for choice, inner in choices.choices.items()
        ]
    return "\n\n".join(parts)


def _subcommands(
    parser: argparse.ArgumentParser,
) -> "Iterable[argparse._SubParsersAction[argparse.ArgumentParser]]":
    return (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _is_shown(action: argparse.Action) -> bool:
    is_inner = isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    return not is_inner and action.help != argparse.SUPPRESS and action.dest != "log_level"


def _row(action: argparse.Action) -> str:
    many = "..." if action.nargs in ("+", "*", argparse.REMAINDER) else ""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None and action.metavar is None:
        metavar = " | ".join(map(str, action.choices))
    shown = ", ".join(f"`{name}`" for name in action.option_strings)
    if not shown:
        shown = f"`{_cell(metavar)}`{many}"
    elif action.nargs != 0:
        shown += f" {_cell(metavar)}{many}"
    help_text = (action.help or "") % _values(action) if action.help else ""
    return f"| {shown} | {_default(action)} | {_cell(help_text)} |"


def _values(action: argparse.Action) -> dict[str, object]:
    return {
        "default": action.default,
        "prog": "halfbyte",
        "choices": action.choices,
        **vars(action),
    }


def _default(action: argparse.Action) -> str:
    value = action.default
    if action.required or (not action.option_strings and action.nargs not in ("?", "*")):
        return "required"
    if value is None or value is False or value == argparse.SUPPRESS or value in ([], ()):
        return ""
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    # A default that depends on this machine has no place in a page for all.
    home = str(Path.home())
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.replace(home, "~").split())).replace(
        "<", "&lt;"
    )


def _unindented(example: str) -> str:
    return "\n".join(line.strip() for line in example.splitlines())


def main() -> int:
    """Write the page, or with `--check` say whether it is stale."""
    parser = argparse.ArgumentParser(prog="python -m tools.cli_reference")
    parser.add_argument("--check", action="store_true")
    text = reference_page()
    if parser.parse_args().check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/cli.md is stale; run python -m tools.cli_reference", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
