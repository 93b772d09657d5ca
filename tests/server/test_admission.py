"""Room for answers, by key and in all."""

from contextlib import ExitStack

import pytest

from halfbyte.errors import RequestError
from halfbyte.server.api.admission import Admission
from halfbyte.server.config import Limits
from halfbyte.server.ops.metrics import Metrics


def admission(**limits: int) -> tuple[Admission, Metrics]:
    metrics = Metrics()
    return Admission(Limits(**limits), metrics), metrics


def test_a_key_holds_as_many_answers_as_it_may_and_gives_them_back() -> None:
    room, metrics = admission(requests_per_key=4, queued_requests=100)
    for _ in range(2):
        with ExitStack() as held:
            held.enter_context(room.admit("a", 3))
            held.enter_context(room.admit("a", 1))
            held.enter_context(room.admit("b", 4))
            with pytest.raises(RequestError, match="this key has 4 answers") as found:
                held.enter_context(room.admit("a", 1))
            assert (found.value.status, found.value.code) == (429, "rate_limit_exceeded")
            assert metrics.running == 8
        assert metrics.running == 0


def test_all_keys_together_fill_the_queue() -> None:
    room, _ = admission(requests_per_key=100, queued_requests=5)
    with room.admit("a", 3), room.admit("b", 2):
        with pytest.raises(RequestError, match="5 answers in work") as found, room.admit("c", 1):
            pass
        assert (found.value.status, found.value.code) == (429, "queue_full")


def test_a_failed_answer_gives_its_room_back_and_a_draining_server_has_none() -> None:
    room, metrics = admission(requests_per_key=1)
    for _ in range(2):
        with pytest.raises(KeyError), room.admit("a", 1):
            raise KeyError
    assert metrics.running == 0
    room.is_draining = True
    with pytest.raises(RequestError, match="shutting down") as found, room.admit("a", 1):
        pass
    assert found.value.status == 503
