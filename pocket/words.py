"""Lexicon and sentence maker: plain prose for documents and instructions; made-up names."""

from random import Random

ADJECTIVES = (
    "old", "small", "quiet", "bright", "heavy", "clever", "gentle", "brave", "tired", "cold",
    "warm", "green", "narrow", "wooden", "broken", "hungry", "polite", "early", "simple", "strange",
)  # fmt: skip
BEINGS = (
    "baker", "sailor", "farmer", "doctor", "painter", "teacher", "driver", "singer", "gardener",
    "dog", "cat", "horse", "bird", "fox", "child", "king", "guest", "writer", "nurse", "soldier",
)  # fmt: skip
THINGS = (
    "lamp", "boat", "letter", "basket", "bottle", "ladder", "mirror", "clock", "stone", "apple",
    "ring", "coat", "map", "box", "key", "chair", "drum", "bell", "book", "cup", "kite", "rope",
)  # fmt: skip
VERBS = (
    "found", "carried", "painted", "lost", "cleaned", "opened", "moved", "sold", "watched", "kept",
    "bought", "dropped", "hid", "washed", "mended", "wanted", "took", "left", "broke", "saw",
)  # fmt: skip
PLACES = (
    "near the river", "in the market", "behind the house", "on the hill", "under the bridge",
    "at the station", "by the sea", "in the garden", "beside the road", "in the forest",
    "before winter", "after lunch", "last night", "every morning", "on Monday", "in the rain",
)  # fmt: skip
COLOURS = (
    "red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "grey", "pink",
)  # fmt: skip
TOPICS = ("the sea", "the market", "a journey", "the winter", "a garden", "the night", "a town")

_HEADS = (
    "B",
    "D",
    "F",
    "G",
    "H",
    "K",
    "L",
    "M",
    "N",
    "P",
    "R",
    "S",
    "T",
    "V",
    "W",
    "Z",
    "Br",
    "Tr",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_MIDDLES = ("l", "m", "n", "r", "s", "t", "v", "nd", "rt", "lm", "st", "rk", "ll", "d", "b")
_ENDS = ("a", "en", "or", "is", "an", "eth", "o", "in", "us", "el", "ar", "im")


def made_up_name(rng: Random) -> str:
    """A name of two or three syllables that means nothing."""
    pick = rng.choice
    name = pick(_HEADS) + pick(_VOWELS) + pick(_MIDDLES)
    if rng.random() < 0.3:
        name += pick(_VOWELS) + pick(_MIDDLES)
    return name + pick(_ENDS)


def names(rng: Random, count: int) -> list[str]:
    """So many different made-up names."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[made_up_name(rng)] = None
    return list(found)


def phrase(
    rng: Random, nouns: tuple[str, ...], num_adjectives: int, article: str = ""
) -> list[str]:
    """Article, adjectives, noun."""
    adjectives = rng.sample(ADJECTIVES, num_adjectives)
    noun = rng.choice(nouns)
    words = [*adjectives, noun]
    if not article:
        article = rng.choice(("the", "the", "a"))
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return [article, *words]


def sentence_words(rng: Random, num_words: int | None = None, article: str = "") -> list[str]:
    """Lower-case words of one sentence without its full stop; of exactly `num_words` (3 to 16).

    The shapes: who did (3), who did what (5 and more), where or when.
    """
    if num_words is None:
        who = phrase(rng, BEINGS, rng.random() < 0.4, article)
        what = phrase(rng, THINGS, rng.random() < 0.4, article)
        where = rng.choice(PLACES).split() if rng.random() < 0.6 else []
        return [*who, rng.choice(VERBS), *what, *where]
    if num_words < 5:
        who = phrase(rng, BEINGS, num_words - 3, article)
        return [*who, rng.choice(("slept", "waited", "sang", "laughed", "ran"))]
    where = []
    if num_words >= 8 and (num_words > 11 or rng.random() < 0.7):
        where = rng.choice(PLACES).split()
        if num_words - len(where) < 5:
            where = []
    extra = num_words - 5 - len(where)
    first = min(rng.randint(0, extra), 3)
    second = min(extra - first, 5)
    first = extra - second
    who = phrase(rng, BEINGS, first, article)
    return [*who, rng.choice(VERBS), *phrase(rng, THINGS, second, article), *where]


def sentence(rng: Random) -> str:
    """One sentence of free length."""
    words = sentence_words(rng)
    return words[0].capitalize() + " " + " ".join(words[1:]) + "."
