"""Jobs in work: each is shown among the running ones while its pieces come."""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import replace

from halfbyte.chat.router import CallStart
from halfbyte.server.api.backend import Backend, Running
from halfbyte.server.api.completion import AnswerMessage, Job
from halfbyte.server.api.pieces import Piece
from halfbyte.server.call import Call


@contextlib.contextmanager
def _tracked(backend: Backend, job: Job, call: Call) -> Iterator[None]:
    """Show a job among the running ones, and note at its end what became of it."""
    call.facts |= {"model": backend.config.model_names[0], "answer_id": job.answer_id}
    backend.running[job.answer_id] = Running(call, time.monotonic(), job)
    try:
        yield
    finally:
        del backend.running[job.answer_id]
        call.facts |= job.facts()
        if job.usage.image_tokens:
            backend.body_room.trim_soon()


async def run(backend: Backend, job: Job, call: Call) -> AsyncGenerator[list[Piece], None]:
    """Pieces of all choices as they come; closing the generator aborts what still runs."""
    pieces = backend.answers.pieces(job)
    with _tracked(backend, job, call):
        async with contextlib.aclosing(pieces):
            async for batch in pieces:
                yield [_in_clients_names(piece, job.tool_names) for piece in batch]


def _in_clients_names(piece: Piece, names: Mapping[str, str]) -> Piece:
    delta = piece.delta
    if not isinstance(delta, CallStart) or delta.name not in names:
        return piece
    return replace(piece, delta=replace(delta, name=names[delta.name]))


async def collect(backend: Backend, job: Job, call: Call) -> list[AnswerMessage]:
    """Run a job to its end; returns one message for each choice."""
    messages = [AnswerMessage() for _ in job.choices]
    async with contextlib.aclosing(run(backend, job, call)) as pieces:
        async for batch in pieces:
            for piece in batch:
                messages[piece.index].add(piece)
    return messages
