"""Requests that arrive together, run to their ends: for programs that wait for their answers.

The server does not wait and uses `service`; everything else that drives an engine drives it here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from halfbyte.engine.core import Engine
from halfbyte.engine.request import Event, FinishEvent, GenerationRequest, TokenLogprobs


@dataclass(slots=True)
class Generated:
    """Everything that the engine said about one request: tokens, log-probs, counts, its end.

    token_ids        tokens of the answer, without the one that ended it
    logprobs         one for each token, if the request asked for them
    prompt_logprobs  one for each token of the prompt but the first; None if not asked for
    finish           how the answer ended; None while it runs
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: FinishEvent | None = None

    def take(self, event: Event) -> None:
        """Add what an event of this request says."""
        assert self.finish is None, "an event after the last one"
        if isinstance(event, FinishEvent):
            self.finish = event
            return
        assert event.token_ids or event.prompt_logprobs is not None, "an event that says nothing"
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or ()
        if event.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "log-probs of the prompt came twice"
            self.prompt_logprobs = event.prompt_logprobs


def steps(engine: Engine) -> Iterator[list[Event]]:
    """Compute steps until no request runs or waits; yields the events of each step."""
    while engine.has_work():
        yield engine.step()


def generate(
    engine: Engine,
    requests: Iterable[GenerationRequest],
    on_step: Callable[[], None] | None = None,
) -> dict[str, Generated]:
    """Add requests and run them to their ends; returns their answers by request id, in order.

    on_step  called after every step

    No other request may be running. Raises RequestError for the first request that can never run;
    those before it are aborted then.
    """
    answers: dict[str, Generated] = {}
    try:
        for request in requests:
            engine.add(request)
            answers[request.request_id] = Generated()
    except BaseException:
        for request_id in answers:
            engine.abort(request_id)
        raise
    for events in steps(engine):
        for event in events:
            answers[event.request_id].take(event)
        if on_step is not None:
            on_step()
    return answers
