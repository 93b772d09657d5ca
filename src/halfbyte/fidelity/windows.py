"""Texts and the windows of tokens that models are scored over."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.chat.tokens import load_chat
from halfbyte.errors import UsageError, in_words
from halfbyte.files import read_bounded

WINDOW_TOKENS = 512


FEWEST_UNITS = 3  # two windows or texts say next to nothing of how much others would differ


Window = tuple[int, ...]


# A text is held whole, and scoring more of it would take days.
MAX_TEXT_BYTES = 1 << 28


def read_text(path: Path) -> str:
    """A text file in UTF-8; raises UsageError with the reason if it is none."""
    try:
        return read_bounded(path, MAX_TEXT_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {in_words(error)}") from error


def read_texts(paths: Path | Sequence[Path]) -> list[str]:
    """Read one text file or several; returns their texts in order."""
    return [read_text(path) for path in ([paths] if isinstance(paths, Path) else paths)]


def cut_windows(
    directory: Path, text: str, window_tokens: int, max_tokens: int | None
) -> list[Window]:
    """Cut a text's tokens into windows, each opened by the bos token if the model has one.

    A last window of less than half the length is left out.
    """
    vocabulary = load_chat(directory).vocabulary
    token_ids = vocabulary.encode_text(text)[:max_tokens]
    opening = vocabulary.start
    room = window_tokens - len(opening)
    windows = [
        (*opening, *token_ids[start : start + room]) for start in range(0, len(token_ids), room)
    ]
    kept = [window for window in windows if len(window) > window_tokens // 2]
    if not kept:
        raise UsageError(
            f"the text has {len(token_ids)} tokens; a window of {window_tokens} needs at least "
            f"half of that"
        )
    return kept


def cut_texts(
    directory: Path, texts: Sequence[str], window_tokens: int, max_tokens: int | None
) -> tuple[list[Window], list[int]]:
    """`cut_windows` of each text, and which text each window is of."""
    windows: list[Window] = []
    origins: list[int] = []
    for index, text in enumerate(texts):
        found = cut_windows(directory, text, window_tokens, max_tokens)
        windows += found
        origins += [index] * len(found)
    return windows, origins
