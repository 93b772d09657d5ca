"""Code in answers, verdicts of judges, golds and data files: the forms in which they come."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.evals.grading.judge import read_verdict
from halfbyte.evals.grading.scripts import drop_imports, extract_code, grade_step
from halfbyte.evals.reasoning import split_reasoning
from halfbyte.evals.sandbox import Outcome
from halfbyte.evals.tasks import aime
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.tasks.data import load_rows

CODE = "x = 1"


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\nx = 1\n```", CODE),
        ("```python\nx = 1```", CODE),
        ("```python\nx = 1``` and that is all.", CODE),
        ("```python\nx = 1", CODE),
        ("```Python\nx = 1\n```", CODE),
        ("```python3\nx = 1\n```", CODE),
        ("```python3.11\nx = 1\n```", CODE),
        ("```py\nx = 1\n```", CODE),
        ("```{python}\nx = 1\n```", CODE),
        ("``` python\nx = 1\n```", CODE),
        ('```python title="a.py"\nx = 1\n```', CODE),
        ("````python\nx = 1\n````", CODE),
        ("~~~python\nx = 1\n~~~", CODE),
        ("```python x = 1```", CODE),
        ("Here: ```python\nx = 1\n```", CODE),
        ("```\nx = 1\n```", CODE),
        ("```\r\nx = 1\r\n```", "x = 1\r"),
        ("x = 1", CODE),
        ("```bash\nls\n```\n```python\nx = 1\n```", CODE),
        ("```bash\nls\n```\n```python3\nx = 1\n```", CODE),
        ("```bash\nls\n```\n```\nx = 1\n```", CODE),
        ("```text\nplan\n```\n```py\nx = 1\n```", CODE),
        ("```python\n```\n```python\nx = 1\n```", CODE),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", CODE),
        ("```\nnot this\n```\n```python\nx = 1\n```", CODE),
        ("1. First:\n   ```python\n   x = 1\n   ```", "   x = 1\n   "),
        ("```python\n```", ""),
        ("```\n```", ""),
        ("```python\nimport numpy as np\n```", ""),
        ("", ""),
    ],
)
def test_code_is_what_stands_between_the_fences(text: str, code: str) -> None:
    assert extract_code(text) == code


NOT_IMPORTS = [
    '"""Doc.\n\nimport of energy (in units\nof kT)\n"""',
    "'''\nfrom here import nothing\n'''",
    "# import os (",
    "important = (1,\n    2)",
    "s = 'import x'",
    "s = f'from {1} import'",
    "def f():\n    '''import a\n    from b import (c\n    '''\n    return 1",
    "def g():\n    yield from ()",
    "y = [\n    1,\n    2,\n]",
    "z = 1 \\\n    + 2",
    "try:\n    raise ValueError from None\nexcept ValueError:\n    pass",
    "x_import = importlib = 3",
]
IMPORTS = [
    "import os", "import os, sys", "import a.b as c", "from a import b", "from . import x",
    "from ..a.b import c as d", "from a import (\n    b,\n    c,\n)", "from a import b, \\\n    c",
    "from a import b  # (see", "import os  # [", "from a import *", "from a import (b,  # x)\n  c)",
]  # fmt: skip


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 11)).map(
            lambda pair: (pair[0], (IMPORTS if pair[0] else NOT_IMPORTS)[pair[1]])
        ),
        max_size=6,
    )
)
@settings(max_examples=200, deadline=None)
def test_imports_go_and_every_other_line_stays(parts: list[tuple[bool, str]]) -> None:
    code = "\n".join(text for _, text in parts)
    assert drop_imports(code) == "\n".join(text for is_import, text in parts if not is_import)


def test_nested_imports_leave_a_valid_block() -> None:
    code = (
        "def f():\n    import a\ndef g():\n    from b import (\n        c)\n    return 1\n"
        "try: import d\nexcept ImportError: pass\nimport e; x = 1\ny = 2; import h\n"
    )
    kept = drop_imports(code)
    compile(kept, "x", "exec")
    assert "import" not in kept.replace("ImportError", "")
    assert "x = 1" in kept and "y = 2" in kept and "return 1" in kept
    assert drop_imports("import a\nx = (1") == "x = (1"  # what does not parse stays what it is
    assert drop_imports("import a\n  x\n y") == "  x\n y"


@given(st.text(alphabet="ab`~ \n(\"'#\\:;import", max_size=80))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_extraction(text: str) -> None:
    extract_code(text)


WORDS = ["CORRECT", "INCORRECT", "Correct", "incorrect"]
MARKS = [
    "{}", "**{}**", "[{}]", '"{}"', "“{}”", "'{}'", "`{}`", "({})", "_{}_", "\ufeff{}", "{}.",
    "{}!", "\n\n{}\n", "- {}", "> {}", "# {}", "<answer>{}</answer>", "$\\text{{{}}}$",
    "{}: the numbers agree", "{}, as both say 5", "{} - they differ", "「{}」", "{{{}}}",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("word", WORDS)
def test_marks_around_one_word_do_not_matter(mark: str, word: str) -> None:
    assert read_verdict(mark.format(word)) is (word.upper() == "CORRECT")


@pytest.mark.parametrize(
    "reply",
    [
        "CORRECT/INCORRECT", "CORRECT or INCORRECT", "INCORRECT/CORRECT", "Correct? INCORRECT",
        "CORRECT. INCORRECT.", "[CORRECT] or [INCORRECT]", "CORRECT, no, INCORRECT", "CORRECT?",
        "INCORRECT - no, CORRECT", "NOT CORRECT", "It is CORRECT", "CORRECTNESS: 5", "UNCORRECT",
        "CORRECT1", "partially correct", "Partially CORRECT", "maybe", "YES", "TRUE", "", " ", "**",
        "The CANDIDATE is CORRECT or INCORRECT", "CORRECT: it is not, in fact",
        "(judge failed: timeout)",
    ],
)  # fmt: skip
def test_two_words_or_none_are_no_verdict(reply: str) -> None:
    assert read_verdict(reply) is None


GOLDS = [
    (70, 70), ("70", 70), ("070", 70), ("70.0", 70), (70.0, 70), ("$70$", 70), (r"70^\circ", 70),
    ("70°", 70), (r"\textbf{(070)}", 70), (r"\boxed{70}", None), ("1{,}024", 1024), (" 70 ", 70),
    ("٧٠", 70), (r"\frac{1}{2}", None), ("70 or 80", None), ("", None), (None, None), (True, None),
    ("seventy", None), ("70%", None), (7.5, None), (["70"], None),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold", GOLDS)
def test_a_gold_is_an_integer_or_said_by_its_item(
    tmp_path: Path, answer: object, gold: int | None
) -> None:
    (tmp_path / "aime2025").mkdir()
    row = json.dumps({"problem": "x", "answer": answer, "id": "item-9"})
    (tmp_path / "aime2025" / "problems.jsonl").write_text(row)
    if gold is None:
        with pytest.raises(UsageError, match="item-9"):
            aime.load(Options(data=tmp_path))
    else:
        assert aime.load(Options(data=tmp_path)).samples[0].gold == str(gold)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "encoding, message",
    [
        ("utf-8", None), ("utf-8-sig", None), ("latin-1", "line 3, byte"), ("cp1252", "line 3"),
        ("utf-16", "UTF-16"),
    ],
)  # fmt: skip
def test_encodings_of_data_files(
    tmp_path: Path, suffix: str, encoding: str, message: str | None
) -> None:
    rows = [{"question": "one", "answer": "a"}, {"question": "zwölf", "answer": "é"}]
    if suffix == "csv":
        text = "question,answer\r\none,a\r\nzwölf,é\r\n"
        line = "line 3"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        line = "line 2"
    (tmp_path / f"x.{suffix}").write_bytes(text.encode(encoding))
    wanted = {"patterns": (f"*.{suffix}",), "columns": ("question", "answer")}
    if message is None:
        assert [dict(row) for row in load_rows("X", tmp_path, **wanted).rows] == rows  # type: ignore[arg-type]
    else:
        with pytest.raises(UsageError, match=message.replace("line 3", line)):
            load_rows("X", tmp_path, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, content",
    [("a.csv", b'x\n"' + b"y" * 30), ("a.jsonl", b"[" * 100_000), ("a.jsonl", b"{\n"),
     ("a.parquet", b"PAR1"), ("a.jsonl", b"1"), ("a.csv", b"a\rb\rc\x00"), ("a.jsonl", b"")],
)  # fmt: skip
def test_broken_data_files_end_in_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"a\."):
        load_rows("X", tmp_path, patterns=(f"*{Path(name).suffix}",), columns=("q",))


@given(answer=st.text(max_size=80), thought=st.text(min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_with_thoughts_sent_apart_the_content_is_the_answer(answer: str, thought: str) -> None:
    whole = f"{answer} <think> [/THINK] </think>"
    if thought.strip():
        assert split_reasoning(whole, thought).text == whole.strip()


@given(
    answer=st.text(alphabet="abc \nC", min_size=1, max_size=40),
    thought=st.text(alphabet="abc \n", max_size=30),
    tag=st.sampled_from([("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("", "</think>")]),
)
@settings(max_examples=200, deadline=None)
def test_a_block_at_the_start_is_thought_and_the_rest_answer(
    answer: str, thought: str, tag: tuple[str, str]
) -> None:
    split = split_reasoning(f"{tag[0]}{thought}{tag[1]}{answer}")
    assert split == (answer.strip(), thought.strip())


@pytest.mark.parametrize(
    ("code", "ending", "exit_code", "stdout", "value", "cause"),
    [
        ("x = 1", "exited", 0, "held", 1.0, "ok"),
        ("x = 1", "exited", 0, "held back and forth", 1.0, "ok"),
        ("x = 1", "exited", 0, "", 0.0, "wrong"),
        ("x = 1", "exited", 1, "held", 0.0, "wrong"),
        ("x = 1", "wall", 0, "held", 0.0, "wrong"),
        # Nothing was extracted: neither passed nor wrong code, whatever ran.
        ("", "exited", 0, "held", 0.0, "unparsed"),
        (" \n", "exited", 0, "held", 0.0, "unparsed"),
        ("x = 1", None, 0, "", 0.0, "unparsed"),
        ("", None, 0, "", 0.0, "unparsed"),
    ],
)
def test_a_step_passes_only_if_its_code_ran_to_the_end(
    code: str, ending: Any, exit_code: int, stdout: str, value: float, cause: str
) -> None:
    outcome = ending and Outcome(ending, exit_code, 0, stdout, "", 0.1, ("mount",))
    score = grade_step(code, outcome, "held")
    assert (score.value, score.cause) == (value, cause)
