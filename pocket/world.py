"""The made-up world whose facts the model learns: people and towns, the same for every seed."""

from dataclasses import dataclass
from functools import cache
from random import Random

from pocket.words import COLOURS, made_up_name

NUM_PEOPLE, NUM_TOWNS = 192, 48
_CRAFTS = (
    "baker", "weaver", "potter", "smith", "miller", "tailor", "carpenter", "painter", "fisher",
    "printer", "mason", "cook", "gardener", "cobbler", "jeweller", "brewer",
)  # fmt: skip
_PETS = (
    "dog", "cat", "horse", "parrot", "turtle", "rabbit", "goat", "owl", "fox", "snake", "duck",
    "mouse",
)  # fmt: skip
_INSTRUMENTS = (
    "flute", "drum", "violin", "harp", "piano", "guitar", "trumpet", "organ", "bell", "horn",
)  # fmt: skip
_EXPORTS = (
    "wool", "salt", "honey", "glass", "paper", "copper", "wine", "silk", "timber", "rope", "cheese",
    "coal", "soap", "tea", "leather", "fish",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Relation:
    """One thing that is known of every person or every town.

    noun      stands in `the {noun} of X`
    question  with {x}
    statement with {x} and {v}
    target    what the value is, if it has relations of its own
    """

    noun: str
    question: str
    statement: str
    target: str = ""


PERSON = {
    "town": Relation("home town", "In which town does {x} live?", "{x} lives in {v}.", "town"),
    "craft": Relation("craft", "What does {x} do for a living?", "{x} is a {v}."),
    "pet": Relation("pet", "Which animal does {x} keep?", "{x} keeps a {v}."),
    "colour": Relation(
        "favourite colour", "Which colour does {x} like best?", "{x} likes {v} best."
    ),
    "instrument": Relation("instrument", "What does {x} play?", "{x} plays the {v}."),
    "teacher": Relation("teacher", "Who taught {x}?", "{v} taught {x}.", "person"),
    "friend": Relation("best friend", "Who is close to {x}?", "{v} is close to {x}.", "person"),
}
TOWN = {
    "region": Relation("region", "In which region is {x}?", "{x} is in {v}."),
    "river": Relation("river", "Which river flows through {x}?", "The {v} flows through {x}."),
    "export": Relation("main export", "What does {x} sell?", "{x} sells {v}."),
    "mayor": Relation("mayor", "Who rules {x}?", "{v} rules {x}.", "person"),
    "founded": Relation("founding year", "When was {x} founded?", "{x} was founded in {v}."),
}
RELATIONS = {"person": PERSON, "town": TOWN}


@dataclass(frozen=True, slots=True)
class World:
    """facts[name][relation] is the value; values[relation] is every value it can have."""

    people: tuple[str, ...]
    towns: tuple[str, ...]
    facts: dict[str, dict[str, str]]
    values: dict[str, tuple[str, ...]]

    def kind_of(self, name: str) -> str:
        """`person` or `town`."""
        return "town" if "region" in self.facts[name] else "person"


@cache
def world() -> World:
    """The world."""
    rng = Random(20261130)
    found: dict[str, None] = {}
    while len(found) < NUM_PEOPLE + NUM_TOWNS + 24:
        found[made_up_name(rng)] = None
    everyone = tuple(found)
    people = everyone[:NUM_PEOPLE]
    towns = everyone[NUM_PEOPLE : NUM_PEOPLE + NUM_TOWNS]
    regions, rivers = everyone[-24:-16], everyone[-16:]
    years = tuple(str(year) for year in rng.sample(range(200, 1000), NUM_TOWNS))
    values = {
        "town": towns,
        "craft": _CRAFTS,
        "pet": _PETS,
        "colour": COLOURS,
        "instrument": _INSTRUMENTS,
        "teacher": people,
        "friend": people,
        "region": regions,
        "river": rivers,
        "export": _EXPORTS,
        "mayor": people,
        "founded": years,
    }
    facts: dict[str, dict[str, str]] = {}
    for names, relations in ((people, PERSON), (towns, TOWN)):
        for name in names:
            facts[name] = {}
            for relation in relations:
                value = rng.choice(values[relation])
                while value == name:
                    value = rng.choice(values[relation])
                facts[name][relation] = value
    return World(people, towns, facts, values)
