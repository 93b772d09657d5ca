"""Tool calls through an endpoint: conversations, kills, faults, two arms compared."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="extra 'eval' is not installed")

from benchmarks.tool_calls_agreement import right_calls, right_turns

import halfbyte
from evals_stub import Reply, completion, refusal, serving
from halfbyte import bfcl as leaderboard
from halfbyte.cli.main import main
from halfbyte.evals.config import seed_for
from halfbyte.evals.records import read_attempts, read_records, read_run
from halfbyte.evals.tasks import bfcl
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.types import Sample

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MADE_UP = Path(__file__).parents[1] / "data" / "evals" / "made_up"
SAMPLES = bfcl.BENCHMARKS[0].load(Options(data=MADE_UP)).samples


@pytest.fixture(autouse=True)
def _collect_while_its_warnings_are_filtered() -> Iterator[None]:
    yield
    gc.collect()


def calling(*calls: tuple[str, dict[str, Any]], content: str | None = None) -> Reply:
    """A 200 whose message has tool calls."""
    status, body = completion("", finish_reason="tool_calls")
    body["choices"][0]["message"] = {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "id": f"call{n:05d}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for n, (name, arguments) in enumerate(calls)
        ],
    }
    return status, body


def best_calls(sample: Sample) -> list[tuple[str, dict[str, Any]]]:
    """The right calls, as far as the documents of their functions let anybody make them.

    Some right calls name parameters that their document lacks, or have nothing but "" for one that
    must be given.
    """
    documents = {leaderboard.wire_name(d["name"]): d for d in sample.fields["documents"]}
    found = []
    for name, given in right_calls(sample, random.Random(0), first=True):
        parameters = documents[name]["parameters"]
        known = {key: value for key, value in given.items() if key in parameters["properties"]}
        found.append((name, dict.fromkeys(parameters["required"], "") | known))
    return found


class Perfect:
    """A model that knows every item by the seed it is asked with, and makes the right calls."""

    def __init__(self, samples: Sequence[Sample], benchmark: str, repeats: int = 1) -> None:
        self.by_seed = {
            seed_for(benchmark, s.item_id, r): s for s in samples for r in range(repeats)
        }

    def __call__(self, request: dict[str, Any]) -> Reply:
        if request.get("tool_choice") == "required":
            return calling(("ring_bell", {"times": 2}))
        sample = self.by_seed[request["seed"]]
        if "services" in sample.fields:
            return self._turn(sample, request["messages"])
        if sample.fields["answers"] is None:
            if sample.stratum != "live_relevance":
                return completion("None of my tools can do that.")
            return calling((request["tools"][0]["function"]["name"], {}))
        return calling(*best_calls(sample))

    def _turn(self, sample: Sample, messages: list[dict[str, Any]]) -> Reply:
        last = max(n for n, message in enumerate(messages) if message["role"] == "user")
        turn = sum(message["role"] == "user" for message in messages) - 1
        made = sum(len(message.get("tool_calls", ())) for message in messages[last:])
        wanted = right_turns(sample)[turn]
        return calling(wanted[made]) if made < len(wanted) else completion("Done.")


def evaluate(url: str, out: Path, *more: str, suite: str = "bfcl") -> int:
    data = ("--data", str(MADE_UP))
    return main(["evaluate", url, "--suite", suite, *data, "--out", str(out), *more])


def test_a_perfect_model_is_right_everywhere_and_a_run_is_graded_again(tmp_path: Path) -> None:
    with serving(Perfect(SAMPLES, "bfcl")) as stub:
        assert evaluate(stub.url, tmp_path) == 0
    result = read_run(tmp_path).benchmarks["bfcl"]
    assert (result.score, result.causes) == (1.0, {"ok": 19})
    assert set(result.by_stratum) == {s.stratum for s in SAMPLES}
    averages = {k: v for k, v in result.metrics.items() if k.startswith("leaderboard")}
    assert set(averages) == {
        f"leaderboard_{g}" for g in ("non_live", "live", "irrelevance", "multi_turn")
    }
    assert set(averages.values()) == {1.0}
    first = json.loads((tmp_path / "bfcl" / "request.json").read_text())
    assert first["tools"][0]["function"]["name"] == "kitchen_brew"
    asked = stub.requests[1:]
    assert all(request["tools"] and "tool_choice" not in request for request in asked)
    # Every step is a request, and an attempt counts the tokens of all of them.
    records = {r.item_id: r for r in read_records(tmp_path / "bfcl" / "samples.jsonl")}
    assert records["multi_turn_base_0"].completion_tokens == 5 * 8
    assert sum(r.completion_tokens for r in records.values()) == 8 * len(asked)
    assert main(["grade", str(tmp_path), "--data", str(MADE_UP)]) == 0
    assert read_run(tmp_path).benchmarks["bfcl"].score == 1.0


def test_two_arms_are_compared_item_by_item(tmp_path: Path) -> None:
    perfect = Perfect(SAMPLES, "bfcl_live")
    wrong = {"live_simple_1-0-0", "live_multiple_0-0-0", "live_irrelevance_0-0-0"}

    def worse(request: dict[str, Any]) -> Reply:
        sample = perfect.by_seed.get(request["seed"])
        if sample is not None and sample.item_id in wrong:
            return calling(("kitchen_brew", {"drink": "water"}))
        return perfect(request)

    for arm, script in (("fp8", perfect), ("mixed", worse)):
        with serving(script) as stub:
            assert evaluate(stub.url, tmp_path / arm, suite="bfcl_live") == 0
    out = tmp_path / "comparison.json"
    main(["compare-evals", str(tmp_path / "fp8"), str(tmp_path / "mixed"), "--out", str(out)])
    row = json.loads(out.read_text())["benchmarks"]["bfcl_live"]
    assert row["difference"]["mean"] == pytest.approx(-3 / 8)


@pytest.mark.parametrize(
    ("required", "message"),
    [
        (completion("ring_bell(times=2)"), "makes no tool calls"),
        (completion("thinking", finish_reason="length"), None),
        (refusal(400, "tool_choice is not supported"), None),
        (refusal(503, "busy"), None),
    ],
)
def test_a_server_that_makes_no_tool_calls_is_found_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], required: Reply, message: str | None
) -> None:
    perfect = Perfect(SAMPLES, "bfcl_non_live")

    def script(request: dict[str, Any]) -> Reply:
        return required if "tool_choice" in request else perfect(request)

    with serving(script) as stub:
        code = evaluate(stub.url, tmp_path, suite="bfcl_non_live")
    if message is None:
        assert code == 0
        assert read_run(tmp_path).benchmarks["bfcl_non_live"].score == 1.0
    else:
        assert code == 2
        assert len(stub.requests) == 1
        assert not (tmp_path / "run.json").exists()
        assert message in capsys.readouterr().err


def test_a_server_without_tools_is_found_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no = refusal(400, "this model has no tools")
    with serving(lambda request: no, tried=lambda request: no) as stub:
        assert evaluate(stub.url, tmp_path) == 2
    assert not stub.requests
    assert "this model has no tools" in capsys.readouterr().err


def script_of(change: Callable[[int, dict[str, Any]], Reply | None]) -> Any:
    """The perfect model, except where `change` has a reply for the n-th request of an item."""
    perfect = Perfect(SAMPLES, "bfcl_multi_turn")
    seen: Counter[int] = Counter()

    def script(request: dict[str, Any]) -> Reply:
        if "tool_choice" in request:
            return perfect(request)
        seen[request["seed"]] += 1
        return change(seen[request["seed"]], request) or perfect(request)

    return script


def test_faults_in_the_middle_of_a_conversation_are_told_apart(tmp_path: Path) -> None:
    item = {seed_for("bfcl_multi_turn", s.item_id, 0): s.stratum for s in SAMPLES}

    def change(step: int, request: dict[str, Any]) -> Reply | None:
        kind = item[request["seed"]]
        if kind == "multi_turn_base" and step == 2:
            return refusal(503, "busy")  # passes by itself
        if kind == "multi_turn_miss_func" and step == 3:
            return refusal(400, "too long")
        if kind == "multi_turn_miss_param" and step == 2:
            return completion("so much to say", finish_reason="length")
        if kind == "multi_turn_long_context":  # never ends by itself
            return calling(("list_tickets", {}))
        return None

    with serving(script_of(change)) as stub:
        assert evaluate(stub.url, tmp_path, suite="bfcl_multi_turn") == 0
    records = {r.stratum: r for r in read_records(tmp_path / "bfcl_multi_turn" / "samples.jsonl")}
    assert records["multi_turn_base"].cause == "ok"
    assert records["multi_turn_base"].retries == 1
    assert records["multi_turn_miss_func"].cause == "refused"
    assert records["multi_turn_miss_func"].completion_tokens == 16  # of the steps before
    assert records["multi_turn_miss_param"].cause == "length"
    # Ended by force in its last turn, it is graded by what it did: the leaderboard does so.
    assert records["multi_turn_long_context"].cause == "ok"
    assert records["multi_turn_long_context"].answer.count("list_tickets") == bfcl.MOST_STEPS + 1


_RUN = """
import sys
sys.modules["anthropic"] = None
from halfbyte.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


# The runner is that of test_evals_run, whose kills the check makes.
@pytest.mark.slow
@pytest.mark.timeout(180)  # each start imports inspect-ai: over ten seconds on a busy machine
def test_a_kill_costs_the_conversations_in_flight_only(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", _RUN, "evaluate", "URL", "--suite", "bfcl", "--repeats", "2",
        "--data", str(MADE_UP), "--concurrency", "4", "--out", str(tmp_path),
    ]  # fmt: skip
    journal = tmp_path / "bfcl" / "attempts.jsonl"
    source = str(Path(halfbyte.__file__).parents[1])
    how: dict[str, Any] = {
        "stderr": subprocess.DEVNULL, "env": {**os.environ, "PYTHONPATH": source}
    }  # fmt: skip
    with serving(Perfect(SAMPLES, "bfcl", repeats=2), delay_s=0.03) as stub:
        command[4] = stub.url
        child = subprocess.Popen(command, start_new_session=True, **how)
        while child.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= 17:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            time.sleep(0.01)
        before = journal.read_bytes().count(b"\n")
        asked = len(stub.requests)
        done = subprocess.run(command, check=False, **how)
    assert (child.returncode, done.returncode) == (-signal.SIGKILL, 0)
    assert read_run(tmp_path).benchmarks["bfcl"].causes == {"ok": 2 * len(SAMPLES)}
    attempts = Counter((a.item_id, a.repeat) for a in read_attempts(journal))
    assert set(attempts.values()) == {1}
    # What had been answered before the kill was not asked again.
    again = {request["seed"] for request in stub.requests[asked:]}
    kept = [a.seed for a in read_attempts(journal)][:before]
    assert not again & set(kept)


def test_calls_and_messages_go_over_the_wire_as_the_protocol_has_them(tmp_path: Path) -> None:
    lock, seen = threading.Lock(), []
    perfect = Perfect(SAMPLES, "bfcl_multi_turn")

    def script(request: dict[str, Any]) -> Reply:
        with lock:
            seen.append(request)
        return perfect(request)

    with serving(script) as stub:
        evaluate(stub.url, tmp_path, "--limit", "1", suite="bfcl_multi_turn")
    longest = max(seen, key=lambda request: len(request["messages"]))
    call = longest["messages"][1]["tool_calls"][0]
    assert call["type"] == "function"
    assert json.loads(call["function"]["arguments"]) == {"title": "Leak", "urgency": 3}
    assert longest["messages"][2] == {
        "role": "tool", "tool_call_id": call["id"], "content": '{"number": 9}',
    }  # fmt: skip
    assert longest["tools"][0]["function"]["parameters"]["type"] == "object"
    assert longest["model"] == "stub" and longest["temperature"] == 0.7


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pocket_is_asked_through_our_own_server(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "pocket" / "model"
    greedy = ("--temperature", "0", "--max-tokens", "128", "--reasoning-effort", "none")
    assert evaluate(str(model), tmp_path, *greedy) == 0
    result = read_run(tmp_path).benchmarks["bfcl"]
    assert result.status == "complete"
    # Tools, calls and their results are taken; whether Pocket knows these tools is another matter.
    assert set(result.causes) <= {"ok", "wrong", "unparsed", "length"}
    assert result.by_stratum["irrelevance"]["score"] == 1.0
