"""What the site needs beside its pages: links that leave `docs/` become the path they name.

The pages are read in the repository too, where such links lead to records, sources and tests; the
site has none of those. tests/test_citations.py proves that every one of them exists.
"""

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[\w.-]+)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Markdown of a page whose links all stay on the site."""
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_path).parent

    def inside(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if target.is_relative_to(docs) and target.suffix != ".json":
            return found[0]
        text, path = found[1], target.relative_to(docs.parent)
        return f"`{path}`" if text.strip("`") == str(path) else f"{text} (`{path}`)"

    return _LINK.sub(inside, markdown)
