"""Benchmarks: items in their own columns, prompts, and the traps public harnesses fall into."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UnsupportedError, UsageError
from halfbyte.evals.config import seed_for
from halfbyte.evals.tasks import aa_lcr, gpqa, ifbench, mmlu_pro, scicode
from halfbyte.evals.tasks.benchmark import Benchmark, Options, spread_indices
from halfbyte.evals.tasks.choices import choice_prompt
from halfbyte.evals.tasks.data import load_rows, rows_sha256
from halfbyte.evals.tasks.suite import BENCHMARKS, SUITES, find_benchmarks
from halfbyte.evals.types import Conversation, Image, Prompt

DATA = Path(__file__).parents[1] / "data" / "evals"
MADE_UP = DATA / "made_up"


def text_of(prompt: Prompt) -> str:
    assert not isinstance(prompt, Conversation)
    return "".join(part.text for part in prompt if not isinstance(part, Image))


def load(benchmark: Benchmark, data: Path, **more: Any) -> Any:
    return benchmark.load(Options(data=data, **more))


def test_only_options_that_exist_are_shown() -> None:
    text = choice_prompt("Why?", ["one", "two", "three"], "aa")
    assert text.endswith("Why?\n\nA) one\nB) two\nC) three")
    assert "'Answer: A/B/C'" in text
    assert "None" not in text
    assert "\\boxed{A/B/C}" in choice_prompt("Why?", ["one", "two", "three"], "aa-boxed")


def test_prompt_itself_states_no_answer() -> None:
    from halfbyte.evals.grading.letters import extract_letter

    # An echo of the whole request must not be read as an answer.
    for shape in ("aa", "aa-boxed"):
        echoed = choice_prompt("Why?", ["one", "two", "three"], shape)
        assert extract_letter(echoed, "ABC") is None


def test_mmlu_pro_items_keep_their_own_letters() -> None:
    loaded = load(mmlu_pro.BENCHMARK, DATA)
    assert len(loaded.samples) == 28
    for sample in loaded.samples:
        options = sample.fields["options"]
        text = text_of(mmlu_pro.prompt(sample, (), Options()))
        assert text.count(") ") >= len(options)
        assert sample.gold in "ABCDEFGHIJ"[: len(options)]
        assert mmlu_pro.grade(sample, f"Answer: {sample.gold}").value == 1.0
    assert loaded.provenance.sha256["items.jsonl"]


def test_limit_is_spread_over_the_subjects() -> None:
    loaded = load(mmlu_pro.BENCHMARK, DATA, limit=7)
    assert len({sample.stratum for sample in loaded.samples}) == 7
    assert spread_indices(10, 3) == [0, 3, 6]
    assert spread_indices(3, 10) == [0, 1, 2]


def test_gpqa_options_are_shuffled_the_same_way_in_every_arm() -> None:
    one, two = (load(gpqa.BENCHMARK, MADE_UP).samples for _ in range(2))
    assert one == two
    # Before shuffling the right answer is always the last: seeing one place only is a bug.
    assert len({sample.gold for sample in one}) > 1
    other = load(gpqa.BENCHMARK, MADE_UP, gpqa_seed=7).samples
    assert [s.gold for s in other] != [s.gold for s in one]
    with (MADE_UP / "gpqa_diamond" / "gpqa_diamond.csv").open() as file:
        right = {row["Record ID"]: row["Correct Answer"] for row in csv.DictReader(file)}
    for sample in one:
        assert sample.fields["options"]["ABCD".index(sample.gold)] == right[sample.item_id]


def test_null_arguments_never_reach_a_verifier(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable", reason="extra 'eval' is not installed")
    row = {
        "key": "1", "prompt": "p", "instruction_id_list": ["count:numbers"],
        "kwargs": [{"N": 1, "keyword": None, "sep": None}],
    }  # fmt: skip
    (tmp_path / "ifbench").mkdir()
    (tmp_path / "ifbench" / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = load(ifbench.BENCHMARK, tmp_path).samples
    assert sample.fields["arguments"] == ({"N": 1},)


def test_unscorable_prompts_are_refused_or_listed_never_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"key": str(i), "prompt": "p", "instruction_id_list": [kind], "kwargs": [{}]}
        for i, kind in enumerate(["words:start_verb", "format:title_case"])
    ]
    (tmp_path / "ifbench").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "ifbench" / "prompts.jsonl").write_text(lines)
    monkeypatch.setattr(
        ifbench,
        "missing_resources",
        lambda kinds: "no tagger" if "words:start_verb" in kinds else None,
    )
    with pytest.raises(UnsupportedError, match="no tagger"):
        load(ifbench.BENCHMARK, tmp_path)
    loaded = load(ifbench.BENCHMARK, tmp_path, skip_unscorable=True)
    assert [s.item_id for s in loaded.samples] == ["1"]
    assert loaded.left_out == {"0": "no tagger"}


def test_questions_over_the_same_documents_are_grouped_and_adjacent() -> None:
    loaded = load(aa_lcr.BENCHMARK, MADE_UP)
    groups = [sample.group for sample in loaded.samples]
    assert len(set(groups)) == 5
    assert groups == sorted(groups)
    prompt = text_of(aa_lcr.prompt(loaded.samples[0], (), Options()))
    assert prompt.startswith("BEGIN INPUT DOCUMENTS\n\nBEGIN DOCUMENT 1:")
    assert prompt.endswith("END QUESTION")
    # No line may carry the indentation of source code into the prompt.
    assert not any(line.startswith(" ") for line in prompt.splitlines())


def test_given_scicode_steps_are_neither_asked_nor_counted(tmp_path: Path) -> None:
    step = {
        "step_description_prompt": "d", "step_background": "", "function_header": "def f():",
        "return_line": "    return 1", "test_cases": [],
    }  # fmt: skip
    problem = {
        "problem_id": "13", "required_dependencies": "",
        "sub_steps": [{**step, "step_number": f"13.{i}"} for i in range(5, 8)],
    }  # fmt: skip
    folder = tmp_path / "scicode"
    folder.mkdir()
    (folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (folder / "targets.h5").write_bytes(b"")
    with pytest.raises(UsageError, match=r"13\.6\.txt"):
        load(scicode.BENCHMARK, tmp_path)
    (folder / "13.6.txt").write_text("GIVEN = 6")
    samples = load(scicode.BENCHMARK, tmp_path).samples
    # The step after the given one is not lost.
    assert [sample.item_id for sample in samples] == ["13.5", "13.7"]
    codes = scicode.codes_before(samples[1], ["```python\nOWN = 5\n```"])
    assert codes == ["OWN = 5", "GIVEN = 6"]


def test_scicode_without_expected_values_says_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "scicode").mkdir()
    problem = {"problem_id": "1", "required_dependencies": "", "sub_steps": []}
    (tmp_path / "scicode" / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    with pytest.raises(UsageError, match=r"test_data\.h5"):
        load(scicode.BENCHMARK, tmp_path)


def test_absent_sets_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("halfbyte.evals.tasks.data._from_hub", lambda hub: None)
    with pytest.raises(UsageError, match="Gated set: accept the terms"):
        load(gpqa.BENCHMARK, tmp_path)


def test_hub_sets_are_asked_for_at_their_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="comes with extra 'eval'")
    asked: list[Any] = []

    def fake(path: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((path, config, split, revision))
        return [{"question_id": 1, "question": "q", "options": ["a", "b"], "answer": "A",
                 "category": "math"}]  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", fake)
    loaded = mmlu_pro.BENCHMARK.load(Options())
    revision = "527feea0afed1de15a8c115abf7be4c912123315"
    assert asked == [("TIGER-Lab/MMLU-Pro", None, "test", revision)]
    assert loaded.provenance.revision == revision


def test_note_beside_the_files_travels_with_the_score() -> None:
    rows = load_rows("x", MADE_UP, patterns=("aime2025/*.jsonl",))
    assert "measures nothing" in rows.provenance.note
    assert rows.provenance.source == "made_up/aime2025"


def test_seed_depends_on_item_and_repeat_only() -> None:
    seeds = {seed_for("gpqa_diamond", f"i{i}", r) for i in range(100) for r in range(20)}
    assert len(seeds) == 2000
    assert seed_for("pocket", "pocket-01", 0) == 2_077_896_442
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("mmlu_pro", '{"question_id": 1, "question": "q"}', r"item 1 of .* has no options, answer"),
        ("mmlu_pro", '{"question_id": 1,', r"items\.jsonl, line 1 is not JSON"),
        ("mmlu_pro", '["a"]', "an item is an object"),
        ("mmlu_pro", "", "holds no items"),
        ("ifbench", '{"key": "1", "prompt": "p", "instruction_id_list": []}', "has no kwargs"),
        ("aime2025", '{"problem": "p"}', "has no answer or expected_answer column"),
    ],
)
def test_damaged_items_say_where_and_what(
    tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    (tmp_path / name).mkdir()
    file = "prompts.jsonl" if name == "ifbench" else "items.jsonl"
    (tmp_path / name / file).write_text(content)
    with pytest.raises(UsageError, match=complaint):
        load(BENCHMARKS[name], tmp_path)


def test_rows_with_images_have_the_same_hash_every_time() -> None:
    from PIL import Image as Pixels

    def rows(colour: int) -> list[dict[str, Any]]:
        return [{"id": 1, "image": Pixels.new("L", (2, 2), colour), "raw": b"x"}]

    assert rows_sha256(rows(1)) == rows_sha256(rows(1)) != rows_sha256(rows(2))


def test_other_prompts_than_the_pinned_ones_are_noted(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable", reason="extra 'eval' is not installed")
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["count:numbers"], "kwargs": [{"N": 1}]}
    (tmp_path / "ifbench").mkdir()
    (tmp_path / "ifbench" / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    assert ifbench.OTHER_ITEMS in load(ifbench.BENCHMARK, tmp_path).provenance.note
    # Copies differ in nulls, in whether keys are text, and in how they write whole numbers.
    nulls = {**row, "key": "1", "kwargs": [{"N": 1.0, "sep": None}], "more": 1}
    assert ifbench._plain(nulls) == ifbench._plain(row)


def test_suites_name_benchmarks_once_and_errors_list_them() -> None:
    assert [b.name for b in find_benchmarks(["seed", "ifbench"])] == list(SUITES["seed"])
    with pytest.raises(UsageError, match=r"seed, .*mmlu_pro"):
        find_benchmarks(["mmlu"])
    assert BENCHMARKS["gpqa_diamond"].full_items == 198
