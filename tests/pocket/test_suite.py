"""The suite's items, prompts and grades: the generator's own answers are right, others are not."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pocket.items import Item
from pocket.mixture import item

from halfbyte.errors import UnsupportedError
from halfbyte.evals.config import RunConfig, RunSampling, sampling_of
from halfbyte.evals.tasks.benchmark import Options
from halfbyte.evals.tasks.suite import BENCHMARKS, SUITES, find_benchmarks
from halfbyte.evals.types import Image, Sample, Text
from pocket import suite

ROOT = Path(__file__).resolve().parents[2]


def right_answer(sample: Sample) -> str:
    found: Item = sample.fields["item"]
    return found.turns[-1].content


@pytest.mark.parametrize("kind", suite.KINDS)
def test_the_generators_own_answers_are_right_and_those_of_other_items_are_not(kind: str) -> None:
    samples = suite.samples(kind, 8 if kind == "programs" else 30, 3)
    assert len({sample.item_id for sample in samples}) == len(samples)
    for sample in samples:
        score = suite.grade(sample, right_answer(sample))
        assert (score.value, score.cause) == (1.0, "ok"), (sample.item_id, score)
    pairs = list(pairwise(samples))
    swapped = [suite.grade(sample, right_answer(other)) for sample, other in pairs]
    assert sum(score.cause != "ok" for score in swapped) >= len(swapped) * 0.6
    for sample in samples[:4]:
        assert suite.grade(sample, "I babble about the sea.").value == 0.0


@pytest.mark.parametrize("kind", [k for k in suite.KINDS if k not in ("images", "recall")])
def test_a_seed_gives_the_same_items_and_a_larger_number_begins_with_them(kind: str) -> None:
    few, many, others = (suite.samples(kind, n, seed) for n, seed in ((5, 0), (8, 0), (5, 1)))
    assert [s.item_id for s in few] == [s.item_id for s in many][:5]
    assert [suite.prompt(s) for s in few] == [suite.prompt(s) for s in many][:5]
    assert [suite.prompt(s) for s in few] != [suite.prompt(s) for s in others]
    assert {s.item_id for s in few}.isdisjoint(s.item_id for s in others)


def test_pictures_stand_before_the_question_and_are_the_same_for_a_seed() -> None:
    samples, again = suite.samples("images", 12, 5), suite.samples("images", 12, 5)
    for sample, same in zip(samples, again, strict=True):
        *pictures, text = suite.prompt(sample)
        assert isinstance(text, Text) and pictures
        assert all(isinstance(picture, Image) for picture in pictures)
        assert suite.prompt(sample) == suite.prompt(same)


def test_recall_asks_over_documents_of_every_length() -> None:
    samples = suite.samples("recall", 20, 0)
    lengths = {s.stratum: len(s.fields["asked"]["text"]) for s in samples}
    assert set(lengths) == {"", "recall_4k", "recall_8k"}
    assert lengths["recall_8k"] > 1.5 * lengths["recall_4k"] > 0


def test_items_are_never_those_of_training() -> None:
    for kind in ("integers", "hard", "instructions"):
        asked = {s.fields["asked"]["text"] for s in suite.samples(kind, 50, 0)}
        trained = {item(kind, n, "train").turns[0].content for n in range(300)}
        assert asked.isdisjoint(trained)


def test_the_runner_loads_as_many_items_as_are_asked_for_and_says_how_they_were_made() -> None:
    (known,) = find_benchmarks(["pocket_integers"], items=6)
    loaded = known.load(Options(items=6, item_seed=9, limit=3))
    assert known.full_items == 6 and len(loaded.samples) == 3
    assert loaded.provenance.revision == "generated, seed 9"
    other = known.load(Options(items=6, item_seed=8, limit=3))
    assert loaded.provenance.sha256 != other.provenance.sha256
    assert len(BENCHMARKS["pocket_integers"].load(Options()).samples) == 200


def test_pocket_is_asked_greedily_and_a_mixture_as_published() -> None:
    pocket = find_benchmarks(["pocket"])
    assert [b.name for b in pocket] == list(SUITES["pocket"])
    sampling = sampling_of(pocket)
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 512)
    assert sampling_of(find_benchmarks(["pocket", "ifbench"])) == RunSampling()
    assert sampling_of(find_benchmarks(["quick"])) == RunSampling()
    config = RunConfig(Path("out"), "arm", pocket, sampling=sampling)
    efforts = {b.name: config.sampling_for(b).reasoning_effort for b in pocket}
    assert efforts["pocket_programs"] == efforts["pocket_instructions"] == "none"
    assert efforts["pocket_hard"] == efforts["pocket_images"] == "high"
    # A server that knows no efforts is sent none.
    silent = RunConfig(Path("out"), "arm", pocket, sampling=RunSampling(reasoning_effort=None))
    assert {silent.sampling_for(b).reasoning_effort for b in pocket} == {None}


def test_what_is_not_asked_for_does_not_change_the_settings_of_older_runs() -> None:
    plain = RunConfig(Path("out"), "arm", find_benchmarks(["quick"])).settings()
    assert "items" not in plain and "item_seed" not in plain
    options = Options(items=50, item_seed=2)
    named = RunConfig(Path("out"), "arm", find_benchmarks(["pocket"]), options=options).settings()
    assert (named["items"], named["item_seed"]) == (50, 2)


_FIND = "from pathlib import Path; from halfbyte.evals.tasks.pocket import generator; "


def python(code: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Outside the repository, with nothing but the package on the path."""
    return subprocess.run(
        [sys.executable, "-c", _FIND + code],
        cwd=folder, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_a_checkout_finds_its_generator_from_anywhere(tmp_path: Path) -> None:
    found = python("print(generator().__file__)", tmp_path)
    assert found.stdout.strip() == str(ROOT / "pocket" / "suite.py"), found.stderr


def test_without_the_generator_a_message_says_where_it_is(tmp_path: Path) -> None:
    # A package of the same name that is not ours does not help.
    (tmp_path / "pocket").mkdir()
    (tmp_path / "pocket" / "__init__.py").write_text("")
    failed = python(f"generator(Path({str(tmp_path)!r}))", tmp_path)
    said = failed.stderr.strip().splitlines()[-1]
    assert UnsupportedError.__name__ in said and "checkout" in said and "--suite quick" in said
