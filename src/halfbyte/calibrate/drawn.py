"""Pictures made up by code, with something to say about each: shapes, charts, text, patterns.

For calibration and comparison where nobody has given pictures of their own. What a scene shows
follows from a seed and a number; its words are made without drawing it, so that thousands of rows
can be read and a few of them drawn. Pillow draws: letters may differ between versions of it, so a
record keeps the pixels' hash.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from halfbyte.calibrate.documents import builtin_documents
from halfbyte.errors import UsageError

# Rows that a source of drawn pictures offers.
NUM_DRAWN = 1024

_REFERENCE = re.compile(r"drawn:(\d{1,10}):(\d{1,10}):(\d)")
_COLOURS = {
    "red": (214, 39, 40), "green": (30, 150, 60), "blue": (40, 80, 200), "yellow": (240, 200, 30),
    "black": (15, 15, 15), "orange": (245, 130, 30), "purple": (130, 50, 160),
    "grey": (128, 128, 128),
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle", "cross")
_PAPERS = ((255, 255, 255), (250, 245, 230), (20, 22, 28), (230, 238, 250))
_NAMES = ("north", "south", "river", "harbour", "garden", "market", "bridge", "tower", "forest")


@dataclass(frozen=True, slots=True)
class Scene:
    """A conversation about pictures that are not drawn yet.

    asked   question and answer pairs, one turn each; the pictures come before the first question
    """

    kind: str
    asked: tuple[tuple[str, str], ...]
    draw: tuple[Callable[[], Image.Image], ...]


def drawn_scene(seed: int, number: int) -> Scene:
    """The scene of a number; scenes of all kinds come in turn."""
    kinds = tuple(_KINDS)
    kind = kinds[number % len(kinds)]
    return _KINDS[kind](Random(f"{seed}:{number}"))


def drawn_messages(seed: int, number: int) -> list[dict[str, object]]:
    """The conversation of a scene as a row holds it; its pictures by their references."""
    scene = drawn_scene(seed, number)
    messages: list[dict[str, object]] = []
    for turn, (question, answer) in enumerate(scene.asked):
        parts: list[dict[str, object]] = []
        if turn == 0:
            parts = [
                {"type": "image", "image": f"drawn:{seed}:{number}:{index}"}
                for index in range(len(scene.draw))
            ]
        content: object = [*parts, {"type": "text", "text": question}] if parts else question
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return messages


def is_reference(text: str) -> bool:
    """Whether a row's picture is one to be drawn here."""
    return text.startswith("drawn:")


def draw_reference(text: str) -> Image.Image:
    """Draw the picture of a reference, RGB. Raises UsageError for one that means no picture."""
    match = _REFERENCE.fullmatch(text)
    pictures: tuple[Callable[[], Image.Image], ...] = ()
    if match is not None:
        pictures = drawn_scene(int(match[1]), int(match[2])).draw
    if match is None or int(match[3]) >= len(pictures):
        raise UsageError(f"{text[:60]!r} is no drawn picture; drawn:SEED:NUMBER:INDEX was expected")
    return pictures[int(match[3])]()


# --- scenes


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _ink(paper: tuple[int, int, int]) -> tuple[int, int, int]:
    return (245, 245, 245) if sum(paper) < 300 else (20, 20, 25)


def _written(lines: list[str], size: int, paper: tuple[int, int, int]) -> Image.Image:
    """Lines of text on paper a little larger than they are."""
    font = _font(size)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(int(pen.textlength(line, font=font)) for line in lines) + 2 * size
    image = Image.new("RGB", (max(width, 28), len(lines) * (size + size // 3) + size), paper)
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        place = (size, size // 2 + row * (size + size // 3))
        pen.text(place, line, fill=_ink(paper), font=font)
    return image


def _text(rng: Random) -> Scene:
    """A few words or a number, read aloud."""
    words = rng.sample(_NAMES, rng.randint(1, 3))
    text = str(rng.randint(0, 99999)) if rng.random() < 0.5 else " ".join(words)
    size, paper = rng.randint(16, 64), rng.choice(_PAPERS)
    return Scene(
        "text", (("What is written here?", text),), (lambda: _written([text], size, paper),)
    )


def _page(rng: Random) -> Scene:
    """A paragraph as a page of a document."""
    _, text = rng.choice(builtin_documents())
    words = " ".join(text.split()).split(" ")
    start = rng.randrange(max(1, len(words) - 60))
    words, per_line = words[start : start + rng.randint(20, 60)], rng.randint(5, 9)
    lines = [" ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)]
    size, paper = rng.randint(11, 16), rng.choice(_PAPERS)
    asked = (("Transcribe the page.", " ".join(words)),)
    return Scene("page", asked, (lambda: _written(lines, size, paper),))


def _shape(
    pen: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], x: int, y: int, r: int
) -> None:
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        for sign in (1, -1):
            pen.line((x - r, y - sign * r, x + r, y + sign * r), fill=fill, width=max(3, r // 2))


def _shapes(rng: Random) -> Scene:
    """Coloured shapes in rows and columns: named, counted."""
    columns, rows, cell = rng.randint(1, 5), rng.randint(1, 3), rng.choice((40, 56, 84))
    found = [(rng.choice(tuple(_COLOURS)), rng.choice(_SHAPES)) for _ in range(columns * rows)]
    colour = rng.choice(found)[0]

    def draw() -> Image.Image:
        image = Image.new("RGB", (columns * cell, rows * cell), (255, 255, 255))
        pen = ImageDraw.Draw(image)
        for place, (name, shape) in enumerate(found):
            x, y = (place % columns) * cell + cell // 2, (place // columns) * cell + cell // 2
            _shape(pen, shape, _COLOURS[name], x, y, cell // 3)
        return image

    listed = ", ".join(f"{name} {shape}" for name, shape in found)
    count = sum(name == colour for name, _ in found)
    asked = (
        ("Which shapes are there, row by row?", listed),
        (f"How many are {colour}?", str(count)),
    )
    return Scene("shapes", asked, (draw,))


def _chart(rng: Random) -> Scene:
    """Labelled bars."""
    labels = rng.sample(_NAMES, rng.randint(3, 6))
    values = [rng.randint(5, 95) for _ in labels]
    colours = [rng.choice(tuple(_COLOURS.values())) for _ in labels]
    height, paper = rng.choice((180, 260, 360)), rng.choice(_PAPERS)

    def draw() -> Image.Image:
        image = Image.new("RGB", (len(labels) * 70 + 20, height), paper)
        pen, foot = ImageDraw.Draw(image), height - 26
        for place, (label, value, fill) in enumerate(zip(labels, values, colours, strict=True)):
            x, top = 20 + place * 70, foot - value * (foot - 30) // 100
            pen.rectangle((x, top, x + 44, foot), fill=fill, outline=_ink(paper))
            pen.text((x, foot + 4), label, fill=_ink(paper), font=_font(13))
            pen.text((x + 10, top - 18), str(value), fill=_ink(paper), font=_font(13))
        return image

    chosen = rng.randrange(len(labels))
    listed = ", ".join(f"{label} {value}" for label, value in zip(labels, values, strict=True))
    asked = ((f"What is the value of {labels[chosen]}?", str(values[chosen])),
             ("List all bars.", listed))  # fmt: skip
    return Scene("chart", asked, (draw,))


def _pattern(rng: Random) -> Scene:
    """What photographs and screens have and drawings lack: noise, slopes, the ends of the range."""
    kind = rng.choice(("noise", "slope", "squares", "plain"))
    width, height = rng.choice((56, 112, 224, 448)), rng.choice((56, 112, 224, 448))
    first, second = rng.sample(sorted(_COLOURS), 2)
    seed = rng.getrandbits(32)

    def draw() -> Image.Image:
        one, other = (np.array(_COLOURS[name], dtype=np.float64) for name in (first, second))
        rows, columns = np.mgrid[0:height, 0:width]
        if kind == "noise":
            pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
            return Image.fromarray(pixels.astype(np.uint8))
        share = {
            "slope": (rows / height + columns / width) / 2,
            "squares": (rows // 14 + columns // 14) % 2,
            "plain": np.zeros((height, width)),
        }[kind][..., None]
        return Image.fromarray((one * (1 - share) + other * share).astype(np.uint8))

    said = {
        "noise": "Nothing but coloured noise.",
        "slope": f"A slope from {first} to {second}.",
        "squares": f"Small squares, {first} and {second} in turn.",
        "plain": f"A plain {first} area.",
    }[kind]
    return Scene("pattern", (("Describe the picture.", said),), (draw,))


def _strip(rng: Random) -> Scene:
    """Far wider than high, or the other way round."""
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(12, 40)))
    is_upright = rng.random() < 0.4
    lines = list(digits) if is_upright else [digits]
    paper = rng.choice(_PAPERS)
    asked = (("Which digits are shown?", digits),)
    return Scene("strip", asked, (lambda: _written(lines, 18, paper),))


def _pair(rng: Random) -> Scene:
    """Two pictures in one turn."""
    left, right = rng.sample(range(1000), 2)
    size, paper = rng.randint(20, 48), rng.choice(_PAPERS)
    larger = "The first." if left > right else "The second."
    return Scene(
        "pair",
        (("Which picture shows the larger number?", f"{larger} They show {left} and {right}."),),
        (
            lambda: _written([str(left)], size, paper),
            lambda: _written([str(right)], size, paper),
        ),
    )


_KINDS: dict[str, Callable[[Random], Scene]] = {
    "text": _text, "page": _page, "shapes": _shapes, "chart": _chart, "pattern": _pattern,
    "strip": _strip, "pair": _pair,
}  # fmt: skip
