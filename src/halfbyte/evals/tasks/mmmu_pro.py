"""MMMU-Pro: 1,730 questions with images in 30 subjects, in three settings; letter equality.

Set: MMMU/MMMU_Pro, split test (Apache-2.0; images stay with their owners). Settings: standard
(10 options, images in reading order), vision (one screenshot), and vision with the options also
as text, which is the one set beside the published column. The official parser ends in a random
option; here such an answer is unparsed.
"""

import ast
import base64
import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image as Pixels

from halfbyte.evals.grading.letters import grade_letter
from halfbyte.evals.tasks.benchmark import Benchmark, LoadedItems, Options, spread_indices
from halfbyte.evals.tasks.choices import LETTERS
from halfbyte.evals.tasks.data import DataRows, HubSet, load_rows
from halfbyte.evals.tasks.published import compared, content_hash
from halfbyte.evals.types import Image, Prompt, Sample, Score, Text
from halfbyte.pictures import on_white, open_picture

Setting = Literal["standard", "vision", "vision-options"]

_REVISION = "563f3e84bb3b90893083a1f039cfa13077f2302b"
_CONFIGS = {
    "standard": "standard (10 options)",
    "vision": "vision",
    "vision-options": "vision",
}
_INSTRUCTION = (
    "Answer the multiple choice question above. Think step by step. The last line of your response "
    "must have the form 'Answer: $LETTER' (without quotes), where LETTER is one of {letters}."
)
_TRANSCRIBE = (
    "Write out the multiple choice question in the image and then solve it. Think step by step. "
    "The last line of your response must have the form 'Answer: $LETTER' (without quotes), where "
    "LETTER is one of {letters}."
)
_MAX_PIXELS = 2**27  # more than any picture of the set has
_MARKER = re.compile(r"<image (\d)>")


def load(setting: Setting, options: Options) -> LoadedItems:
    folder = "standard" if setting == "standard" else "vision"
    rows = load_rows(
        "MMMU-Pro",
        options.data,
        patterns=(
            f"mmmu_pro/{folder}*.parquet",
            f"mmmu_pro/{folder}/*.parquet",
            "mmmu_pro/images/items.jsonl",
        ),
        hub=HubSet("MMMU/MMMU_Pro", "test", revision=_REVISION, config=_CONFIGS[setting]),
        columns=("options", "answer"),
        how="Open set: `pip install datasets` and a network, or save the set's parquet files as "
        f"mmmu_pro/{folder}.parquet below --data.",
    )
    column = "image_1" if setting == "standard" else "image"
    usable = [
        (i, row) for i, row in enumerate(rows.rows) if row.get(column) or row.get("vision_image")
    ]
    samples = [
        _sample(setting, *usable[i], rows) for i in spread_indices(len(usable), options.limit)
    ]
    hashes = [content(row) for row in rows.rows]
    return LoadedItems(tuple(samples), compared(rows.provenance, "mmmu_pro", hashes))


def content(row: Mapping[str, Any]) -> str:
    """A hash by which an item is recognised in any setting; pictures are left out."""
    return content_hash(row.get("id", ""), *_options(row), row["answer"])


def _options(row: Mapping[str, Any]) -> tuple[str, ...]:
    texts = row["options"]
    return tuple(ast.literal_eval(texts) if isinstance(texts, str) else texts)


def _sample(setting: Setting, index: int, row: Mapping[str, Any], rows: DataRows) -> Sample:
    texts = _options(row)
    numbered = tuple(f"image_{k}" for k in range(1, 8))
    names = numbered if setting == "standard" else ("image", "vision_image")
    images = {name.replace("vision_image", "image"): row[name] for name in names if row.get(name)}
    item_id = str(row.get("id", index))
    return Sample(
        item_id=item_id,
        group=item_id,
        stratum=str(row.get("subject", "")),
        gold=str(row["answer"]),
        fields={
            "setting": setting,
            "question": row.get("question", ""),
            "options": texts,
            "images": images,
            "folder": rows.folder,
        },
    )


def prompt(sample: Sample, earlier: Sequence[str], options: Options) -> Prompt:
    f = sample.fields
    letters = LETTERS[: len(f["options"])]
    listed = "\n".join(f"{k}. {text}" for k, text in zip(letters, f["options"], strict=True))
    spoken = ", ".join(letters)
    if f["setting"] == "standard":
        text = f"{f['question']}\n{listed}\n\n{_INSTRUCTION.format(letters=spoken)}"
        place = _append if options.image_placement == "append" else _inline
        return place(text, partial(_image, f["images"], f["folder"]))
    screenshot = Image(_data_uri(f["images"]["image"], f["folder"]))
    text = _TRANSCRIBE.format(letters=spoken)
    if f["setting"] == "vision-options":
        text = f"{listed}\n\n{text}"
    return (screenshot, Text(text))


def _image(images: Mapping[str, Any], folder: Path | None, number: str) -> Image:
    return Image(_data_uri(images[f"image_{number}"], folder))


def _inline(text: str, image: Any) -> Prompt:
    """Every marker replaced by its image, where it stands; a repeated marker repeats the image."""
    parts: list[Text | Image] = []
    # Splitting by a pattern with one group gives text, number, text, number, ..., text.
    for index, piece in enumerate(_MARKER.split(text)):
        if index % 2:
            parts.append(image(piece))
        elif piece.strip():
            parts.append(Text(piece))
    return tuple(parts)


def _append(text: str, image: Any) -> Prompt:
    """The official shape: the markers stay as words, images follow in order of first mention."""
    numbers = list(dict.fromkeys(_MARKER.findall(text)))
    return (Text(text), *(image(number) for number in numbers))


def _data_uri(source: Any, folder: Path | None) -> str:
    """PNG data URI, upright, RGB on white as the server would show it; nothing is resized."""
    stream = io.BytesIO()
    _opened(source, folder).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _opened(source: Any, folder: Path | None) -> Pixels.Image:
    if isinstance(source, Pixels.Image):  # the datasets library has decoded it
        has_key = source.mode in ("1", "L", "RGB", "I;16")
        return on_white(source, source.info.get("transparency") if has_key else None)
    if isinstance(source, Mapping):  # parquet: {"bytes": ..., "path": ...}
        data = source["bytes"]
    else:
        assert folder is not None, source
        data = (folder / str(source)).read_bytes()
    return open_picture(data, max_pixels=_MAX_PIXELS).decode()


def grade(sample: Sample, text: str) -> Score:
    return grade_letter(sample.gold, LETTERS[: len(sample.fields["options"])], text)


def _benchmark(setting: Setting, title: str, note: str) -> Benchmark:
    return Benchmark(
        name="mmmu_pro" if setting == "vision-options" else f"mmmu_pro_{setting}",
        title=title,
        kind="answer",
        load=partial(load, setting),
        prompt=prompt,
        grade=grade,
        prompt_id=f"mmmu-pro/{setting}/{{image_placement}}/1",
        scorer="letter equality",
        source=f"MMMU/MMMU_Pro, {_CONFIGS[setting]}, test",
        licence="Apache-2.0, images with their owners",
        full_items=1_730,
        repeats=1,
        margin=0.015,
        plan_variance=0.1028,
        plan_prompt_tokens=2_900,
        plan_output_tokens=5_000,
        concurrency=32,
        notes=(note,),
    )


BENCHMARKS = (
    _benchmark(
        "vision-options",
        "MMMU Pro",
        "the questions of the vision setting, with the options also as text",
    ),
    _benchmark("vision", "MMMU Pro (vision)", "one screenshot, nothing as text"),
    _benchmark("standard", "MMMU Pro (standard, 10 options)", "text with images in reading order"),
)
