"""Clipped activations are counted as their codes say, text and image rows apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_emulation import PAGE, make_step, new_cache, put, use_emulation
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.generate import generate
from halfbyte.engine.load import load_runner
from halfbyte.engine.measure import measure_costs
from halfbyte.engine.request import GenerationRequest, SamplingParams
from halfbyte.engine.runner import Runner
from halfbyte.formats.minifloat import encode_e4m3
from halfbyte.model.attention import DenseAttend
from halfbyte.model.cuda.launches import CudaModel, SharedBuffers
from halfbyte.model.cuda.load import load_cuda_weights
from halfbyte.model.cuda.prefill import Prefill
from halfbyte.model.cuda.prefill_batch import Chunk, PrefillBatch
from halfbyte.model.decoder import Step
from halfbyte.model.load import load_decoder
from halfbyte.model.rope import RotaryTable
from halfbyte.model.saturation import KINDS, SaturationCounts
from halfbyte.server.ops.metrics import Metrics
from hopper import hopper_config, uniform_recipe, write_fp8, write_mixed

CPU = torch.device("cpu")
TEXT = hopper_config(layers=2).text


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in FP8, the head as well, with input scales."""
    folder = tmp_path_factory.mktemp("saturation")
    write_fp8(folder / "fp8", hopper_config(layers=2))
    return write_mixed(folder / "out", folder / "fp8", folder, uniform_recipe("fp8", "fp8"))


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    scale=st.sampled_from([1.0, 0.02, 7.5]),
    images=st.sets(st.integers(0, 4)),
)
def test_an_activation_is_counted_if_its_code_is_the_largest(
    values: list[float], scale: float, images: set[int]
) -> None:
    row_I = torch.tensor([*values, 432.0 * scale, 431.9 * scale, -464.0 * scale]).bfloat16()
    x_TI = row_I.repeat(5, 1) * torch.tensor([1.0, 0.5, 2.0, 0.0, -1.0])[:, None].bfloat16()
    codes_TI = encode_e4m3(x_TI.float() / scale).view(torch.uint8) & 0x7F
    wanted_T = (codes_TI == 0x7E).sum(-1)
    is_image_T = torch.tensor([row in images for row in range(5)])
    counts = SaturationCounts(CPU)
    counts.begin(5, torch.tensor(sorted(images), dtype=torch.int64), None)
    counts.add("o", x_TI, scale)
    assert counts.of("o").tolist() == [
        [int(wanted_T[~is_image_T].sum()), int((~is_image_T).sum()) * x_TI.shape[1]],
        [int(wanted_T[is_image_T].sum()), int(is_image_T.sum()) * x_TI.shape[1]],
    ]
    again = SaturationCounts(CPU)
    again.add_codes("o", encode_e4m3(x_TI.float() / scale))
    assert again.of("o")[0].tolist() == [int(wanted_T.sum()), x_TI.numel()]


def widths() -> dict[str, int]:
    heads = TEXT.num_heads * TEXT.head_dim
    two = TEXT.num_layers
    sizes = {"qkv": TEXT.width * two, "o": heads * two, "gate_up": TEXT.width * two}
    return {**sizes, "down": TEXT.mlp_width * two, "head": TEXT.width}


def test_a_decoder_counts_rows_of_images_apart(fp8: Path) -> None:
    counts = SaturationCounts(CPU)
    decoder = load_decoder(Checkpoint.open(fp8), mode="fp8_declared", saturation=counts)
    plain = load_decoder(Checkpoint.open(fp8), mode="fp8_declared")
    count, images = 9, torch.tensor([2, 3, 4])
    # Pictures a hundred times as large as words.
    vectors_ID = 100.0 * torch.randn(3, TEXT.width, generator=torch.Generator().manual_seed(0))
    ids_T, rows_R = torch.arange(count) + 5, torch.tensor([3, 8])

    def logits(model: Any) -> torch.Tensor:
        attend = DenseAttend((0, count), model.kv_scales)
        step = Step(ids_T, torch.arange(count), attend, rows_R, images, vectors_ID.bfloat16())
        found: torch.Tensor = model(step)
        return found

    counts.begin(count, images, rows_R)
    assert torch.equal(logits(decoder), logits(plain))
    for kind, width in widths().items():
        text, image = counts.of(kind).tolist()
        rows = (1, 1) if kind == "head" else (6, 3)
        assert (text[1], image[1]) == (rows[0] * width, rows[1] * width), kind
        assert 0 <= text[0] < text[1] and 0 <= image[0] < image[1]


def test_decode_steps_and_prompts_count_what_a_cpu_counts(
    fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated launches: the same codes, so the same counts but for ties; padding rows not."""
    checkpoint = Checkpoint.open(fp8)
    library, weights = use_emulation(monkeypatch), load_cuda_weights(checkpoint, CPU)
    counts, cache = SaturationCounts(CPU), new_cache(TEXT, 2)
    for part in (*cache.keys, *cache.values):
        part.zero_()  # a row of padding reads what nobody has written
    step = make_step(library, weights, cache, 2, saturation=counts)
    tokens = torch.tensor([[5, 9], [7, 11], [400, 2]])
    with torch.inference_mode():
        for position in range(3):
            put(step, tokens[position], position)
            step.slots_T[1] = -1  # a row of padding
            step.is_image_T[0] = int(position == 1)
            step.run()
    for kind, width in widths().items():
        text, image = counts.of(kind).tolist()
        assert (text[1], image[1]) == (2 * width, width), kind

    counts = SaturationCounts(CPU)
    rotary = RotaryTable(TEXT, CPU).at
    model = CudaModel(library, weights, cache, rotary, SharedBuffers(), None, counts)
    prefill = Prefill(model, 64)
    count, images_I = 20, torch.tensor([3, 4, 5])
    positions_T = torch.arange(count)
    slots_T = step.block_table_TP[0].long()[positions_T // PAGE] * PAGE + positions_T % PAGE
    chunk = Chunk(0, count, 0, step.block_table_TP[0])
    vectors_ID = 30.0 * torch.randn(3, TEXT.width, generator=torch.Generator().manual_seed(1))
    ids_T = positions_T + 3
    with torch.inference_mode():
        prefill.forward(
            PrefillBatch(ids_T, positions_T, slots_T, (chunk,), None, images_I, vectors_ID)
        )
    theirs = SaturationCounts(CPU)
    decoder = load_decoder(checkpoint, mode="fp8_declared", saturation=theirs)
    theirs.begin(count, images_I, None)
    attend = DenseAttend((0, count), decoder.kv_scales)
    decoder(Step(ids_T, positions_T, attend, None, images_I, vectors_ID.bfloat16()))
    for kind in KINDS[:-1]:
        found, wanted = counts.of(kind), theirs.of(kind)
        assert torch.equal(found[:, 1], wanted[:, 1]), kind
        assert bool(((found[:, 0] - wanted[:, 0]).abs() <= 3 + 0.02 * found[:, 1]).all()), kind


def test_an_engine_tells_metrics_where_it_was_told_to_count(fp8: Path) -> None:
    def stats(**options: Any) -> Any:
        config = EngineConfig(
            max_model_len=64, kv_cache_tokens=256, mode="fp8_declared", max_sequences=4, **options
        )
        engine = Engine.load(fp8, config)
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        generate(engine, [GenerationRequest("a", (5, 6, 7), params)])
        return engine.stats()

    assert stats().saturation == ()
    assert all(every == 0 for *_, every in stats(
        count_saturation=True, fp8_activations="per-token").saturation)  # fmt: skip
    saturation = stats(count_saturation=True).saturation
    rows = {(linear, rows): every for linear, rows, _, every in saturation}
    # Three of the prompt, three answers that were read again.
    assert rows["qkv", "text"] == 6 * widths()["qkv"] and rows["qkv", "image"] == 0
    text = Metrics().text({}, {}, "m", saturation=saturation)
    every = 6.0 * widths()["down"]
    name = "halfbyte_engine_rounded_activations_total"
    assert f'{name}{{linear="down",rows="text"}} {every}' in text
    assert 'halfbyte_engine_saturated_activations_total{linear="o",rows="image"} 0.0' in text
    assert "saturated" not in Metrics().text({}, {}, "m")


def test_steps_that_are_only_measured_are_not_counted(
    fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        max_model_len=64, kv_cache_tokens=64, mode="fp8_declared", count_saturation=True
    )
    runner, resolved = load_runner(fp8, config)
    monkeypatch.setattr(Runner, "step_sizes", (1, 2, 4))  # those of a device that has graphs
    measure_costs(runner, resolved)
    assert {every for *_, every in runner.saturation()} == {0}
