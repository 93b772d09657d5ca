"""Generated items: the same for a seed, disjoint splits, and answers that their graders accept."""

import json
from random import Random

import pytest
from pocket.encode import ANSWER, Encoder, patches_of
from pocket.evaluate import answer_of, messages_of, prompt_of
from pocket.export import rgb_of
from pocket.grade import Answer, is_right
from pocket.instructions import failures
from pocket.integers import thought_of
from pocket.items import Item, Split, split_of
from pocket.mixture import AT_LENGTH, GRADED, SHARES, item
from pocket.vocabulary import Vocabulary
from pocket.world import RELATIONS, world

from halfbyte.chat.mistral_format import load_mistral_format
from pocket import mixture

KINDS = tuple(SHARES)


def shown(found: Item) -> str:
    """Everything of an item but its pixels."""
    return repr(
        (
            found.kind,
            found.effort,
            found.system,
            found.tools,
            found.schema,
            found.gold,
            [(t.role, t.content, t.thought, t.calls) for t in found.turns],
        )
    )


def right_answer(found: Item) -> Answer:
    last = found.turns[-1]
    calls = tuple((call.name, json.dumps(dict(call.arguments))) for call in last.calls)
    return Answer(last.content, last.thought or "", calls)


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_follows_from_its_seed(kind: str) -> None:
    assert shown(item(kind, 5, "train")) == shown(item(kind, 5, "train"))
    assert len({shown(item(kind, number, "train")) for number in range(12)}) > 3
    assert all(found.turns[-1].role == "assistant" for found in [item(kind, 3, "test")])


@pytest.mark.parametrize("kind", [k for k in (*GRADED, *AT_LENGTH) if k != "programs"])
def test_graders_accept_the_right_answer_and_refuse_an_empty_one(kind: str) -> None:
    for number in range(20 if kind not in AT_LENGTH else 1):
        found = item(kind, number, "test")
        assert is_right(found, right_answer(found)), shown(found)
        assert not is_right(found, Answer("")), shown(found)


def test_programs_are_judged_by_running_them() -> None:
    found = item("programs", 1, "test")
    assert is_right(found, right_answer(found))
    gold = found.gold
    other = f"```python\ndef {gold['name']}({gold['argument']}):\n    return 'nothing'\n```"
    assert not is_right(found, Answer(other))


def test_splits_share_no_parameters() -> None:
    """Chains of hops, which can be told from the prompt, never stand in both splits."""

    def questions(split: str) -> set[str]:
        found = (item("hard", n, "train" if split == "train" else "test") for n in range(400))
        return {f.turns[0].content.split("\n\n")[1] for f in found}

    assert not questions("train") & questions("test")


def test_the_split_is_one_in_sixteen_and_needs_no_state() -> None:
    held_out = sum(split_of(("key", n)) == "test" for n in range(16_000))
    assert 800 < held_out < 1200
    assert split_of(("key", 1)) == split_of(("key", 1))


def test_every_fact_of_the_world_has_a_value_of_its_kind() -> None:
    for name, facts in world().facts.items():
        assert set(facts) == set(RELATIONS[world().kind_of(name)])
        for relation, value in facts.items():
            assert value in world().values[relation] and value != name


def test_the_working_of_sums_ends_in_the_result() -> None:
    rng = Random(0)
    for _ in range(300):
        number = rng.randint(2, 999)
        steps = (("+", rng.randint(1, 999)), ("*", rng.randint(2, 5)), ("-", 1), ("%", 1000))
        thought, value = thought_of(number, steps)
        assert value == ((number + steps[0][1]) * steps[1][1] - 1) % 1000
        assert thought.endswith(f" {value}.")


@pytest.mark.parametrize(
    ("text", "constraints", "failing"),
    [
        ("One two three.", [("words", 3)], []),
        ("One two.", [("words", 3)], ["words"]),
        ("A dog ran. It sat!", [("sentences", 2)], []),
        ("A dog ran", [("sentences", 1)], ["sentences"]),
        ("- a\n- b", [("bullets", 2), ("lower", None)], []),
        ("- a\nb", [("bullets", 2)], ["bullets"]),
        ("1. a\n3. b", [("numbered", 2)], ["numbered"]),
        ("THE END", [("upper", None), ("without", "the")], ["without"]),
        ('"a lamp"', [("quotes", None), ("keyword", "lamp")], []),
        ('"a lamps', [("quotes", None), ("keyword", "lamp")], ["quotes", "keyword"]),
        ("<<sea>>\nIt is.", [("title", None), ("sentences", 1)], []),
        ("A. | B.", [("sentences", 2), ("separator", "|")], []),
        ("It ran. The end.", [("sentences", 2), ("ending", "The end.")], []),
        ("", [("lower", None)], ["lower"]),
    ],
)  # fmt: skip
def test_constraints(text: str, constraints: list[tuple[str, object]], failing: list[str]) -> None:
    assert failures(text, constraints) == failing


@pytest.mark.parametrize("kind", KINDS)
def test_training_sees_the_ids_that_the_server_sends(kind: str, vocabulary: Vocabulary) -> None:
    """Against mistral-common through the server's encoder, images included; and back again."""
    chat = load_mistral_format(vocabulary.path)
    encoder = Encoder(vocabulary)
    for number in range(6 if kind != "long_recall" else 1):
        found = item(kind, number, "train")
        encoded = encoder.encode(found)
        prompt, images = prompt_of(found, chat)
        assert list(prompt) == encoded.ids[: encoded.last_answer]
        assert len(images) == len(encoded.images)
        assert all(
            image.pixels.size == pixels.patches_PC.size
            for image, pixels in zip(images, encoded.images, strict=True)
        )
        assert encoded.weights[encoded.last_answer :] == [ANSWER] * (
            len(encoded.ids) - encoded.last_answer
        )
        # The end is no part of what the engine reports.
        answer = answer_of(encoded.ids[encoded.last_answer : -1], found, chat)
        assert answer == right_answer(found)


def test_patches_are_the_servers_pixels_in_squares(vocabulary: Vocabulary) -> None:
    chat = load_mistral_format(vocabulary.path)
    found = item("images", 2, "train")
    _, images = prompt_of(found, chat)
    for image, picture in zip(images, found.turns[0].images, strict=True):
        pixels, columns, rows = patches_of(picture)
        assert image.pixels.shape == (3, rows * 28, columns * 28)
        assert (rgb_of(pixels).numpy() == image.pixels).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_question_in_the_picture_is_thought_of_as_a_prompt_of_text_lists_it(split: Split) -> None:
    """The sum, the options a line each, and the value just before its letter."""
    thoughts = [
        (thought, found.gold["letter"])
        for found in (item("inside", number, split) for number in range(40))
        if (thought := found.turns[-1].thought) is not None
    ]
    assert len(thoughts) > 10
    for thought, letter in thoughts:
        first, *lines, _, last = thought.splitlines()
        question, summed = first.split("? ")
        left, sign, right = question.removeprefix("What is ").split()
        value = int(left) + int(right) * (1 if sign == "+" else -1)
        assert summed == f"{left} {sign} {right} = {value}."
        options = dict(line.split(". ") for line in lines)
        assert list(options) == ["A", "B", "C", "D"] and options[letter] == str(value)
        assert last == f"I see {value}. That is {letter}."


def test_shares_name_every_graded_kind() -> None:
    assert set(mixture.GRADED) <= set(SHARES)
    assert messages_of(item("system", 0, "test"))[0]["role"] == "system"
