"""Evaluation items must not enter the calibration text."""

from hypothesis import given
from hypothesis import strategies as st

from halfbyte.calibrate.overlap import NUM_WORDS, OverlapIndex

PROMPT = "Count the grid points (p,q), where both p and q are even numbers between -60 and 80."


def test_an_item_is_found_whatever_its_case_and_punctuation() -> None:
    index = OverlapIndex([PROMPT])
    disguised = PROMPT.upper().replace(",", " ,\n").replace("(", "$(")
    assert index.hits([f"A contest. {disguised} Answer: 42."])
    assert not index.hits(["Count the grid points of the plane."])


def test_twelve_words_are_not_enough() -> None:
    words = PROMPT.split()
    index = OverlapIndex([PROMPT])
    # "(x,y)," is two words.
    assert not index.hits([" ".join(words[:11])])
    assert index.hits([" ".join(words[:12])])


def test_scripts_without_spaces_are_compared_by_character() -> None:
    index = OverlapIndex(["为什么夏天自行车胎不宜打得太足？请说明理由。"])
    assert index.hits(["问题：为什么夏天自行车胎不宜打得太足？请说明理由"])
    assert not index.hits(["为什么夏天自行车"])


def test_no_prompts_find_nothing() -> None:
    assert not OverlapIndex().hits([PROMPT])
    assert OverlapIndex().sha256 is None


@given(st.lists(st.sampled_from(["a", "b", "c", "dd"]), min_size=NUM_WORDS, max_size=60), st.data())
def test_every_run_of_a_prompt_is_found(words: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(words) - NUM_WORDS))
    run = words[start : start + NUM_WORDS]
    assert OverlapIndex([" ".join(words)]).hits(["zz " + ", ".join(run) + " zz"])
