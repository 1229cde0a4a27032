"""serve.embedding.row_cache: bounded in bytes, the least recently used goes first."""

import tracemalloc

import numpy as np
import pytest

from serve.embedding.row_cache import ENTRY_BYTES, RowCache


ENTRY = 4 * 8 + ENTRY_BYTES


def row(value: float, size: int = 8) -> np.ndarray:
    return np.full(size, value, np.float32)


def test_what_was_put_is_found_and_nothing_else():
    cache = RowCache(10 * ENTRY)
    cache.put("a", row(1))
    assert np.array_equal(cache.get("a"), row(1))
    assert cache.get("b") is None
    assert (len(cache), cache.size_bytes, cache.evicted) == (1, ENTRY, 0)


def test_the_least_recently_used_goes_first():
    cache = RowCache(2 * ENTRY)
    cache.put("a", row(1))
    cache.put("b", row(2))
    cache.get("a")
    cache.put("c", row(3))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]
    assert (cache.size_bytes, cache.evicted) == (2 * ENTRY, 1)


def test_rows_are_copies_that_nobody_can_change():
    cache, batch = RowCache(10 * ENTRY), np.ones((3, 8), np.float32)
    cache.put("a", batch[1])
    batch[:] = 0
    kept = cache.get("a")
    assert np.array_equal(kept, row(1))
    assert kept.base is None  # it does not hold the batch
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 5


def test_a_key_put_again_counts_once():
    cache = RowCache(10 * ENTRY)
    cache.put("a", row(1))
    cache.put("a", row(1))
    assert (len(cache), cache.size_bytes) == (1, ENTRY)


@pytest.mark.parametrize("bytes_max", [0, ENTRY - 1])
def test_what_does_not_fit_at_all_is_not_kept(bytes_max):
    cache = RowCache(bytes_max)
    cache.put("a", row(1))
    assert (len(cache), cache.size_bytes, cache.evicted) == (0, 0, 0)


def test_the_bytes_counted_are_no_less_than_those_taken():
    """The keys are those of `serve.flows.reuse`: a space that each request makes anew, and a hash."""
    cache, some = RowCache(2**30), row(1, 384)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(5000):
            space = ("tenant", "model", "revision", number)[:3]
            cache.put((space, number.to_bytes(16, "little")), some)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.8 * cache.size_bytes < after - before <= cache.size_bytes
