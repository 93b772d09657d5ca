"""The text that comes with the package."""

from functools import cache
from importlib import resources


@cache
def builtin_documents() -> tuple[tuple[str, str], ...]:
    """(name, text) of the documents that come with the package, CC0, domains in turn."""
    folder = resources.files("halfbyte.calibrate") / "data"
    domains: list[list[tuple[str, str]]] = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".txt"):
            texts = [text.strip() for text in entry.read_text("utf-8").split("\n=====\n")]
            stem = entry.name.removesuffix(".txt")
            domains.append([(f"{stem}-{n}", text) for n, text in enumerate(texts) if text])
    longest = max(map(len, domains), default=0)
    return tuple(domain[n] for n in range(longest) for domain in domains if n < len(domain))
