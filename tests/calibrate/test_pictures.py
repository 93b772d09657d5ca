"""Image rows in calibration: drawn and read, laid out as the format says, through the tower."""

import base64
import io
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from halfbyte.calibrate.activations import Activations
from halfbyte.calibrate.blend import Blend, Source, load_blend, parse_blend
from halfbyte.calibrate.draw import RowPictures, draw, write_rows
from halfbyte.calibrate.drawn import NUM_DRAWN, draw_reference, drawn_messages, drawn_scene
from halfbyte.calibrate.rows import BadRowError, parse_row
from halfbyte.calibrate.seeing import check_pictures, image_positions
from halfbyte.calibrate.stream import TAPS, stream_layers
from halfbyte.calibrate.tokens import as_rows, read_rows, read_token_rows
from halfbyte.chat.prompt import EncodedImage
from halfbyte.chat.tokens import load_chat
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder, load_vision
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.pictures import normalized

TEKKEN = Path(__file__).parent.parent / "data" / "chat" / "tekken"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tower, and the tokenizer that lays pictures out."""
    directory = tmp_path_factory.mktemp("seeing") / "model"
    chat = load_chat(TEKKEN)
    config = tiny_config(layers=2, vision=True)
    assert config.vision is not None and chat.image_layout is not None
    vision = replace(config.vision, image_token_id=chat.image_layout.image_token_id)
    text = replace(config.text, vocab_size=chat.vocabulary.size)
    write_tiny_checkpoint(directory, config=replace(config, text=text, vision=vision))
    shutil.copy(TEKKEN / "tekken.json", directory)
    return directory


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def shown(picture: str, question: str = "What is it?", answer: str = "A thing.") -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": question},
    ]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


# --- drawn


def test_a_seed_draws_the_same_pictures_and_another_seed_others() -> None:
    for number in range(14):
        scene = drawn_scene(3, number)
        one = [np.asarray(draw()) for draw in scene.draw]
        again = [
            np.asarray(draw_reference(f"drawn:3:{number}:{n}")) for n in range(len(scene.draw))
        ]
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
        assert drawn_messages(3, number) == drawn_messages(3, number)
        assert all(a.ndim == 3 and min(a.shape[:2]) > 0 and max(a.shape[:2]) < 3000 for a in one)
    texts = [json.dumps(drawn_messages(seed, n)[1]) for seed in (3, 4) for n in range(56)]
    assert len(set(texts[:56]) - set(texts[56:])) > 40
    kinds = {drawn_scene(0, number).kind for number in range(7)}
    assert len(kinds) == 7


def test_drawn_pictures_have_odd_shapes_too() -> None:
    ratios = []
    for number in range(70):
        for paint in drawn_scene(0, number).draw:
            width, height = paint().size
            ratios.append(width / height)
    assert min(ratios) < 0.25 and max(ratios) > 8


@pytest.mark.parametrize(
    "text", ["drawn:", "drawn:0:1:9", "drawn:-1:0:0", "drawn:0:0:0:0", "drawn:x"]
)
def test_a_reference_that_means_no_picture_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no drawn picture"):
        draw_reference(text)


# --- rows


def test_a_blend_says_one_kind_of_source() -> None:
    blend = parse_blend("{name: a, sources: [{drawn: true}, {pictures: photos, weight: 2}]}", "a")
    assert [source.label for source in blend.sources] == ["drawn", "photos"]
    for wrong in ("{drawn: true, builtin: true}", "{pictures: a, path: b}", "{}"):
        with pytest.raises(UsageError, match="say exactly one of"):
            parse_blend(f"{{name: a, sources: [{wrong}]}}", "a")


def test_image_tokens_are_laid_out_as_the_server_lays_them_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(100, 60))
    data_url = "data:image/png;base64," + base64.b64encode(png(28, 200, 1)).decode()
    rows = [shown("a.png"), shown(data_url), {"image": "a.png", "prompt": "Q", "response": "A"}]
    write(tmp_path / "rows.jsonl", rows)
    blend = Blend("b", [Source(path="rows.jsonl")], samples=3, select="first", folder=tmp_path)
    data = draw(blend, TEKKEN)
    chat = load_chat(TEKKEN)
    layout = chat.image_layout
    assert layout is not None
    assert [len(images) for images in data.pictures] == [1, 1, 1]
    for ids, (image,) in zip(data.rows, data.pictures, strict=True):
        columns, lines = image.pixels.shape[2] // 28, image.pixels.shape[1] // 28
        place = slice(image.offset, image.offset + image.num_tokens)
        assert list(ids[place]) == layout.tokens(columns, lines)
        assert ids.count(layout.image_token_id) == columns * lines
    parts = [
        {"type": "image", "image": Image.open(tmp_path / "a.png")},
        {"type": "text", "text": "What is it?"},
    ]
    served = chat.encode([{"role": "user", "content": parts}])
    assert data.rows[0][: len(served.token_ids)] == served.token_ids
    assert np.array_equal(data.pictures[0][0].pixels, served.images[0].pixels)
    # Equal pictures, an exchange in columns: the same pixels at the same place.
    assert np.array_equal(data.pictures[2][0].pixels, data.pictures[0][0].pixels)


def test_a_folder_of_pictures_is_asked_about_one_by_one(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(3):
        (photos / f"{n}.png").write_bytes(png(56, 56, n))
    (photos / "1.txt").write_text("A caption that answers.", "utf-8")
    source = Source(pictures="photos", question="What do you see?")
    data = draw(Blend("b", [source], samples=3, select="first", folder=tmp_path), TEKKEN)
    chat = load_chat(TEKKEN)
    texts = [chat.vocabulary.decode(ids) for ids in data.rows]
    assert all("What do you see?" in text for text in texts)
    assert ["A caption that answers." in text for text in texts] == [False, True, False]
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="holds no picture"):
        draw(Blend("b", [Source(pictures="none")], folder=tmp_path), TEKKEN)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (shown("gone.png"), "gone.png"),
        (shown("../secret.png"), "outside"),
        (shown("/etc/passwd"), "outside"),
        (shown("https://example.org/a.png"), "not fetched"),
        (shown("data:image/png;base64,AAAA"), "PNG, JPEG"),
        (shown("broken.png"), "broken.png"),
        (shown("fifo.png"), "fifo.png"),
        (shown("huge.png"), "pixels"),
        (shown("drawn:0:0:7"), "drawn"),
        ({"image": 7, "prompt": "Q", "response": "A"}, "a file name"),
        ({"images": ["a.png"] * 33, "prompt": "Q", "response": "A"}, "1 to 32"),
    ],
)
def test_hostile_pictures_are_named_and_left_out(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    (tmp_path / "secret.png").write_bytes(png(28, 28))
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(28, 28))
    (folder / "broken.png").write_bytes(png(28, 28)[:60])
    os.mkfifo(folder / "fifo.png")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    written = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
    write(folder / "rows.jsonl", [shown("a.png"), row])
    blend = Blend("b", [Source(path="rows.jsonl")], samples=2, select="first", folder=folder)
    data = draw(blend, TEKKEN)
    assert len(data.rows) == 1
    (member,) = data.provenance["members"]
    (split,) = member["splits"]
    assert split["broken"]["rows"] == 1 and said in split["broken"]["first"][0]


def test_rows_of_a_data_set_may_name_no_files() -> None:
    blend = Blend("b", [Source(drawn=True)], samples=1)
    assert draw(blend, TEKKEN).pictures
    with pytest.raises(BadRowError, match="pictures in a turn of the assistant"):
        parse_row(
            {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}
        )


def test_a_text_only_model_is_told_that_it_sees_nothing(chatml: Path) -> None:
    with pytest.raises((UsageError, CheckpointError), match="text"):
        draw(Blend("b", [Source(drawn=True)], samples=4), chatml)


def test_packed_text_keeps_its_bytes_and_pictures_stay_whole_rows() -> None:
    blend = load_blend("pictures")
    data = draw(blend, TEKKEN)
    budget = blend.samples * blend.tokens_per_sample
    assert 0.9 * budget < data.num_tokens <= budget
    text = replace(blend, sources=[Source(builtin=True)], samples=blend.samples // 2)
    alone = draw(text, TEKKEN)
    assert alone.pictures == () and "pictures" not in alone.provenance
    bare = [row for row, images in zip(data.rows, data.pictures, strict=True) if not images]
    assert bare == list(alone.rows)
    tokens = data.provenance["pictures"]["tokens"]
    assert 0.1 * data.num_tokens < tokens < 0.9 * data.num_tokens
    assert data.provenance == draw(blend, TEKKEN).provenance
    other = draw(replace(blend, seed=1), TEKKEN).provenance["pictures"]["pixels_sha256"]
    assert other != data.provenance["pictures"]["pixels_sha256"]


@settings(max_examples=12)
@given(cut=st.integers(3, 60))
def test_a_row_that_is_cut_keeps_the_part_of_its_picture(cut: int) -> None:
    blend = Blend("b", [Source(drawn=True)], samples=3, tokens_per_sample=cut)
    data = draw(blend, TEKKEN)
    layout = load_chat(TEKKEN).image_layout
    assert layout is not None
    config = _config()
    rows = as_rows(data)
    check_pictures(rows, data.pictures, config, "b")
    for row, images in zip(rows, data.pictures or ((),) * len(rows), strict=True):
        assert row.numel() <= cut
        found = sum(map(len, image_positions(row, images, layout.image_token_id)))
        assert found == int((row == layout.image_token_id).sum())


def _config() -> Any:
    layout = load_chat(TEKKEN).image_layout
    config = tiny_config(vision=True)
    assert layout is not None and config.vision is not None
    return replace(config, vision=replace(config.vision, image_token_id=layout.image_token_id))


def test_rows_are_written_and_read_back_with_their_pictures(tmp_path: Path) -> None:
    data = draw(replace(load_blend("pictures"), samples=6), TEKKEN)
    write_rows(data, tmp_path / "rows.safetensors")
    rows, pictures = read_rows(tmp_path / "rows.safetensors")
    assert [tuple(row.tolist()) for row in rows] == list(data.rows)
    assert len(pictures) == len(data.pictures)
    for one, other in zip(pictures, data.pictures, strict=True):
        assert [(i.offset, i.num_tokens) for i in one] == [(i.offset, i.num_tokens) for i in other]
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, other, strict=True))
    with pytest.raises(UsageError, match="show pictures"):
        read_token_rows(tmp_path / "rows.safetensors")


@pytest.mark.parametrize(
    ("offset", "num_tokens", "shape"),
    [
        (0, 3, (3, 56, 56)),
        (1, 99, (3, 56, 56)),
        (1, 6, (3, 56, 28)),
        (1, 6, (1, 56, 56)),
        (40, 6, (3, 56, 56)),
    ],
)
def test_pictures_that_do_not_fit_their_tokens_are_refused(
    offset: int, num_tokens: int, shape: tuple[int, int, int]
) -> None:
    config = _config()
    image = config.vision.image_token_id
    row = torch.tensor([1, image, image, 12, image, image, 13, 5])
    fits = ((EncodedImage(np.zeros((3, 56, 56), np.uint8), 1, 6),),)
    check_pictures([row], fits, config, "here")
    wrong = ((EncodedImage(np.zeros(shape, np.uint8), offset, num_tokens),),)
    with pytest.raises(UsageError, match="here: row 0"):
        check_pictures([row], wrong, config, "here")
    with pytest.raises(UsageError, match="text only"):
        check_pictures([row], fits, replace(config, vision=None), "here")


# --- through the tower


def drawn_rows(directory: Path, samples: int = 8) -> tuple[list[torch.Tensor], RowPictures]:
    blend = replace(load_blend("pictures"), samples=samples, tokens_per_sample=96)
    data = draw(blend, directory)
    assert any(data.pictures) and not all(data.pictures)
    return list(as_rows(data)), data.pictures


def whole_maxima(
    checkpoint: Checkpoint, rows: Sequence[torch.Tensor], pictures: RowPictures
) -> list[dict[str, float]]:
    """What the taps of the whole model see, its tower in one piece."""
    decoder, vision = load_decoder(checkpoint), load_vision(checkpoint)
    assert vision is not None and checkpoint.config.vision is not None
    found: list[dict[str, float]] = [dict.fromkeys(TAPS, 0.0) for _ in decoder.decoder_layers()]
    for row, images in zip(rows, pictures, strict=True):
        vectors = vision([torch.from_numpy(normalized(image.pixels)) for image in images])
        at = image_positions(row, images, checkpoint.config.vision.image_token_id)
        kept = [one[: len(places)] for one, places in zip(vectors, at, strict=True)]
        attend = DenseAttend([0, len(row)])
        step = Step(
            row,
            torch.arange(len(row)),
            attend,
            None,
            torch.cat(at) if at else None,
            torch.cat(kept) if kept else None,
        )
        with torch.inference_mode():
            x_TD, rotation = decoder.embed(step), decoder.rotary.at(step.positions_T)
            for index, layer in enumerate(decoder.decoder_layers()):

                def tap(point: str, x: torch.Tensor, index: int = index) -> None:
                    found[index][point] = max(found[index][point], float(x.abs().max()))

                x_TD = layer(x_TD, index, attend, rotation, tap)
    return found


def test_streamed_pictures_give_what_the_whole_model_sees(seeing: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(seeing)
    rows, pictures = drawn_rows(seeing)
    whole = whole_maxima(checkpoint, rows, pictures)
    for directory in (None, tmp_path):
        activations = Activations(
            [row.numel() for row in rows], 128, directory, in_memory=directory is None
        )
        for statistics in stream_layers(
            checkpoint, rows, pictures=pictures, activations=activations
        ):
            observed = {tap: float(value) for tap, value in statistics.observed.items()}
            assert observed == whole[statistics.layer]
        activations.close()
    assert not (tmp_path / "pictures").exists()
    blind = list(stream_layers(checkpoint, rows))
    assert any(
        float(statistics.observed[tap]) != whole[statistics.layer][tap]
        for statistics in blind
        for tap in TAPS
    )


def test_the_order_of_rows_with_pictures_does_not_change_a_bit(seeing: Path) -> None:
    checkpoint = Checkpoint.open(seeing)
    rows, pictures = drawn_rows(seeing)

    def observed(order: Sequence[int]) -> list[dict[str, float]]:
        chosen = stream_layers(
            checkpoint, [rows[n] for n in order], pictures=tuple(pictures[n] for n in order)
        )
        return [{tap: float(x) for tap, x in one.observed.items()} for one in chosen]

    order = list(range(len(rows)))
    straight = observed(order)
    random.Random(1).shuffle(order)
    assert observed(order) == straight


def test_number_of_drawn_rows_is_what_a_source_offers() -> None:
    data = draw(Blend("b", [Source(drawn=True)], samples=2, mode="template"), TEKKEN)
    (split,) = data.provenance["members"][0]["splits"]
    assert split["read"]["rows"] == NUM_DRAWN
