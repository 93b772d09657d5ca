"""A tiny model with a tower and a tokenizer that lays pictures out, for tests of image rows."""

import shutil
from dataclasses import replace
from pathlib import Path

from halfbyte.chat.tokens import load_chat
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint

TEKKEN = Path(__file__).parent / "data" / "chat" / "tekken"


def write_seeing(directory: Path, *, layers: int = 3) -> Path:
    """Write it, an FP8 source, to `directory`, which must not exist; returns that."""
    chat = load_chat(TEKKEN)
    config = tiny_config(layers=layers, vision=True)
    assert config.vision is not None and chat.image_layout is not None
    vision = replace(config.vision, image_token_id=chat.image_layout.image_token_id)
    text = replace(config.text, vocab_size=chat.vocabulary.size)
    write_tiny_checkpoint(
        directory, config=replace(config, text=text, vision=vision), dialect="mistral-fp8"
    )
    shutil.copy(TEKKEN / "tekken.json", directory)
    return directory
