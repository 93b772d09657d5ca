"""Conversations about pictures, scored by two models: what they say after looking.

Text alone says nothing of image rows. Prompts are rows with pictures, drawn by the package or one's
own, laid out by the chat format; what is compared are the tokens behind the first picture, and of
them those of the last answer. Tokens of pictures themselves are never predicted and count for
nothing.

Shapes: N positions that count, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.calibrate.blend import Blend, Source
from halfbyte.calibrate.chat_text import RefusedRowError, load_chat_text
from halfbyte.calibrate.rows import BadRowError, parse_line, parse_row
from halfbyte.calibrate.sources import DataAccess, open_source
from halfbyte.chat.prompt import EncodedImage
from halfbyte.engine.core import Engine
from halfbyte.engine.request import ImageInput
from halfbyte.errors import UsageError
from halfbyte.evals.judging.stats import Interval as Interval

DRAWN = "drawn"
# Not a seed that anyone calibrates with.
DRAWN_SEED = 1_000_003
NUM_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A conversation with pictures, its last answer included, as tokens.

    images        pixels and places of its pictures
    counted       positions whose next token counts: text behind the first picture
    answer_start  index of the first token of the last answer
    """

    token_ids: tuple[int, ...]
    images: tuple[EncodedImage, ...]
    counted: tuple[int, ...]
    answer_start: int

    @property
    def answer_positions(self) -> tuple[int, ...]:
        """The counted positions whose next token belongs to the last answer."""
        return tuple(at for at in self.counted if at + 1 >= self.answer_start)


@dataclass(frozen=True, slots=True)
class ImageFidelity:
    """How a candidate's predictions behind pictures differ from the base's.

    kl_*            KL(base || this) per token behind a picture, nats; the interval across prompts
    answer_kl_mean  of the answers' tokens alone
    base_right, right  answers of which every token is the likeliest, given those before it
    lost, won       answers that are right in the base only, in the candidate only
    """

    prompts: int
    tokens: int
    kl_mean: float
    kl_interval: Interval | None
    kl_p99: float
    top1_agreement: float
    answer_tokens: int
    answer_kl_mean: float
    base_right: int
    right: int
    lost: int
    won: int


def image_prompts(
    directory: Path, pictures: str, limit: int | None = None
) -> tuple[ImagePrompt, ...]:
    """The first conversations about pictures of a source, as a checkpoint's chat format has them.

    pictures  "drawn", or a folder of pictures or a file of rows, as in a blend; rows without a
              picture, or without an answer at their end, are passed over

    Raises UsageError for a source without a usable row, and for a broken one.
    """
    wanted = NUM_PROMPTS if limit is None else limit
    path = Path(pictures)
    source = Source(path=pictures)
    if pictures == DRAWN:
        source = Source(drawn=True)
    elif path.is_dir():
        source = Source(pictures=pictures)
    blend = Blend(f"--pictures {pictures}", [source], seed=DRAWN_SEED)
    text = load_chat_text(directory, "template")
    layout = text.chat.image_layout
    if layout is None:
        raise UsageError(f"{directory}: this model takes text only; leave --pictures out")
    of_pictures = (layout.image_token_id, layout.break_token_id, layout.end_token_id)
    found: list[ImagePrompt] = []
    for split in open_source(source, blend, DataAccess()).splits:
        for file, line in split.lines():
            if len(found) == wanted:
                return tuple(found)
            try:
                row = parse_row(parse_line(line))
                if not row.has_pictures or row.messages[-1]["role"] != "assistant":
                    continue
                whole = text.encode(row, file.folder)
                asked = text.encode(replace(row, messages=row.messages[:-1]), file.folder)
            except (BadRowError, RefusedRowError) as error:
                raise UsageError(f"{file.name}:{line.number}: {error}") from error
            ids = whole.token_ids
            pairs = zip(ids, asked.token_ids, strict=False)
            start = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
            first = whole.images[0].offset + whole.images[0].num_tokens
            counted = tuple(
                at for at in range(first - 1, len(ids) - 1) if ids[at + 1] not in of_pictures
            )
            answer_start = len(asked.token_ids) if start is None else start
            found.append(ImagePrompt(ids, whole.images, counted, answer_start))
    if not found:
        raise UsageError(f"--pictures {pictures}: no row shows a picture and ends with an answer")
    return tuple(found)


def longest_prompt(prompts: Sequence[ImagePrompt]) -> int:
    """Tokens of the longest prompt; 0 for none."""
    return max((len(prompt.token_ids) for prompt in prompts), default=0)


def prompt_logprobs(engine: Engine, prompt: ImagePrompt) -> Tensor:
    """Log-probs f32 (N, V) at the positions of a prompt that count."""
    images = tuple(ImageInput.of(i.pixels, i.offset, i.num_tokens) for i in prompt.images)
    with closing(engine.score(prompt.token_ids, images=images)) as chunks:
        logits_TV = torch.cat(list(chunks))
    return torch.log_softmax(logits_TV[list(prompt.counted)], dim=-1)


def is_right(prompt: ImagePrompt, logprobs_NV: Tensor) -> bool:
    """Whether every token of the last answer is the likeliest one, given those before it."""
    best_N = logprobs_NV.argmax(-1).tolist()
    return all(
        best == prompt.token_ids[at + 1]
        for at, best in zip(prompt.counted, best_N, strict=True)
        if at + 1 >= prompt.answer_start
    )
