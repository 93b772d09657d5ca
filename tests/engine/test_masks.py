"""Masks filled ahead: each request's own words, errors where they belong, no thread left."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from halfbyte.engine.masks import MaskFiller
from halfbyte.engine.request import GenerationRequest, SamplingParams

VOCAB = 70


class Counting:
    """Allows one token, the next at each acceptance; notes which thread filled."""

    def __init__(self, token_id: int, *, fails: bool = False) -> None:
        self.token_id = token_id
        self.threads: list[str] = []
        self._fails = fails

    def allows(self, token_id: int) -> bool:
        return token_id == self.token_id

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        self.threads.append(threading.current_thread().name)
        if self._fails:
            raise ValueError("this grammar is broken")
        bitmask[:] = 0
        bitmask[self.token_id // 32] = np.uint32(1) << np.uint32(self.token_id % 32)

    def accept(self, token_id: int) -> None:
        self.token_id += 1

    def is_finished(self) -> bool:
        return False


def request_of(name: str, mask: Counting | None) -> GenerationRequest:
    return GenerationRequest(name, (1,), SamplingParams(), mask)


def allowed(filler: MaskFiller, request: GenerationRequest) -> Sequence[int]:
    words = filler.words(request).numpy().view(np.uint8)
    return [int(i) for i in np.unpackbits(words, bitorder="little").nonzero()[0]]


def test_each_request_gets_its_own_words_filled_ahead_then_directly() -> None:
    filler = MaskFiller(VOCAB)
    masks = [Counting(token_id) for token_id in range(0, 66, 3)]
    requests = [request_of(f"r{n}", mask) for n, mask in enumerate(masks)]
    for _ in range(3):
        filler.begin([*requests, request_of("free", None)])
        for request, mask in zip(requests, masks, strict=True):
            assert allowed(filler, request) == [mask.token_id]
            assert mask.threads.pop().startswith("masks")
            mask.accept(mask.token_id)
            # A speculated token further on: not begun, so filled by who asks.
            assert allowed(filler, request) == [mask.token_id]
            assert mask.threads.pop() == threading.current_thread().name
    filler.close()


def test_a_mask_that_fails_raises_for_its_own_request_only() -> None:
    filler = MaskFiller(VOCAB)
    good, bad = request_of("good", Counting(5)), request_of("bad", Counting(6, fails=True))
    filler.begin([bad, good])
    assert allowed(filler, good) == [5]
    with pytest.raises(ValueError, match="this grammar is broken"):
        filler.words(bad)
    # Again, and nobody asks for it: it troubles no later step.
    filler.begin([bad])
    filler.forget()
    filler.begin([good])
    assert allowed(filler, good) == [5]
    filler.close()


def test_what_is_begun_is_not_begun_again_and_what_was_forgotten_is() -> None:
    filler = MaskFiller(VOCAB)
    first, second = Counting(5), Counting(6)
    requests = [request_of("first", first), request_of("second", second)]
    filler.begin(requests)
    filler.begin(requests)
    assert [allowed(filler, request) for request in requests] == [[5], [6]]
    assert len(first.threads) == len(second.threads) == 1
    filler.begin(requests)
    filler.forget()
    first.accept(5)
    filler.begin(requests)
    assert [allowed(filler, request) for request in requests] == [[6], [6]]
    filler.close()


def test_a_token_that_was_allowed_makes_what_was_begun_stale() -> None:
    filler = MaskFiller(VOCAB)
    mask = Counting(5)
    request = request_of("a", mask)
    filler.begin([request])
    assert not filler.allows(request, 6)
    assert filler.allows(request, 5)
    mask.accept(5)
    assert allowed(filler, request) == [6]
    filler.begin([request])
    assert not filler.allows(request, 5)
    assert allowed(filler, request) == [6]
    filler.close()


def test_closing_ends_the_threads() -> None:
    before = set(threading.enumerate())
    filler = MaskFiller(VOCAB)
    filler.begin([request_of(f"r{n}", Counting(n)) for n in range(8)])
    assert set(threading.enumerate()) - before
    filler.close()
    assert set(threading.enumerate()) <= before


class Slow(Counting):
    """Fills when it is let go; says whether anything else was asked of it in the meantime."""

    def __init__(self, token_id: int) -> None:
        super().__init__(token_id)
        self.is_filling = threading.Event()
        self.may_fill = threading.Event()
        self.was_disturbed = False

    def allows(self, token_id: int) -> bool:
        self.was_disturbed |= self.is_filling.is_set()
        return super().allows(token_id)

    def fill(self, bitmask: NDArray[np.uint32]) -> None:
        self.is_filling.set()
        assert self.may_fill.wait(10)
        super().fill(bitmask)
        self.is_filling.clear()


@pytest.mark.parametrize("asked", ["allows", "words", "forget"])
def test_nothing_is_asked_of_a_mask_that_is_being_filled(asked: str) -> None:
    """Grammars are no code for two threads; what was begun is waited for."""
    filler = MaskFiller(VOCAB)
    mask = Slow(5)
    request = request_of("a", mask)
    filler.begin([request])
    assert mask.is_filling.wait(10)
    threading.Timer(0.2, mask.may_fill.set).start()
    if asked == "allows":
        assert filler.allows(request, 5)
    elif asked == "words":
        assert allowed(filler, request) == [5]
    else:
        filler.forget()
    assert not mask.is_filling.is_set() and not mask.was_disturbed
    filler.close()
