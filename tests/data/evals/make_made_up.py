"""Writes `made_up/`: own items in the column layouts of sets that may not be in a repository.

Ten items each, so that the whole suite can be tried anywhere. They measure nothing.
"""

import csv
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent / "made_up"

FACTS = [
    ("What is the charge of an electron?", "Negative", ["Positive", "Neutral", "It varies"]),
    ("Which gas makes up most of the air?", "Nitrogen", ["Oxygen", "Argon", "Carbon dioxide"]),
    ("How many bonds does carbon usually form?", "Four", ["One", "Two", "Eight"]),
    ("What holds planets in orbit?", "Gravity", ["Magnetism", "Friction", "Light"]),
    ("Which base pairs with adenine in DNA?", "Thymine", ["Cytosine", "Guanine", "Uracil"]),
    ("What is the pH of pure water?", "7", ["0", "1", "14"]),
    ("What does a thermometer measure?", "Temperature", ["Pressure", "Mass", "Time"]),
    ("Which metal is liquid at room temperature?", "Mercury", ["Iron", "Zinc", "Gold"]),
    ("What is the SI unit of force?", "Newton", ["Joule", "Watt", "Pascal"]),
    ("Which cell part holds the DNA?", "Nucleus", ["Wall", "Membrane", "Ribosome"]),
]
SUMS = [(17, 25), (108, 44), (250, 399), (7, 993), (64, 36), (81, 19), (5, 6), (300, 45), (12, 13),
        (500, 111)]  # fmt: skip
CONSTRAINTS = [
    ("Write about rain without any whitespace.", "format:no_whitespace", {}),
    ("Answer with a text that holds exactly 3 numbers.", "count:numbers", {"N": 3}),
    ("Use at least 10 distinct words about a cat.", "count:unique_word_count", {"N": 10}),
    ("Use no word more than 2 times.", "words:repeats", {"small_n": 2}),
    ("Mention at least 2 names: Emma, Liam, Noah.", "count:person_names", {"N": 2}),
    ("Use at least 5 pronouns.", "count:pronouns", {"N": 5}),
    ("Write between 5 and 60 words.", "count:word_count_range", {"min_words": 5, "max_words": 60}),
    ("Use at least two kinds of conjunctions.", "count:conjunctions", {"small_n": 2}),
    ("Neighbouring words begin differently.", "words:no_consecutive", {}),
    ("Use title case.", "format:title_case", {}),
]
ROOMS = ["kitchen", "cellar", "attic", "garden", "hall"]


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


NOTE = "made-up items in this set's layout, not the benchmark's own: the score measures nothing"


def main() -> None:
    HERE.mkdir(exist_ok=True)
    (HERE / "NOTE.txt").write_text(NOTE + "\n")
    gpqa = HERE / "gpqa_diamond" / "gpqa_diamond.csv"
    gpqa.parent.mkdir(parents=True, exist_ok=True)
    with gpqa.open("w", newline="") as file:
        columns = ["Record ID", "Question", "Correct Answer"]
        columns += [f"Incorrect Answer {k}" for k in (1, 2, 3)] + ["High-level domain"]
        writer = csv.writer(file)
        writer.writerow(columns)
        for index, (question, right, wrong) in enumerate(FACTS):
            writer.writerow([f"made-up-{index}", question, right, *wrong, "Made up"])
    write_lines(
        HERE / "aime2025" / "problems.jsonl",
        [
            {"id": f"made-up-{i}", "problem": f"Find the sum of ${a}$ and ${b}$.", "answer": a + b}
            for i, (a, b) in enumerate(SUMS)
        ],
    )
    write_lines(
        HERE / "ifbench" / "prompts.jsonl",
        [
            {"key": str(i), "prompt": text, "instruction_id_list": [kind], "kwargs": [arguments]}
            for i, (text, kind, arguments) in enumerate(CONSTRAINTS)
        ],
    )
    rng = random.Random(0)
    lcr: list[dict[str, object]] = []
    for index in range(10):
        place = ROOMS[index // 2]
        filler = " ".join(f"Room {k} is empty." for k in range(40))
        context = (
            f"BEGIN DOCUMENT 1:\n{filler} The key is in the {place}.\nEND DOCUMENT 1\n\n"
            f"BEGIN DOCUMENT 2:\n{filler} The code is {1000 + index // 2}.\nEND DOCUMENT 2"
        )
        asked = ("Where is the key?", place) if index % 2 else ("What is the code?",
                                                                str(1000 + index // 2))  # fmt: skip
        lcr.append({"question": asked[0], "answer": asked[1], "context": context})
    write_lines(HERE / "aa_lcr" / "documents.jsonl", lcr)
    images = HERE / "mmmu_pro" / "images"
    images.mkdir(parents=True, exist_ok=True)
    (images.parent / "NOTE.txt").write_text(NOTE + "\n")
    rows: list[dict[str, object]] = []
    for index in range(10):
        colour = rng.choice(["red", "green", "blue"])
        picture = Image.new("RGB", (96, 48), "white")
        ImageDraw.Draw(picture).rectangle([24, 8, 72, 40], fill=colour)
        picture.save(images / f"box_{index}.png")
        options = ["red", "green", "blue"]
        rows.append(
            {"id": f"made-up-{index}", "question": "Which colour has the box in <image 1>?",
             "options": options, "answer": "ABC"[options.index(colour)], "subject": "Made up",
             "image_1": f"box_{index}.png", "vision_image": f"box_{index}.png"}
        )  # fmt: skip
    write_lines(images / "items.jsonl", rows)


if __name__ == "__main__":
    main()
