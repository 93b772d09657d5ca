"""Blocks of the KV cache: who holds which, and which hold a known prefix. No torch.

A block is `block_tokens` consecutive token positions of one sequence, in every layer. Blocks are
counted by reference: sequences with the same beginning hold the same blocks. Only full blocks are
shared and a full block is never written again, so sharing needs no copies.

    held      references > 0
    cached    references = 0, content known by its digest: found again until it is evicted
    empty     references = 0, content unknown

`scheduler` decides; this file keeps the books. The tensors are in `cache`.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

# The parent of a sequence's first block.
ROOT_DIGEST = b""


def block_digest(parent: bytes, token_ids: Sequence[int], extra: bytes = b"") -> bytes:
    """Identify a full block by its tokens and everything before it.

    parent  digest of the block before, ROOT_DIGEST for the first
    extra   what the token ids do not say, such as the pixels behind image tokens

    128 bits of BLAKE2b: users choose the tokens, so the hash must resist being steered. The parts
    have fixed lengths except `extra`, which comes last.
    """
    content = hashlib.blake2b(parent, digest_size=16)
    content.update(array("q", token_ids).tobytes())
    content.update(extra)
    return content.digest()


class BlockPool:
    """A fixed number of blocks, their reference counts and the index of cached prefixes."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._references = [0] * num_blocks
        # Popped from the end: low numbers are used first.
        self._empty = list(range(num_blocks - 1, -1, -1))
        # Least recently released first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included: what can be allocated."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but whose content can still be found."""
        return len(self._cached)

    def knows(self, digest: bytes) -> bool:
        """Whether a block with the content of this digest can be found."""
        return digest in self._block_of

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of these digests; changes nothing."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def can_hold(self, found: Sequence[int], num_new: int) -> bool:
        """Whether blocks suffice for `hold(found)` and then `allocate(num_new)`."""
        unheld = sum(1 for block in found if self._references[block] == 0)
        return unheld + num_new <= self.num_free

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that `find` returned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take blocks with one reference and no content: empty ones, then the longest unused."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block; a sequence's end is evicted before its beginning."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released but nobody holds it"
            self._references[block] -= 1
            if self._references[block] > 0:
                continue
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._empty.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a held, fully computed block findable, unless its content is known already."""
        assert self._references[block] > 0, f"block {block} published but nobody holds it"
        if digest in self._block_of or block in self._digest_of:
            return
        self._block_of[digest] = block
        self._digest_of[block] = digest

    def clear_cache(self) -> None:
        """Forget every cached prefix; blocks that sequences hold stay theirs."""
        self._empty.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._digest_of.clear()

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Recount everything from the block lists of all holders; assert that the books agree."""
        counted = Counter(block for blocks in holders for block in blocks)
        for block, references in enumerate(self._references):
            assert references == counted[block], (
                f"refcount of block {block} is {references}, {counted[block]} hold it"
            )
        free = [*self._empty, *self._cached]
        assert len(free) == len(set(free)), f"a block is free twice: {sorted(free)}"
        unheld = {block for block, count in enumerate(self._references) if count == 0}
        assert unheld == set(free), f"free {sorted(free)} but unheld {sorted(unheld)}"
        assert all(block in self._digest_of for block in self._cached), "cached without digest"
        assert not any(block in self._digest_of for block in self._empty), "empty with digest"
        assert {digest: block for block, digest in self._digest_of.items()} == self._block_of
