"""`--config FILE.yaml`: the flags of a command from a file; what the command line says wins.

Keys are the flags' names without the dashes in front, as in `max-model-len: 65536`. A flag that may
be given several times takes a list, to which the command line adds.
"""

import argparse
import difflib
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError, shown
from halfbyte.recipe.strict_yaml import parse_yaml, read_yaml_text

_NOT_IN_FILES = frozenset({"config", "help"})


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--config FILE.yaml` to a command's parser."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="read flags from a file, by their names; those of the command line win",
    )


def apply_config(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Make what the file says the parser's defaults. UsageError names what is wrong and where."""
    flags = {
        string.removeprefix("--"): action
        for action in parser._actions
        for string in action.option_strings
        if string.startswith("--")
    }
    if "config" not in flags:
        return
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    if path is None:
        return
    told = parse_yaml(read_yaml_text(path, "config"), str(path))
    if not isinstance(told, dict):
        raise UsageError(f"{path} must hold flags, each as NAME: VALUE")
    defaults: dict[str, Any] = {}
    for key, value in told.items():
        name = str(key).replace("_", "-")
        if name not in flags or name in _NOT_IN_FILES:
            near = difflib.get_close_matches(name, flags, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; see {parser.prog} --help"
            raise UsageError(f"{path}: no flag is called {shown(key)}{hint}")
        defaults[flags[name].dest] = _read(flags[name], value, f"{path}: {name}")
    parser.set_defaults(**defaults)


def _read(action: argparse.Action, value: Any, where: str) -> Any:
    """A value as the flag would have read it from the command line."""
    is_switch = action.nargs == 0
    if is_switch:
        if not isinstance(value, bool):
            raise UsageError(f"{where}: it is true or false, not {shown(value)}")
        return value
    takes_list = isinstance(action, argparse._AppendAction) or action.nargs in ("+", "*")
    if takes_list:
        values = value if isinstance(value, list) else [value]
        return [_one(action, one, where) for one in values]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UsageError(f"{where}: it takes a number or a text, not {shown(value)}")
    read = action.type if callable(action.type) else str
    try:
        made = read(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {shown(value)} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        kinds: dict[Any, str] = {int: "whole number", float: "number"}
        kind = kinds.get(action.type, "value for it")
        raise UsageError(f"{where}: {shown(value)} is no {kind}") from error
    if action.choices is not None and made not in action.choices:
        known = ", ".join(map(str, action.choices))
        raise UsageError(f"{where}: {shown(value)} is not one of {known}")
    return made
