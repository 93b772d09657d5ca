from dataclasses import replace
from typing import Any

import pytest

from halfbyte.engine.cache import bytes_per_token
from halfbyte.engine.config import EngineConfig, free_cache_bytes, resolve
from halfbyte.errors import CapacityError, UsageError
from halfbyte.model.tiny import tiny_config

TEXT = tiny_config().text  # 4096 positions
BYTES = bytes_per_token(TEXT, "fp8")


def test_bytes_of_a_token() -> None:
    assert BYTES == 8 * 2 * 2 * 32
    assert bytes_per_token(TEXT, "bf16") == 2 * BYTES


def test_cache_holds_what_all_sequences_may_need_at_most() -> None:
    config = resolve(EngineConfig(max_model_len=100, max_sequences=3), TEXT, "fp8", 10**9)
    assert (config.kv_cache, config.kv_cache_tokens) == ("fp8", 304)
    assert config.max_model_len == 100


def test_little_memory_shortens_the_context_unasked() -> None:
    config = resolve(EngineConfig(), TEXT, "fp8", 1000 * BYTES)
    assert (config.max_model_len, config.kv_cache_tokens) == (992, 992)


def test_named_cache_format_is_the_default() -> None:
    assert resolve(EngineConfig(), TEXT, "bf16", 10**9).kv_cache == "bf16"
    assert resolve(EngineConfig(kv_cache="bf16"), TEXT, "fp8", 10**9).kv_cache == "bf16"


@pytest.mark.parametrize(
    ("options", "free_tokens", "message"),
    [
        ({}, 15, "one block of 16 tokens; 0.0 MB are free"),
        ({"kv_cache_tokens": 2000}, 1000, "2000 tokens needs 2.0 MB; 1.0 MB .* 992 tokens"),
        ({"max_model_len": 1000}, 500, r"max_model_len 1000 .* 1.0 MB .* holds 496 .*0.5 MB"),
    ],
)
def test_too_little_memory_is_said_in_numbers(
    options: dict[str, Any], free_tokens: int, message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        resolve(replace(EngineConfig(), **options), TEXT, "fp8", free_tokens * BYTES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 5000}, "between 2 and the model's 4096"),
        ({"max_model_len": 1}, "max_model_len 1"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens is 0"),
        ({"max_batch_tokens": 8}, "max_batch_tokens 8 must be at least max_sequences 64"),
        ({"gpu_memory_utilization": 1.5}, "1.5"),
        ({"target_gap_ms": 0.0}, "above 0"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(replace(EngineConfig(), **options), TEXT, "fp8", 10**9)


def test_free_memory_of_this_machine_is_positive() -> None:
    assert free_cache_bytes(EngineConfig()) > 0


def test_number_of_guesses_is_by_kind_unless_given() -> None:
    for speculative, wanted in ((None, None), ("ngram", 8), ("some/directory", 3)):
        config = resolve(EngineConfig(speculative=speculative), TEXT, "fp8", 10**9)
        assert config.num_speculative_tokens == wanted
    given = EngineConfig(speculative="ngram", num_speculative_tokens=5)
    assert resolve(given, TEXT, "fp8", 10**9).num_speculative_tokens == 5


def test_a_draft_model_takes_its_share_of_the_memory() -> None:
    with_draft = resolve(EngineConfig(), TEXT, "fp8", 1000 * BYTES, draft_token_bytes=BYTES)
    assert with_draft.kv_cache_tokens == 496


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_speculative_tokens": 4}, "num_speculative_tokens 4 without speculative"),
        ({"speculative": "ngram", "num_speculative_tokens": 0}, "0 must be between 1 and 64"),
        ({"speculative": "ngram", "num_speculative_tokens": 65}, "65 must be between 1 and 64"),
    ],
)
def test_guesses_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(EngineConfig(**options), TEXT, "fp8", 10**9)
