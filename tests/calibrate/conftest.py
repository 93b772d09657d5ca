"""A folder laid out as on the hub, made of the 26 hand-written rows; the two small chat formats."""

import shutil
from pathlib import Path

import pytest

from halfbyte.calibrate.blend import known_datasets

DATA = Path(__file__).parent.parent / "data"
ROWS = DATA / "calibrate"

# file of tests/data/calibrate -> member, and its split's name in the real data set
_PLACES = {
    "instruction_following_chat__reasoning_off": ("instruction-following-chat-v2", "reasoning_off"),
    "science__MCQ": ("science-v1", "MCQ"),
    "science__RQA": ("science-v1", "RQA"),
    "competitive_programming__cpp": (
        "competitive-programming-v1",
        "competitive_coding_cpp_part00",
    ),
    "competitive_programming__python": (
        "competitive-programming-v1",
        "competitive_coding_python_part00",
    ),
    "agentic__search": ("sft-agentic-v2", "search"),
    "math__high": ("math-v2", "high_part00"),
    "math__medium": ("math-v2", "medium"),
    "math__low": ("math-v2", "low"),
    "swe__agentless": ("sft-swe-v2", "agentless"),
    **{
        f"multilingual__{split}": ("sft-multilingual-v1", split)
        for split in ("code_de", "code_it", "math_fr", "math_ja", "stem_es", "stem_zh")
    },
}


@pytest.fixture
def tekken() -> Path:
    return DATA / "chat" / "tekken"


@pytest.fixture
def chatml() -> Path:
    return DATA / "chat" / "chatml"


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """All seven members with every split the blend opens; splits we have no rows for are empty."""
    root = tmp_path / "hub"
    for dataset in known_datasets().values():
        for split in dataset.splits:
            path = root / dataset.id / "data" / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for stem, (member, split) in _PLACES.items():
        target = root / known_datasets()[member].id / "data" / f"{split}.jsonl"
        shutil.copy(ROWS / f"{stem}.jsonl", target)
    return root
