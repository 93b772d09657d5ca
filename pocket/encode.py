"""Items -> token ids with a loss weight each, and patches of pixels.

The ids are those that mistral-common's encoder gives for the same conversation (a test compares
them for every kind); this one is fast enough to feed a training run, and needs no mistral-common.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halfbyte.chat.images import ImageLayout
from pocket.items import Item, Turn
from pocket.vocabulary import MAX_IMAGE_SIDE, Vocabulary

# Loss weights in hundredths: what the assistant writes; prompts; documents to recall from.
ANSWER, PROMPT, DOCUMENT = 100, 5, 1
PATCH = 14


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """An image as uint8 patches (P, 3 * 14 * 14), the four of a merged patch side by side.

    rows_P, columns_P  where each patch stands in the grid
    """

    patches_PC: NDArray[np.uint8]
    rows_P: NDArray[np.uint8]
    columns_P: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """weights[i] is the weight of predicting ids[i], in hundredths."""

    ids: list[int]
    weights: list[int]
    images: tuple[Pixels, ...]
    last_answer: int


def patches_of(image: Image.Image) -> tuple[Pixels, int, int]:
    """(pixels, columns, rows of merged patches), resized as the server does."""
    layout = ImageLayout(2 * PATCH, MAX_IMAGE_SIDE, 10, 12, 13)
    columns, rows = layout.grid(*image.size)
    size = (columns * 2 * PATCH, rows * 2 * PATCH)
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.uint8)
    grid = values.reshape(rows, 2, PATCH, columns, 2, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    place = np.indices((rows, columns, 2, 2), dtype=np.uint8)
    at_rows = (2 * place[0] + place[2]).reshape(-1)
    at_columns = (2 * place[1] + place[3]).reshape(-1)
    return (
        Pixels(np.ascontiguousarray(grid.reshape(-1, 3 * PATCH * PATCH)), at_rows, at_columns),
        columns,
        rows,
    )


class Encoder:
    """Encodes conversations with one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._text = vocabulary.encode
        self._id = vocabulary.control
        self._cache: dict[str, list[int]] = {}

    def encode(self, item: Item) -> Encoded:
        """The whole conversation; the assistant's turns weigh 1."""
        prompt_weight = DOCUMENT if item.kind == "recall" else PROMPT
        ids: list[int] = [self._id["<s>"]]
        weights: list[int] = [0]
        images: list[Pixels] = []
        last_answer = 0

        def prompt(more: Sequence[int], weight: int) -> None:
            ids.extend(more)
            weights.extend([weight] * len(more))

        if item.system is not None:
            prompt(self._wrapped("SYSTEM_PROMPT", item.system), 0)
        if item.tools:
            prompt(
                self._wrapped("AVAILABLE_TOOLS", json.dumps(list(item.tools), ensure_ascii=False)),
                1,
            )
        prompt(self._settings(item.effort, item.schema), 0)
        for turn in item.turns:
            if turn.role == "assistant":
                last_answer = len(ids)
                answer = self._answer(turn)
                ids.extend(answer)
                weights.extend([ANSWER] * len(answer))
            elif turn.role == "tool":
                prompt(self._wrapped("TOOL_RESULTS", turn.content), 0)
            else:
                prompt([self._id["[INST]"]], 0)
                for image in turn.images:
                    pixels, columns, rows = patches_of(image)
                    images.append(pixels)
                    run = ([self._id["[IMG]"]] * columns + [self._id["[IMG_BREAK]"]]) * rows
                    run[-1] = self._id["[IMG_END]"]
                    prompt(run, 0)
                prompt(self._text(turn.content), prompt_weight)
                prompt([self._id["[/INST]"]], 0)
        return Encoded(ids, weights, tuple(images), last_answer)

    def _answer(self, turn: Turn) -> list[int]:
        ids: list[int] = []
        if turn.thought is not None:
            ids += [self._id["[THINK]"], *self._text(turn.thought), self._id["[/THINK]"]]
        if turn.content:
            ids += self._text(turn.content)
        for call in turn.calls:
            arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
            ids += [self._id["[TOOL_CALLS]"], *self._text(call.name)]
            ids += [self._id["[ARGS]"], *self._text(arguments)]
        return [*ids, self._id["</s>"]]

    def _wrapped(self, name: str, text: str) -> list[int]:
        return [self._id[f"[{name}]"], *self._text(text), self._id[f"[/{name}]"]]

    def _settings(self, effort: str, schema: Mapping[str, Any] | None) -> list[int]:
        settings: dict[str, Any] = {"reasoning_effort": effort}
        if schema is not None:
            return self._wrapped("MODEL_SETTINGS", json.dumps({"json_schema": schema, **settings}))
        if effort not in self._cache:
            self._cache[effort] = self._wrapped("MODEL_SETTINGS", json.dumps(settings))
        return self._cache[effort]
