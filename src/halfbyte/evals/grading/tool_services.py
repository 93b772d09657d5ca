"""Conversations with simulated services: carrying out their calls, and grading what these did.

The services are the leaderboard's own classes, from the user's wheel. They are handed over as text
and run in the sandbox only (`tool_world`), never in this process. Nothing is kept between steps:
each step carries out all calls so far from the start, as grading does in the end, so that a
conversation depends on nothing but its calls.
"""

import json
import secrets
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading.tool_calls import Turns, read_answer, read_calls
from halfbyte.evals.sandbox import Outcome, SandboxLimits, interpreter, run_program
from halfbyte.evals.types import Conversation, Reply, Score, right_or_wrong

Turn = Generator[Conversation, Reply, bool]

WORLD = "tool_world.py"
# A world's calls take milliseconds; what takes so long counts to a number without end.
LIMITS = SandboxLimits(
    wall_s=60.0, cpu_s=20, memory_bytes=1 << 30, processes=16, output_bytes=16 << 20
)


@dataclass(frozen=True, slots=True)
class Services:
    """The simulated services that a conversation of several turns works on.

    classes  their names, in the order in which their functions are offered
    initial  name -> the state that it begins with
    is_long  whether they fill themselves with long texts and lists
    sources  module -> its source text, in the order in which they are read
    """

    classes: tuple[str, ...]
    initial: Mapping[str, Any]
    is_long: bool
    sources: Mapping[str, str]


def carry_out(services: Services, turns: Turns) -> list[str] | None:
    """What the calls of the last step return, after all calls before them; None past a limit."""
    said = _run(services, turns, None)
    return None if said is None else [str(text) for text in said["results"]]


def grade_conversation(services: Services, answers: Sequence[Sequence[str]], answer: str) -> Score:
    """Score a conversation: after each turn, the state and what was returned must be right.

    answers  for each turn the right calls, as text; none where the model should call nothing
    """
    turns = read_answer(answer)
    shown = json.dumps(
        [[[c.name, c.arguments] for step in turn for c in step.calls] for turn in turns],
        ensure_ascii=False,
    )
    if len(turns) != len(answers):
        fault = f"ended by force in turn {len(turns)} of {len(answers)}"
        return right_or_wrong(False, shown, reason=fault)
    said = _run(services, turns, answers)
    fault = "the calls went beyond the sandbox's limits" if said is None else said["fault"]
    return right_or_wrong(fault is None, shown, **({"reason": fault} if fault else {}))


def _run(
    services: Services, turns: Turns, answers: Sequence[Sequence[str]] | None
) -> dict[str, Any] | None:
    """What the world says of the turns; None if it ran into a limit."""
    readable = [[calls for step in steps if (calls := read_calls(step))] for steps in turns]
    token = secrets.token_hex(8)
    task = {
        "token": token,
        "sources": services.sources,
        "classes": services.classes,
        "initial": services.initial,
        "is_long": services.is_long,
        "turns": readable,
        "answers": answers,
    }
    outcome = run_program(
        interpreter(sys.executable),
        _world(),
        limits=LIMITS,
        files={"task.json": json.dumps(task)},
    )
    return _read(outcome, token)


def _read(outcome: Outcome, token: str) -> dict[str, Any] | None:
    for line in outcome.stdout.splitlines():
        if line.startswith(token):
            said: dict[str, Any] = json.loads(line.removeprefix(token))
            return said
    if outcome.ending == "exited":
        last = (outcome.stderr.strip().splitlines() or ["it said nothing"])[-1][-300:]
        raise UnsupportedError(f"the simulated services do not run: {last}")
    return None


def _world() -> str:
    return resources.files("halfbyte.evals.grading").joinpath(WORLD).read_text()
