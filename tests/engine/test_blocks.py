import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from halfbyte.engine.plan.blocks import ROOT_DIGEST, BlockPool, block_digest


def test_digest_depends_on_parent_tokens_and_extra() -> None:
    base = block_digest(ROOT_DIGEST, [1, 2, 3, 4])
    others = [
        block_digest(base, [1, 2, 3, 4]),
        block_digest(ROOT_DIGEST, [1, 2, 4, 3]),
        block_digest(ROOT_DIGEST, [1, 2, 3, 4], b"pixels"),
    ]
    assert len({base, *others}) == 4
    assert block_digest(ROOT_DIGEST, (1, 2, 3, 4)) == base


def test_released_prefix_is_found_until_its_blocks_are_needed() -> None:
    pool = BlockPool(4, 2)
    digests = [b"a", b"b"]
    blocks = pool.allocate(2)
    for block, digest in zip(blocks, digests, strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    assert pool.find([*digests, b"c"]) == blocks
    assert pool.knows(b"a") and pool.knows(b"b") and not pool.knows(b"c")
    assert (pool.num_free, pool.num_cached) == (4, 2)
    taken = pool.allocate(3)
    # The end of the sequence goes first: its beginning is still of use.
    assert pool.find(digests) == blocks[:1]
    assert blocks[1] in taken
    assert pool.knows(b"a") and not pool.knows(b"b")
    pool.check([taken])


def test_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(2, 2)
    for digest in (b"old", b"new"):
        (block,) = pool.allocate(1)
        pool.publish(block, digest)
        pool.release([block])
    pool.hold(pool.find([b"old"]))
    pool.release(pool.find([b"old"]))
    held = pool.allocate(1)
    assert pool.find([b"old"]) and not pool.find([b"new"])
    pool.check([held])


def test_holding_a_cached_block_counts_against_the_free_ones() -> None:
    pool = BlockPool(2, 2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.release([block])
    assert pool.num_free == 2
    assert pool.can_hold([block], 1)
    assert not pool.can_hold([block], 2)


def test_clear_cache_keeps_held_blocks() -> None:
    pool = BlockPool(3, 2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"b")
    pool.release([second])
    pool.clear_cache()
    assert pool.find([b"a"]) == [] and pool.find([b"b"]) == []
    pool.check([[first]])
    pool.release([first])
    pool.check([])
    assert pool.num_free == 3


def test_double_release_and_overdraft_are_caught() -> None:
    pool = BlockPool(1, 2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="0 free"):
        pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.release(blocks)


def test_check_sees_a_lost_block() -> None:
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="refcount of block"):
        pool.check([])


class Pool(RuleBasedStateMachine):
    """Random holders against a model: which contents are known, and who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 2)
        self.holders: list[list[int]] = []
        # What was written to a block when it was published; dropped when it is handed out anew.
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(1, 4))
    def allocate(self, count: int) -> None:
        if count > self.pool.num_free:
            return
        blocks = self.pool.allocate(count)
        held = {block for holder in self.holders for block in holder}
        assert not held & set(blocks), "a held block was handed out"
        for block in blocks:
            self.content.pop(block, None)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.holders))))
        digest = data.draw(st.sampled_from([b"a", b"b", b"c", b"d"]))
        known = self.pool.find([digest])
        self.pool.publish(block, digest)
        if not known and block not in self.content:
            self.content[block] = digest

    @rule(digests=st.permutations([b"a", b"b", b"c", b"d"]))
    def find_and_hold(self, digests: list[bytes]) -> None:
        found = self.pool.find(digests)
        assert [self.content[block] for block in found] == digests[: len(found)]
        if len(found) < len(digests):
            assert digests[len(found)] not in self.content.values()
        if found and self.pool.can_hold(found, 0):
            self.pool.hold(found)
            self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(index))

    @invariant()
    def books_agree(self) -> None:
        self.pool.check(self.holders)
        held = {block for holder in self.holders for block in holder}
        assert self.pool.num_free == self.pool.num_blocks - len(held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
