"""Codes of languages that a card may state: those that are known, and nothing else."""

import pytest

from halfbyte.card.languages import is_language


@pytest.mark.parametrize(
    "code",
    ["en", "fr", "de", "zh", "sh", "yue", "fil", "tlh", "zh-Hant", "pt-BR", "es-419", "code",
     "multilingual"],
)  # fmt: skip
def test_known_codes(code: str) -> None:
    assert is_language(code)


@pytest.mark.parametrize(
    "code",
    ["klingon", "English", "EN", "xx", "qq", "xyz", "", "-", "en-", "en--US", "en_US", "en US",
     "en\n", "zxx", "mul", "und", "root", "123", "\u00e9n", "en-<b>", "multilingual-x"],
)  # fmt: skip
def test_unknown_codes(code: str) -> None:
    assert not is_language(code)
