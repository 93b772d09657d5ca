"""Conversations with simulated services: what calls return, what state they must lead to."""

import dataclasses
import json
from typing import Any

import pytest

from evals.test_tool_calls import SAMPLES, says
from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading import tool_services, tool_world
from halfbyte.evals.grading.tool_calls import write_answer
from halfbyte.evals.sandbox import Outcome, SandboxLimits
from halfbyte.evals.tasks import bfcl
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.types import Conversation, Reply, Sample

LEAK = ("open_ticket", {"title": "Leak", "urgency": 3})
UNURGENT = ("open_ticket", {"title": "Leak"})
CLOSE = ("close_ticket", {"number": 7})
SUM = ("sum_values", {"numbers": [1.5, 2]})
LIST: tuple[str, Any] = ("list_tickets", {})
DONE = Reply("Done.")


def here(*_: Any, files: dict[str, str], **__: Any) -> Outcome:
    """`run_program` for services of our own, in this process: a sandbox takes a second to start."""
    world: Any = tool_world  # a program of its own, without types
    task = json.loads(files["task.json"])
    modules = world.load_modules(task["sources"])
    said = (
        {"results": world.last_results(task, modules)}
        if task["answers"] is None
        else {"fault": world.grade(task, modules)}
    )
    return Outcome("exited", 0, 0, f"{task['token']}{json.dumps(said)}\n", "", 0.0, ())


@pytest.fixture
def without_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_services, "run_program", here)


def fault(item: str, *turns: list[Reply]) -> str | None:
    score = bfcl.grade(SAMPLES[f"multi_turn_{item}_0"], write_answer(turns))
    assert (score.value == 1.0) is ("reason" not in score.details)
    return score.details.get("reason")


@pytest.mark.usefixtures("without_sandbox")
@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([[says(LEAK), DONE], [says(CLOSE), says(SUM), DONE]], None),
        ([[says(LEAK), DONE], [says(SUM, CLOSE), DONE]], None),  # one step, another order
        ([[says(LEAK), says(LIST), DONE], [says(CLOSE, SUM)]], None),  # more than is needed
        ([[says(LEAK, SUM)], [says(CLOSE)]], None),  # what a turn wants may be known before
        ([[says(LEAK, CLOSE)], [says(SUM)]], "turn 1: TicketAPI.open"),  # but not done
        ([[says(UNURGENT)], [says(CLOSE, SUM)]], "turn 1: TicketAPI.titles"),
        ([[says(LEAK)], [says(CLOSE)]], "turn 2: nothing returned"),
        ([[says(LEAK)], [says(CLOSE, ("sum_values", {"numbers": [1, 2]}))]], "turn 2: nothing"),
        ([[DONE], [says(LEAK, CLOSE, SUM)]], "turn 1: there is no call"),
        ([[says(LEAK)]], "ended by force in turn 1 of 2"),
        # A step that cannot be read is no step, and neither is one without calls.
        ([[says(("x", "{")), says(LEAK), Reply("")], [says(CLOSE, SUM)]], None),
        ([[says(LEAK), says(("_load_scenario", {}), ("exit", {}))], [says(CLOSE, SUM)]], None),
    ],
)  # fmt: skip
def test_turns_must_lead_to_the_right_state_and_results(
    turns: list[list[Reply]], expected: str | None
) -> None:
    found = fault("base", *turns)
    assert found is None if expected is None else found is not None and found.startswith(expected)


@pytest.mark.usefixtures("without_sandbox")
def test_a_turn_that_cannot_be_answered_asks_nothing_but_its_calls_count() -> None:
    right = [says(LEAK), says(LIST)]
    assert fault("miss_param", [Reply("How urgent?")], right) is None
    assert fault("miss_param", [says(LIST)], right) is None
    assert fault("miss_param", [says(LEAK)], [says(LIST)]) is None  # the state is right in the end
    assert fault("miss_param", [says(LEAK)], right) is not None


def services() -> tool_services.Services:
    found: tool_services.Services = SAMPLES["multi_turn_base_0"].fields["services"]
    return found


def results(*calls: tuple[str, Any]) -> list[str] | None:
    return tool_services.carry_out(services(), [[says(LEAK)], [says(*calls)]])


@pytest.mark.usefixtures("without_sandbox")
def test_results_are_what_the_leaderboard_tells_a_model() -> None:
    found = results(
        LIST, SUM, CLOSE, CLOSE, ("no_such", {}), ("sum_values", {}), ("open_ticket", {"class": 1}),
        ("sum_values", '{"numbers": [Infinity]}'),
    )  # fmt: skip
    assert found is not None
    assert found[:3] == ["[7, 8, 9]", '{"result": 3.5}', "7 is closed"]
    assert found[3] == "Error during execution: list.remove(x): x not in list"
    assert found[4] == "Error during execution: name 'no_such' is not defined"
    assert "missing 1 required positional argument" in found[5]
    assert found[6] == "Error during execution: invalid syntax"
    assert found[7] == "Error during execution: a number is not finite"


def test_long_contexts_fill_the_services() -> None:
    sample = SAMPLES["multi_turn_long_context_0"]
    found = tool_services.carry_out(sample.fields["services"], [[says(LIST)]])
    assert found is not None and len(found[0]) > 1_000


def test_calls_without_end_are_ended_and_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_services, "LIMITS", SandboxLimits(wall_s=30, cpu_s=1))
    endless: tuple[str, Any] = ("wait_for_ever", {})
    found = fault("base", [says(LEAK, endless)], [says(CLOSE, SUM)])
    assert found == "the calls went beyond the sandbox's limits"


def play(sample: Sample, *script: Reply) -> tuple[list[Conversation], str | None]:
    """What is asked of a model that answers by a script, and the answer that is stored."""
    steps, asked = bfcl.converse(sample, Options()), []
    asked.append(next(steps))
    for reply in script:
        try:
            asked.append(steps.send(reply))
        except StopIteration as end:
            return asked, end.value
    return asked, None


def test_a_conversation_goes_on_until_a_step_without_calls() -> None:
    sample = SAMPLES["multi_turn_base_0"]
    asked, answer = play(sample, says(LEAK), DONE, says(CLOSE, SUM), DONE)
    assert answer is not None and bfcl.grade(sample, answer).value == 1.0
    roles = [[message["role"] for message in one.messages] for one in asked]
    assert roles == [
        ["user"],
        ["user", "assistant", "tool"],
        ["user", "assistant", "tool", "assistant", "user"],
        ["user", "assistant", "tool", "assistant", "user", "assistant", "tool", "tool"],
    ]
    said, result = asked[1].messages[1:]
    assert said["tool_calls"][0]["id"] == result["tool_call_id"] == "c0"
    assert result["content"] == '{"number": 9}'
    assert len(asked[0].tools) == 4


@pytest.mark.usefixtures("without_sandbox")
def test_a_function_that_was_missing_is_brought_by_a_turn_of_its_own() -> None:
    asked, answer = play(
        SAMPLES["multi_turn_miss_func_0"], says(LEAK), DONE, DONE, says(CLOSE), DONE
    )
    names = [[tool["function"]["name"] for tool in one.tools] for one in asked]
    assert "close_ticket" not in names[2] and names[3] == [*names[2], "close_ticket"]
    assert asked[3].messages[-1] == {"role": "user", "content": bfcl.MORE_FUNCTIONS}
    assert answer is not None and bfcl.grade(SAMPLES["multi_turn_miss_func_0"], answer).value == 1.0


def test_a_turn_has_at_most_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_services, "carry_out", lambda services, turns: ["[]"])
    asked, answer = play(SAMPLES["multi_turn_base_0"], *[says(LIST)] * 30)
    assert len(asked) == bfcl.MOST_STEPS + 1 == 21
    assert answer is not None and answer.count("list_tickets") == 21


def test_services_that_do_not_run_are_our_fault_and_not_the_models() -> None:
    broken = dataclasses.replace(services(), sources={"math_api": "import no_such_module"})
    with pytest.raises(UnsupportedError, match="no_such_module"):
        tool_services.carry_out(broken, [[says(LIST)]])
