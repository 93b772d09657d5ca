"""The two small chat formats of tests/data/chat."""

from pathlib import Path

import pytest

from halfbyte.chat.mistral_format import MistralFormat
from halfbyte.chat.template_format import TemplateFormat
from halfbyte.chat.tokens import load_chat

DATA = Path(__file__).parent.parent / "data" / "chat"


@pytest.fixture(scope="session")
def mistral() -> MistralFormat:
    chat = load_chat(DATA / "tekken")
    assert isinstance(chat, MistralFormat)
    return chat


@pytest.fixture(scope="session")
def chatml() -> TemplateFormat:
    chat = load_chat(DATA / "chatml")
    assert isinstance(chat, TemplateFormat)
    return chat
