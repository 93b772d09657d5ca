"""SciCode: gold code passes, anything less fails; prompts and extraction."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UnsupportedError
from halfbyte.evals.grading import scripts
from halfbyte.evals.sandbox import SandboxLimits, interpreter, isolation, run_program

DATA = Path(__file__).parents[1] / "data" / "evals" / "scicode"
PROBLEMS: dict[str, dict[str, Any]] = {
    row["problem_id"]: row
    for row in map(json.loads, (DATA / "problems_dev_subset.jsonl").read_text().splitlines())
}
STEPS = [(name, i) for name, p in PROBLEMS.items() for i in range(len(p["sub_steps"]))]


@pytest.fixture(scope="module", autouse=True)
def _needs_sandbox_and_h5py() -> None:
    pytest.importorskip("h5py", reason="the interpreter of generated code needs h5py")
    try:
        isolation()
    except UnsupportedError as reason:
        pytest.skip(f"no sandbox on this machine: {reason}")


def run_step(problem: dict[str, Any], index: int, codes: list[str]) -> float | None:
    targets = DATA / "targets.h5"
    program = scripts.step_program(problem, index, codes, str(targets), "reached-the-end")
    outcome = run_program(
        interpreter(sys.executable),
        program,
        limits=SandboxLimits(wall_s=30, cpu_s=30, memory_bytes=4 << 30),
        visible=[targets],
        files={scripts.RUNTIME: scripts.runtime_source()},
    )
    score = scripts.grade_step(codes[-1], outcome, "reached-the-end")
    assert score.value == 1.0 or score.cause == "wrong"
    return score.value


@pytest.mark.parametrize("name, index", STEPS)
def test_gold_code_passes(name: str, index: int) -> None:
    problem = PROBLEMS[name]
    gold = [step["ground_truth_code"] for step in problem["sub_steps"][: index + 1]]
    wrapped = [scripts.extract_code(f"Here:\n```python\nimport os\n{code}\n```") for code in gold]
    assert run_step(problem, index, wrapped) == 1.0


@pytest.mark.parametrize("name, index", STEPS[::3])
def test_stub_fails(name: str, index: int) -> None:
    problem = PROBLEMS[name]
    gold = [step["ground_truth_code"] for step in problem["sub_steps"][:index]]
    header = problem["sub_steps"][index]["function_header"]
    assert run_step(problem, index, [*gold, f"{header}\n    return None"]) == 0.0


def test_leaving_early_is_not_passing() -> None:
    problem = PROBLEMS["1"]
    gold = problem["sub_steps"][0]["ground_truth_code"]
    assert run_step(problem, 0, [f"{gold}\nimport os\nos._exit(0)"]) == 0.0
    assert run_step(problem, 0, [f"{gold}\nraise SystemExit(0)"]) == 0.0


def test_code_is_the_main_module_of_its_process() -> None:
    problem = PROBLEMS["1"]
    gold = problem["sub_steps"][0]["ground_truth_code"]
    code = f"{gold}\nimport __main__\nassert __main__.__dict__ is globals()"
    assert run_step(problem, 0, [code]) == 1.0


def test_code_is_taken_from_the_first_python_block() -> None:
    text = "a\n```\nx = 1\n```\nb\n```python\ny = 2\n```\n```python\nz = 3\n```"
    assert scripts.extract_code(text) == "y = 2"
    assert scripts.extract_code("```\nx = 1\n```") == "x = 1"
    assert scripts.extract_code("x = 1") == "x = 1"
    assert scripts.extract_code("```python\nx = 1") == "x = 1"


def test_imports_are_dropped_and_nothing_else() -> None:
    code = (
        "import os, sys\nfrom a import (\n    b,\n    c,\n)\nfrom d import e, \\\n    f\n"
        "important = 1\ndef g():\n    import h\ndef i(x):\n    return importlib(x)"
    )
    dropped = scripts.drop_imports(code)
    assert dropped == ("important = 1\ndef g():\n    pass\ndef i(x):\n    return importlib(x)")
    compile(dropped, "x", "exec")


def test_prompt_shows_own_earlier_code_and_no_later_step() -> None:
    problem = next(p for p in PROBLEMS.values() if len(p["sub_steps"]) > 2)
    prompt = scripts.step_prompt(problem, 1, ["def mine(): return {1: 2}"], with_background=True)
    assert "def mine(): return {1: 2}" in prompt
    assert problem["sub_steps"][1]["function_header"] in prompt
    assert problem["sub_steps"][2]["function_header"] not in prompt
    assert problem["sub_steps"][0]["ground_truth_code"] not in prompt
    assert problem["required_dependencies"] in prompt
    without = scripts.step_prompt(problem, 1, ["pass"], with_background=False)
    assert len(without) < len(prompt)


def test_every_layout_of_the_targets_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    np = pytest.importorskip("numpy")
    sparse = pytest.importorskip("scipy.sparse")
    from halfbyte.evals.grading import scicode_runtime as runtime

    path = tmp_path / "t.h5"
    matrix = sparse.csr_matrix([[1.0, 0], [0, 2]])
    with h5py.File(path, "w") as file:
        file["1.1/test1/var1"] = np.arange(3)
        file["1.1/test2/var1"] = 1.5
        file["1.1/test2/var2"] = "text"
        file["1.1/test3/var1/list/var1"] = [1, 2]
        file["1.1/test3/var1/list/var2"] = [3]
        for name in ("data", "indices", "indptr"):
            file[f"1.1/test4/var1/sparse_matrix/{name}"] = getattr(matrix, name)
        file["1.1/test4/var1/sparse_matrix/shape"] = matrix.shape
        file["1.1/test5/var1/0.5"] = 7
        file["1.1/test5/var1/name"] = "x"
    one, two, three, four, five = runtime.read_targets(str(path), "1.1", 5)
    assert one.tolist() == [0, 1, 2]
    assert two == (1.5, "text")
    assert [part.tolist() for part in three] == [[1, 2], [3]]
    assert (four.toarray() == matrix.toarray()).all()
    assert five == {0.5: 7, "name": "x"}
    assert runtime.cmp_tuple_or_list((one, {"a": 1.0}, True), (one + 1e-9, {"a": 1.0}, True))
    assert not runtime.cmp_tuple_or_list((one, True), (one, False))
    assert not runtime.cmp_tuple_or_list((one,), (one, one))
    assert not runtime.are_dicts_close({"a": 1.0}, {"b": 1.0})
    assert runtime.are_csc_matrix_close(four, matrix)


def test_dictionaries_are_close_by_their_keys_and_values() -> None:
    np = pytest.importorskip("numpy")
    sparse = pytest.importorskip("scipy.sparse")
    sympy = pytest.importorskip("sympy")
    pytest.importorskip("h5py")
    from halfbyte.evals.grading.scicode_runtime import are_dicts_close

    x = sympy.Symbol("x")
    full = {"a": 1.0, "b": np.arange(3.0), "c": "text", "m": sparse.eye(2, format="csr"), x: 2.0}
    assert are_dicts_close(full, dict(full))
    assert are_dicts_close(full, {**full, "a": 1.0 + 1e-9})
    assert are_dicts_close({x: 2.0}, {"x": 2.0})
    others = {"a": 1.1, "b": np.arange(3.0) + 1, "c": "other", "m": 2 * full["m"], x: 3.0}
    for key, other in others.items():
        assert not are_dicts_close(full, {**full, key: other}), key
        assert not are_dicts_close({**full, key: other}, full), key
    assert not are_dicts_close({"a": 1.0}, {"a": 1.0, "b": 1.0})
    assert not are_dicts_close({"a": 1.0, "b": 1.0}, {"a": 1.0})
