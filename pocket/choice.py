"""Knowledge choice (ten options) and hard choice (two and three hops, four options, a thought)."""

from random import Random

from halfbyte.evals.tasks.choices import LETTERS, choice_prompt
from pocket.items import Item, Split, ask, draw, effort_of, say
from pocket.world import RELATIONS, world

Fact = tuple[str, str]


def options_with(rng: Random, value: str, values: tuple[str, ...], count: int) -> tuple[str, ...]:
    """`value` among `count` different options, in random order."""
    others = rng.sample(values, min(count + 1, len(values)))
    chosen = [other for other in others if other != value][: count - 1]
    chosen.append(value)
    rng.shuffle(chosen)
    return tuple(chosen)


def _fact(rng: Random) -> Fact:
    everyone = world()
    name = rng.choice(everyone.people if rng.random() < 0.75 else everyone.towns)
    return name, rng.choice(tuple(RELATIONS[everyone.kind_of(name)]))


def _question(rng: Random, name: str, relation: str) -> str:
    found = RELATIONS[world().kind_of(name)][relation]
    if rng.random() < 0.5:
        return found.question.format(x=name)
    return f"What is the {found.noun} of {name}?"


def _knowledge(rng: Random) -> tuple[str, str, tuple[str, ...]]:
    name, relation = _fact(rng)
    value = world().facts[name][relation]
    return name, relation, options_with(rng, value, world().values[relation], 10)


def knowledge(rng: Random, split: Split) -> Item:
    """A fact of the world among up to ten options."""
    name, relation, options = draw(rng, split, _knowledge)
    value = world().facts[name][relation]
    letter = LETTERS[options.index(value)]
    noun = RELATIONS[world().kind_of(name)][relation].noun
    effort = effort_of(rng, 0.6)
    thought = f"The {noun} of {name} is {value}. {value} is {letter}." if effort == "high" else None
    prompt = choice_prompt(_question(rng, name, relation), options, "aa")
    gold = {"letter": letter, "options": len(options)}
    return Item("knowledge", (ask(prompt), say(f"Answer: {letter}", thought)), effort, gold=gold)


def fact(rng: Random, split: Split) -> Item:
    """A fact asked for openly, in one turn or several; every fact is taught."""
    turns = []
    for _ in range(rng.randint(1, 5)):
        name, relation = _fact(rng)
        found = RELATIONS[world().kind_of(name)][relation]
        value = world().facts[name][relation]
        turns += [ask(_question(rng, name, relation)), say(found.statement.format(x=name, v=value))]
    return Item("fact", tuple(turns), gold={"text": turns[-1].content})


def almanac(rng: Random, split: Split) -> Item:
    """Everything about one name."""
    name = rng.choice(tuple(world().facts))
    relations = RELATIONS[world().kind_of(name)]
    text = " ".join(
        found.statement.format(x=name, v=world().facts[name][relation])
        for relation, found in relations.items()
    )
    return Item("almanac", (ask(f"Tell me about {name}."), say(text)), gold={"text": text})


def _chain(rng: Random) -> tuple[str, tuple[str, ...]]:
    """A name and two or three relations, each from what the one before leads to."""
    everyone = world()
    kind = rng.choice(("person", "person", "town"))
    start = rng.choice(everyone.people if kind == "person" else everyone.towns)
    steps: list[str] = []
    hops = rng.choice((2, 2, 3))
    while len(steps) < hops:
        last = len(steps) == hops - 1
        fitting = [n for n, r in RELATIONS[kind].items() if last or r.target]
        steps.append(rng.choice(fitting))
        kind = RELATIONS[kind][steps[-1]].target
    return start, tuple(steps)


def hard(rng: Random, split: Split) -> Item:
    """Two or three hops over the world's facts; the chains of the test were never asked before."""
    start, steps = draw(rng, split, _chain)
    name, thoughts, spoken = start, [], start
    for step in steps:
        noun = RELATIONS[world().kind_of(name)][step].noun
        value = world().facts[name][step]
        thoughts.append(f"The {noun} of {name} is {value}.")
        spoken = f"the {noun} of {spoken}"
        name = value
    options = options_with(rng, name, world().values[steps[-1]], 4)
    letter = LETTERS[options.index(name)]
    effort = effort_of(rng, 0.8)
    thought = " ".join([*thoughts, f"{name} is {letter}."]) if effort == "high" else None
    prompt = choice_prompt(f"What is {spoken}?", options, "aa")
    gold = {"letter": letter, "options": 4}
    return Item("hard", (ask(prompt), say(f"Answer: {letter}", thought)), effort, gold=gold)
