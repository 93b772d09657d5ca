"""YAML that people wrote, read strictly: for recipes and blends.

A key that occurs twice is refused (YAML readers otherwise let the last one win), and whatever the
parser trips over becomes one sentence. A file of a few kilobytes can stand for more than a memory
holds, by names for parts of itself, so nobody prints what it says but through `errors.shown`.
"""

from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import UsageError, in_words, shown
from halfbyte.files import read_bounded

# The parser takes some seconds for this much; the recipes of the library have 1 kB.
_MAX_BYTES = 200_000


def read_yaml_text(path: Path, what: str) -> str:
    """The text of a YAML file; UsageError that calls it a `what` if it cannot be read."""
    try:
        return read_bounded(path, _MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path}: cannot be read ({in_words(error)})") from error


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML text into plain values. Raises UsageError."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(f"{where} is not valid YAML: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What the parser says on one line, with the line of the file where it says it of one."""
    if not isinstance(error, yaml.MarkedYAMLError):
        is_escape = isinstance(error, (ValueError, OverflowError))
        return "an escape in it names no character" if is_escape else in_words(error)
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    parts = (" ".join(part.split()) for part in (error.context, error.problem) if part)
    return place + ", ".join(parts)[:200]


def _no_such(node: yaml.Node) -> yaml.constructor.ConstructorError:
    """The error for a node that is not what its tag says."""
    said = f"{shown(node.value)} is no {node.tag.rpartition(':')[2][:40]}"
    return yaml.constructor.ConstructorError(None, None, said, node.start_mark)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that occurs twice, and says of a value that is none where it stands."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # `!!int ''`, a thirteenth month, more digits than Python reads: the library looks at none.
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise _no_such(node) from error
        except yaml.constructor.ConstructorError as error:
            if isinstance(error.__context__, ValueError):  # base64 that is none, in Python's words
                raise _no_such(node) from error
            raise

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # `!!map text`
            raise _no_such(node)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                is_new = key not in seen
                seen.add(key)
            except TypeError:
                said = "a mapping or a list cannot be a key"
                raise yaml.constructor.ConstructorError(
                    None, None, said, key_node.start_mark
                ) from None
            if not is_new:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(key)} occurs twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)
