"""When the memory of keys and values is taken: a little at once, much as it is written."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.engine import cache
from halfbyte.engine.cache import PagedCache, bytes_per_token
from halfbyte.model.tiny import tiny_config

TEXT = tiny_config(layers=2).text
TOKENS = 16


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024


def grown(num_pages: int) -> Iterator[int]:
    """Memory taken by a cache of so many pages, then by writing all of it."""
    before = resident_bytes()
    made = PagedCache(TEXT, format="bf16", num_pages=num_pages, block_tokens=TOKENS, kv_scales=())
    yield resident_bytes() - before
    for keys, values in made.layers:
        assert not keys.any() and not values.any()
        keys.fill_(1)
        values.fill_(1)
    yield resident_bytes() - before


@pytest.mark.parametrize("is_small", [True, False])
def test_a_small_cache_is_in_memory_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    size = 32 * 2**20
    monkeypatch.setattr(cache, "_TAKEN_AT_ONCE_BYTES", size if is_small else size - 1)
    taken, used = grown(size // (TOKENS * bytes_per_token(TEXT, "bf16")))
    assert used > 0.9 * size
    assert taken > 0.9 * size if is_small else taken < 0.1 * size
