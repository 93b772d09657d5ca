"""Our docstrings as Markdown for mkdocstrings: aligned lists of parameters become lists.

A docstring here names a parameter or field, leaves blanks, and says what it is; a line that starts
with blanks goes on with the one before. Markdown would run all of it into one paragraph.
"""

import re
from typing import Any

import griffe

_ITEM = re.compile(r"^([A-Za-z_][\w, ./*]*?) {2,}(\S.*)$")

_POWER = re.compile(r"(?<=\w)\*\*(?=[\w-])")  # 2**-9 is no bold text


def as_markdown(text: str) -> str:
    """The same text, aligned lists as lists."""
    lines: list[str] = []
    in_list = False
    for line in _POWER.sub(r"\*\*", text).split("\n"):
        item = _ITEM.match(line)
        if item:
            if not in_list and lines and lines[-1]:
                lines.append("")
            lines.append(f"- `{item[1]}`: {item[2]}")
            in_list = True
        elif in_list and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            if in_list and line:
                lines.append("")
            in_list = False
            lines.append(line)
    return "\n".join(lines)


class AlignedLists(griffe.Extension):
    """Rewrites every docstring that griffe collects."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
