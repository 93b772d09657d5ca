"""Keeps evaluation items out of the calibration text: 13-word overlap.

Math and science sets hold contest-like problems; a scale that was measured on a benchmark's own
items would make the comparison on that benchmark worthless. `draw` drops and counts the hits.

Source: the 13-gram rule is the one language-model reports have used since GPT-3.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError, in_words
from halfbyte.files import read_bounded

NUM_WORDS = 13

# A word, or one character of a script that writes none.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class OverlapIndex:
    """Knows every run of 13 words in some prompts; case, punctuation and white space do not count.

    A prompt shorter than that is never found: short questions are also common speech.
    """

    def __init__(self, prompts: Iterable[str] = ()) -> None:
        self._runs: set[bytes] = set()
        digest = hashlib.sha256()
        self.num_prompts = 0
        for prompt in prompts:
            self.num_prompts += 1
            digest.update(prompt.encode("utf-8", "surrogatepass") + b"\0")
            self._runs.update(_runs(prompt))
        self.sha256 = digest.hexdigest() if self.num_prompts else None

    def hits(self, texts: Iterable[str]) -> bool:
        """Whether any of the texts shares 13 words in a row with a prompt."""
        if not self._runs:
            return False
        return any(run in self._runs for text in texts for run in _runs(text))


def _runs(text: str) -> Iterator[bytes]:
    words = _WORD.findall(text.casefold())
    for start in range(len(words) - NUM_WORDS + 1):
        joined = " ".join(words[start : start + NUM_WORDS])
        yield hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest()


# Every prompt of every benchmark is some tens of MB.
MAX_PROMPTS_BYTES = 1 << 28


def read_prompts(path: Path) -> Iterator[str]:
    """Every string in a file of JSON lines, at any depth: whatever of an evaluation item is text.

    Raises UsageError naming file and line.
    """
    try:
        lines = read_bounded(path, MAX_PROMPTS_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: cannot be read as evaluation prompts ({in_words(error)})"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield from _strings(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number} is not JSON ({in_words(error)})") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
