import asyncio

import pytest

from halfbyte.errors import CapacityError
from halfbyte.server.ops import supervise
from halfbyte.server.ops.supervise import Supervisor
from server.scripted import ScriptedService


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_POLL_S", 0.005)


def engine() -> ScriptedService:
    return ScriptedService(lambda request: ())


async def test_a_dead_engine_is_stopped_replaced_and_started() -> None:
    first, second = engine(), engine()
    supervisor = Supervisor(first, lambda: second)
    await supervisor.start()
    assert supervisor.is_ready and supervisor.is_alive
    first.is_alive = False
    assert not supervisor.is_ready and supervisor.is_alive
    async with asyncio.timeout(2):
        while not supervisor.is_ready:
            await asyncio.sleep(0.005)
    await supervisor.stop()
    assert first.calls == ["start", "stop"] and second.calls == ["start", "stop"]
    assert supervisor.num_restarts == 1


async def test_repeated_death_is_final_and_said() -> None:
    def load() -> ScriptedService:
        dead = engine()
        dead.is_alive = False
        return dead

    supervisor = Supervisor(load(), load)
    await supervisor.start()
    async with asyncio.timeout(2):
        while supervisor.is_alive:
            await asyncio.sleep(0.005)
    with pytest.raises(CapacityError):
        supervisor.generate(None)  # type: ignore[arg-type]
    await supervisor.stop()


async def test_a_load_that_fails_is_tried_again() -> None:
    attempts = []

    def load() -> ScriptedService:
        attempts.append(1)
        if len(attempts) == 1:
            raise CapacityError("no memory yet")
        return engine()

    first = engine()
    supervisor = Supervisor(first, load)
    await supervisor.start()
    first.is_alive = False
    async with asyncio.timeout(2):
        while not supervisor.is_ready:
            await asyncio.sleep(0.005)
    assert len(attempts) == 2
    await supervisor.stop()


async def test_what_is_asked_reaches_the_engine_that_is_there_and_waits_for_none() -> None:
    first = engine()
    supervisor = Supervisor(first, engine)
    supervisor.abort("x")
    supervisor.clear_prefix_cache()
    assert first.told_to_abort == {"x"} and first.calls == ["clear"]
    assert supervisor.stats() == first.stats()
    supervisor._engine = None
    supervisor.abort("y")
    supervisor.clear_prefix_cache()
    assert supervisor.stats() is None
    assert first.told_to_abort == {"x"} and first.calls == ["clear"]
