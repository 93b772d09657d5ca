"""Conversations to token ids: picks the format that a checkpoint directory carries.

`tekken.json` is encoded by mistral-common (`mistral_format`), `tokenizer.json` with a chat template
by our sandboxed renderer (`template_format`). In both, text typed by a user never becomes a
control token.
"""

from pathlib import Path
from typing import TypeAlias

from halfbyte.chat.mistral_format import MistralFormat, load_mistral_format
from halfbyte.chat.template_format import TemplateFormat, load_template_format
from halfbyte.errors import CheckpointError
from halfbyte.files import is_there

ChatFormat: TypeAlias = MistralFormat | TemplateFormat


def load_chat(directory: Path | str) -> ChatFormat:
    """The chat format of a checkpoint directory; tekken.json wins over tokenizer.json.

    Raises CheckpointError if the directory has neither, or what it has cannot be read.
    """
    directory = Path(directory)
    if is_there(directory / "tekken.json"):
        return load_mistral_format(directory / "tekken.json")
    if is_there(directory / "tokenizer.json"):
        return load_template_format(directory)
    raise CheckpointError(
        f"{directory} has no tekken.json and no tokenizer.json, so it cannot encode text"
    )
