"""Image choice: numbers, words, shapes, charts, pairs, strips, and questions inside the picture."""

from collections.abc import Callable
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from halfbyte.evals.tasks.choices import LETTERS
from pocket.choice import options_with
from pocket.items import Item, Split, ask, effort_of, say, split_of
from pocket.words import ADJECTIVES, BEINGS, THINGS

SIDE = 28
PALETTE = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 80, 210), "yellow": (245, 205, 40),
    "black": (20, 20, 20), "orange": (240, 135, 30), "purple": (135, 50, 160),
    "grey": (135, 135, 135),
}  # fmt: skip
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
WORDS = (*BEINGS, *THINGS, *ADJECTIVES)
_PAPERS = ((255, 255, 255), (250, 246, 232), (235, 241, 250), (240, 240, 240))
# (question, answer, all possible answers)
Asked = tuple[str, str, tuple[str, ...]]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow lacks FreeType"
    return font


def _paper(rng: Random, width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), rng.choice(_PAPERS))
    return image, ImageDraw.Draw(image)


def _ink(rng: Random) -> tuple[int, int, int]:
    return PALETTE[rng.choice(("black", "black", "blue", "red", "purple", "green"))]


def written(rng: Random, text: str, size: int | None = None) -> Image.Image:
    """A line of text on paper a little larger than it."""
    size = size or rng.randint(18, 34)
    font = _font(size)
    left, top, right, bottom = font.getbbox(text)
    width = int(right - left) + rng.randint(6, 30)
    height = int(bottom - top) + rng.randint(6, 30)
    image, pen = _paper(rng, max(width, SIDE), max(height, SIDE))
    place = (
        rng.randint(2, max(2, width - int(right - left) - 3)) - left,
        rng.randint(2, max(2, height - int(bottom - top) - 3)) - top,
    )
    pen.text(place, text, fill=_ink(rng), font=font)
    return image


def _number(rng: Random) -> str:
    return str(rng.randint(0, 10 ** rng.randint(1, 5) - 1))


def _near(rng: Random, number: str, count: int) -> tuple[str, ...]:
    """Numbers that differ in a digit or two."""
    found = {number}
    while len(found) < count:
        digits = list(number)
        for _ in range(rng.choice((1, 1, 2))):
            digits[rng.randrange(len(digits))] = rng.choice("0123456789")
        if rng.random() < 0.2 or len(number) == 1:
            digits.append(rng.choice("0123456789"))
        found.add(str(int("".join(digits))))
    return tuple(sorted(found))


def number(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """A number to read."""
    value = _number(rng)
    return [written(rng, value)], [("Which number is shown?", value, _near(rng, value, 10))]


def word(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """One to three words to read, on paper or on a strip."""
    text = " ".join(rng.sample(WORDS, rng.choice((1, 1, 2, 3))))
    if rng.random() < 0.2:
        text = text.upper()
    others = {text}
    while len(others) < 8:
        words = [rng.choice(WORDS) for _ in text.split()]
        others.add(" ".join(words).upper() if text.isupper() else " ".join(words))
    question = "Which words are written here?" if " " in text else "Which word is written here?"
    return [written(rng, text, rng.randint(16, 30))], [(question, text, tuple(sorted(others)))]


def _shape(pen: ImageDraw.ImageDraw, shape: str, colour: str, x: int, y: int, r: int) -> None:
    fill = PALETTE[colour]
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape == "cross":
        pen.line((x - r, y - r, x + r, y + r), fill=fill, width=max(3, r // 2))
        pen.line((x - r, y + r, x + r, y - r), fill=fill, width=max(3, r // 2))
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(3, r // 3))
    else:
        points = [(0, -1), (0.25, -0.3), (1, -0.3), (0.4, 0.15), (0.6, 0.95), (0, 0.45)]
        mirrored = points + [(-a, b) for a, b in reversed(points[1:-1])]
        pen.polygon([(x + a * r, y + b * r) for a, b in mirrored], fill=fill)


def _kinds(rng: Random, count: int) -> list[tuple[str, str]]:
    """Different shapes with colours."""
    return [(rng.choice(COLOURS), shape) for shape in rng.sample(SHAPES, count)]


def shapes(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """One to five shapes in a row or a column: colours, kinds, order, number."""
    count = rng.randint(1, 5)
    found = _kinds(rng, count)
    cell = rng.choice((28, 36, 42, 56))
    upright = rng.random() < 0.25
    size = (cell, cell * count) if upright else (cell * count, cell)
    image, pen = _paper(rng, max(size[0], SIDE), max(size[1], SIDE))
    for index, (colour, shape) in enumerate(found):
        radius = rng.randint(cell // 4, cell // 2 - 3)
        x, y = (cell // 2, index * cell + cell // 2)
        if not upright:
            x, y = y, x
        _shape(pen, shape, colour, x, y, radius)
    colour, shape = rng.choice(found)
    listed = ", ".join(f"{c} {s}" for c, s in found)
    asked: list[Asked] = [
        (f"What colour is the {shape}?", colour, COLOURS),
        ("How many shapes are there?", str(count), tuple("123456")),
        ("Which shapes are there, in order?", listed, ()),
    ]
    if [c for c, _ in found].count(colour) == 1:
        asked.append((f"Which shape is {colour}?", shape, SHAPES))
    if count > 1:
        index = rng.randrange(count - 1)
        side = "above" if upright else "left of"
        asked.append(
            (f"Which shape is just {side} the {found[index + 1][1]}?", found[index][1], SHAPES)
        )
    return [image], asked


def crowd(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """Up to nine equal shapes of two colours on a grid: counts."""
    columns, rows = rng.randint(2, 4), rng.randint(1, 3)
    cell = rng.choice((28, 36, 42))
    image, pen = _paper(rng, columns * cell, rows * cell)
    shape = rng.choice(SHAPES)
    first, second = rng.sample(COLOURS, 2)
    counts = {first: 0, second: 0}
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.75 and sum(counts.values()) < 9:
                colour = rng.choice((first, second))
                counts[colour] += 1
                place = (column * cell + cell // 2, row * cell + cell // 2)
                _shape(pen, shape, colour, *place, rng.randint(cell // 4, cell // 2 - 4))
    numbers = tuple(str(n) for n in range(10))
    colour = rng.choice((first, second))
    return [image], [
        (f"How many {colour} shapes are there?", str(counts[colour]), numbers),
        ("How many shapes are there?", str(sum(counts.values())), numbers),
    ]


def chart(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """Two to five labelled bars."""
    count = rng.randint(2, 5)
    labels = [chr(65 + i) for i in range(count)]
    values = rng.sample(range(1, 10), count)
    width, height = count * 34 + 12, rng.choice((112, 126, 140))
    image, pen = _paper(rng, width, height)
    bottom = height - 20
    unit = (bottom - 22) / 9
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = 10 + index * 34
        top = bottom - value * unit
        pen.rectangle((x, top, x + 22, bottom), fill=PALETTE[rng.choice(COLOURS)])
        pen.text((x + 5, bottom + 1), label, fill=(0, 0, 0), font=_font(15))
        pen.text((x + 6, top - 17), str(value), fill=(0, 0, 0), font=_font(15))
    index = rng.randrange(count)
    order = sorted(range(count), key=values.__getitem__)
    numbers = tuple(str(n) for n in range(1, 10))
    return [image], [
        (f"What is the value of {labels[index]}?", str(values[index]), numbers),
        ("Which bar is the tallest?", labels[order[-1]], tuple(labels)),
        ("Which bar is the shortest?", labels[order[0]], tuple(labels)),
    ]


def pair(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """Two pictures compared."""
    if rng.random() < 0.5:
        left, right = _number(rng), _number(rng)
        while left == right:
            right = _number(rng)
        first = int(left) > int(right)
        answer = "the first" if first else "the second"
        pictures = [written(rng, left), written(rng, right)]
        return pictures, [
            ("Which picture shows the larger number?", answer, ("the first", "the second")),
            ("Which number does the first picture show?", left, _near(rng, left, 6)),
            ("Which number does the second picture show?", right, _near(rng, right, 6)),
        ]
    pictures, found = [], []
    for _ in range(2):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        image, pen = _paper(rng, 56, 56)
        _shape(pen, shape, colour, 28, 28, rng.randint(12, 24))
        pictures.append(image)
        found.append((colour, shape))
    (c1, s1), (c2, s2) = found
    return pictures, [
        ("Do the two pictures show the same shape?", "yes" if s1 == s2 else "no", ("yes", "no")),
        ("Do the two pictures have the same colour?", "yes" if c1 == c2 else "no", ("yes", "no")),
        ("What does the second picture show?", f"a {c2} {s2}", ()),
    ]


def strip(rng: Random) -> tuple[list[Image.Image], list[Asked]]:
    """A long strip of digits or of shapes: odd aspect ratios."""
    if rng.random() < 0.5:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(6, 12)))
        return [written(rng, text, rng.randint(20, 30))], [
            ("Which digits are shown?", text, _near_strip(rng, text))
        ]
    count = rng.randint(6, 12)
    image, pen = _paper(rng, count * SIDE, SIDE)
    found = [rng.choice(SHAPES[:4]) for _ in range(count)]
    colour = rng.choice(COLOURS)
    for index, shape in enumerate(found):
        _shape(pen, shape, colour, index * SIDE + 14, 14, rng.randint(8, 12))
    shape = rng.choice(found)
    numbers = tuple(str(n) for n in range(1, 13))
    return [image], [
        (f"How many {shape} shapes are there?", str(found.count(shape)), numbers),
        ("Which shapes are there, in order?", ", ".join(found), ()),
    ]


def _near_strip(rng: Random, text: str) -> tuple[str, ...]:
    found = {text}
    while len(found) < 6:
        digits = list(text)
        digits[rng.randrange(len(digits))] = rng.choice("0123456789")
        found.add("".join(digits))
    return tuple(sorted(found))


SCENES: dict[str, Callable[[Random], tuple[list[Image.Image], list[Asked]]]] = {
    "number": number, "word": word, "shapes": shapes, "crowd": crowd, "chart": chart,
    "pair": pair, "strip": strip,
}  # fmt: skip
INSTRUCTION = (
    "Answer the multiple choice question above. The last line of your response must have the form "
    "'Answer: $LETTER' (without quotes), where LETTER is one of {letters}."
)
TRANSCRIBE = (
    "Write out the question in the image and then answer it. The last line of your response must "
    "have the form 'Answer: $LETTER' (without quotes), where LETTER is one of {letters}."
)


def choice_prompt(question: str, options: tuple[str, ...]) -> str:
    """The question, its options and the instruction, as the suite asks."""
    letters = LETTERS[: len(options)]
    listed = "\n".join(f"{k}. {text}" for k, text in zip(letters, options, strict=True))
    return f"{question}\n{listed}\n\n{INSTRUCTION.format(letters=', '.join(letters))}"


def _scene(
    rng: Random, split: Split, name: str | None
) -> tuple[str, list[Image.Image], list[Asked]]:
    name = name or rng.choice(tuple(SCENES))
    while True:
        state = rng.getrandbits(64)
        own = Random(state)
        pictures, asked = SCENES[name](own)
        if split_of((name, [found[:2] for found in asked])) == split:
            return name, pictures, asked


def images(rng: Random, split: Split, name: str | None = None) -> Item:
    """A choice over what a picture shows; sometimes the question stands in the picture."""
    if name is None and rng.random() < 0.15:
        return inside(rng, split)
    name, pictures, asked = _scene(rng, split, name)
    choices = [found for found in asked if found[2]]
    chosen = [rng.choice(choices)]
    if split == "train":
        # Several questions a picture: seeing it is what a batch spends its time on.
        chosen = rng.sample(choices, rng.randint(1, min(3, len(choices))))
    posed = []
    for question, answer, values in chosen:
        options = options_with(rng, answer, values, min(len(values), rng.randint(4, 10)))
        posed.append((choice_prompt(question, options), answer, options))
    effort = effort_of(rng, 0.6)
    turns = []
    for index, (prompt, answer, options) in enumerate(posed):
        letter = LETTERS[options.index(answer)]
        thought = f"I see {answer}. That is {letter}." if effort == "high" else None
        shown = pictures if index == 0 else []
        turns += [ask(prompt, *shown), say(f"Answer: {letter}", thought)]
    gold = {"letter": letter, "options": len(options), "scene": name}
    return Item("images", tuple(turns), effort, gold=gold)


def look(rng: Random, split: Split) -> Item:
    """Open questions about a picture, every one that it allows: many labels a picture."""
    _, pictures, asked = _scene(rng, split, None)
    turns = []
    for index, (question, answer, _) in enumerate(rng.sample(asked, len(asked))):
        shown = pictures if index == 0 else []
        turns += [ask(question, *shown), say(answer)]
    return Item("look", tuple(turns), gold={"text": turns[-1].content})


def inside(rng: Random, split: Split) -> Item:
    """A sum, rendered with its options; it is written out, then answered.

    The thought adds up before it has seen options that could lead it astray, lists these as a
    prompt of text does, and says the value once more before its letter: so a letter is looked up
    here by what every other choice has taught (decision 0166).
    """
    while True:
        left, right = rng.randint(1, 49), rng.randint(1, 49)
        sign = rng.choice("+-")
        if sign == "-" and left < right:
            left, right = right, left
        if split_of(("inside", left, sign, right)) == split:
            break
    value = left + right if sign == "+" else left - right
    near = tuple(str(n) for n in range(max(0, value - 9), value + 10))
    options = options_with(rng, str(value), near, 4)
    letter = LETTERS[options.index(str(value))]
    question = f"What is {left} {sign} {right}?"
    lines = [question, "  ".join(f"{k}) {text}" for k, text in zip("ABCD", options, strict=True))]
    size = rng.randint(16, 22)
    width = max(int(_font(size).getlength(line)) for line in lines) + 16
    image, pen = _paper(rng, width, 2 * size + 24)
    for index, line in enumerate(lines):
        pen.text((8, 6 + index * (size + 8)), line, fill=_ink(rng), font=_font(size))
    thought = None
    effort = effort_of(rng, 0.6)
    if effort == "high":
        summed = f"{left} {sign} {right} = {value}."
        listed = "\n".join(f"{k}. {text}" for k, text in zip("ABCD", options, strict=True))
        thought = f"{question} {summed}\n{listed}\n\nI see {value}. That is {letter}."
    prompt = TRANSCRIBE.format(letters="A, B, C, D")
    gold = {"letter": letter, "options": 4, "scene": "inside"}
    return Item(
        "images", (ask(prompt, image), say(f"Answer: {letter}", thought)), effort, gold=gold
    )
