"""Where a checkpoint serves: the 128B model's numbers by hand, and what must hold for any."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from halfbyte.config import ModelConfig, RopeConfig, TextConfig, VisionConfig
from halfbyte.errors import UsageError
from halfbyte.quantize import hosting
from halfbyte.quantize.capacity import output_bytes
from halfbyte.quantize.hosting import (
    GPUS,
    host,
    host_here,
    host_on,
    kv_token_bytes,
    quantizing_time,
    step_bytes,
)
from halfbyte.quantize.plan_text import format_hosting, format_quantizing
from halfbyte.recipe.plan import Plan, make_plan, plan_size
from halfbyte.recipe.schema import load_recipe

TEXT = TextConfig(
    num_layers=88,
    width=12288,
    num_heads=96,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=28672,
    vocab_size=131072,
    norm_eps=1e-5,
    max_positions=262144,
    rope=RopeConfig(theta=1e6),
    tied_head=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=11,
)
VISION = VisionConfig(
    num_layers=48,
    width=1664,
    num_heads=16,
    head_dim=104,
    mlp_width=8192,
    patch_size=14,
    image_size=1540,
    num_channels=3,
    rope_theta=1e4,
    norm_eps=1e-5,
    activation="silu",
    spatial_merge_size=2,
    projector_activation="gelu",
    projector_bias=False,
    image_token_id=10,
    feature_layer=-1,
)
MEDIUM = ModelConfig(TEXT, VISION)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_recipe("medium-3.5"), MEDIUM)


def test_a_token_of_the_128b_model_takes_180224_bytes(plan: Plan) -> None:
    assert kv_token_bytes(plan, TEXT) == 180_224
    bf16 = replace(plan, kv_cache="bf16")
    assert kv_token_bytes(bf16, TEXT) == 2 * 180_224


def test_one_h200_holds_the_weights_and_not_much_more(plan: Plan) -> None:
    (one,) = host(plan, MEDIUM, context=100_000, requests=4, gpus=["h200"], widths=[1])
    assert one.weight_bytes == plan_size(plan, MEDIUM).num_bytes
    # 0.9 x 150.76 GB less 95.22 GB of weights leaves about 40 GB less one step's activations.
    assert 200_000 < one.kv_tokens < (0.9 * 143771 * 2**20 - 95.22e9) / 180_224
    assert one.full_requests == one.kv_tokens // 100_000 == 2
    assert one.tokens_per_request == one.kv_tokens // 4


def test_ranks_hold_what_is_split_once_and_the_rest_each(plan: Plan) -> None:
    widths = [1, 2, 4, 8, 16]
    ranks = host(plan, MEDIUM, context=1000, requests=1, gpus=["b200"], widths=widths)
    whole = plan_size(plan, MEDIUM).num_bytes
    for tp, rank in zip(widths, ranks, strict=True):
        assert rank.weight_bytes * tp >= whole
        assert rank.kv_token_bytes == 180_224 // min(tp, 8)
    # Eight KV heads over sixteen ranks: keys' and values' weights are there twice.
    assert ranks[4].weight_bytes * 16 > ranks[3].weight_bytes * 8


@pytest.mark.parametrize(("tp", "said"), [(3, "KV heads"), (5, "query heads"), (64, "query heads")])
def test_widths_that_do_not_divide_the_model_are_refused(plan: Plan, tp: int, said: str) -> None:
    (rank,) = host(plan, MEDIUM, context=1000, requests=1, gpus=["h200"], widths=[tp])
    assert rank.problem is not None and said in rank.problem
    assert rank.full_requests == 0


def test_nvfp4_blocks_must_stay_whole(plan: Plan) -> None:
    # 19 blocks of 16 cannot be shared by two.
    odd = ModelConfig(replace(TEXT, mlp_width=304), None)
    small = make_plan(load_recipe("medium-3.5"), odd)
    (rank,) = host(small, odd, context=1000, requests=1, gpus=["h200"], widths=[2])
    assert rank.problem is not None and "not a multiple of 16" in rank.problem


def test_more_memory_never_serves_less(plan: Plan) -> None:
    gpus = sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes)
    for tp in (1, 2, 4, 8):
        tokens = [
            host_on(gpu, tp, plan, MEDIUM, context=1000, requests=2).kv_tokens for gpu in gpus
        ]
        assert tokens == sorted(tokens)


def test_the_fewest_gpus_that_serve_are_found(plan: Plan) -> None:
    found = {x.gpu: x for x in host(plan, MEDIUM, context=262_144, requests=2)}
    assert found["h200"].tp == 2 and found["h100"].tp == 4
    for one in found.values():
        assert one.full_requests >= 2
        fewer = host_on(GPUS[one.gpu], one.tp // 2 or 1, plan, MEDIUM, context=262_144, requests=2)
        assert one.tp == 1 or fewer.full_requests < 2


def test_mistakes_are_named(plan: Plan) -> None:
    with pytest.raises(UsageError, match="262144 positions"):
        host(plan, MEDIUM, context=300_000, requests=1)
    with pytest.raises(UsageError, match="h300: there are"):
        host(plan, MEDIUM, context=1000, requests=1, gpus=["h300"])


def test_the_table_says_yes_no_and_how_much(plan: Plan) -> None:
    hosted = host(plan, MEDIUM, context=262_144, requests=8, gpus=["h200"], widths=[1, 2, 8])
    hosted.append(host_here(24 * 10**9, plan, MEDIUM, context=262_144, requests=8))
    lines = format_hosting(hosted).splitlines()
    assert "no: one request of 262,144 tokens does not fit the cache" in lines[2]
    assert "8 at once have" in lines[3]
    assert "8 of 8 " in lines[4] and "yes; NVFP4 weights decoded" in lines[4]
    assert "24.0 GB of memory are available" in lines[5]


def test_the_output_of_the_128b_model_is_known_to_the_byte(plan: Plan) -> None:
    assert sum(output_bytes(plan, MEDIUM).values()) == 95_224_810_496


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_step_keeps_what_its_widest_point_needs(tp: int) -> None:
    """By hand: residual and normed copy, gate, up and product in bf16, f32 sums of gate and up."""
    text = replace(TEXT, width=1000, mlp_width=4000, vocab_size=100)
    by_hand = 8 * (2 * 2 * 1000 + 3 * 2 * 4000 // tp + 2 * 4 * 4000 // tp) + 2 * 3 * 4 * 100
    assert hosting._step_bytes(text, tp, 8, 3) == by_hand


def test_memory_of_cards_is_what_their_makers_say() -> None:
    """Within the few percent that error correction and the driver keep for themselves."""
    gigabytes = {"a100": 80, "l40s": 48, "h100": 80, "h200": 141, "rtx-pro-6000": 96, "b200": 180}
    assert set(GPUS) == set(gigabytes)
    for name, gpu in GPUS.items():
        assert 0.93 * gigabytes[name] <= gpu.memory_bytes / 1024**3 <= 1.02 * gigabytes[name], name


def test_no_cache_is_left_and_none_is_negative(plan: Plan) -> None:
    (small,) = host(plan, MEDIUM, context=1000, requests=1, gpus=["l40s"], widths=[1])
    assert small.kv_tokens == 0
    assert small.problem is not None and "weights and working memory take" in small.problem


RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"


def _figures(record: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((RECORDS / f"{record}.json").read_text())["figures"]
    return found


def test_a_model_that_was_measured_is_told_as_measured(plan: Plan) -> None:
    assert step_bytes(plan, MEDIUM) == pytest.approx(hosting.RECORDED_STEP_BYTES, rel=0.01)
    step = next(
        x for x in _figures("engine-h200") if x["name"] == "decode step" and x["is_headline"]
    )
    assert step["value"] == pytest.approx(hosting.RECORDED_STEP_MS, rel=1e-3)
    (one,) = host(plan, MEDIUM, context=1000, requests=1, gpus=["h200"], widths=[1])
    assert one.speed_basis == "measured" and one.tokens_per_s == pytest.approx(46.4, abs=0.1)


def test_computed_speeds_agree_with_what_was_measured_elsewhere(plan: Plan) -> None:
    """60 layers on an H100, and two of them against one: records that no constant is taken from."""
    sixty = ModelConfig(replace(TEXT, num_layers=60), None)
    (one,) = host(
        make_plan(load_recipe("medium-3.5"), sixty),
        sixty, context=1000, requests=1, gpus=["h100"], widths=[1],
    )  # fmt: skip
    step = next(x for x in _figures("engine-h100") if x["conditions"] == {
        "layers": 60, "products": "exact", "batch": 1, "context": 128})  # fmt: skip
    assert one.speed_basis == "computed" and one.tokens_per_s is not None
    assert 1000 / one.tokens_per_s == pytest.approx(step["value"], rel=0.1)
    pair = next(x for x in _figures("tensor_parallel_gpu") if x["name"] == "decode step")
    against = pair["against"]
    assert isinstance(against, list) and isinstance(pair["value"], float)
    assert against[0]["value"] / pair["value"] / 2 == pytest.approx(hosting.SPLIT_GAIN, rel=1e-3)


def test_more_gpus_are_faster_but_not_by_their_number(plan: Plan) -> None:
    ranks = host(plan, MEDIUM, context=1000, requests=1, gpus=["b200"], widths=[1, 2, 4, 8])
    speeds = [x.tokens_per_s or 0 for x in ranks]
    assert speeds == sorted(speeds)
    assert all(b < 2 * a for a, b in pairwise(speeds))


def test_quantizing_the_128b_model_takes_what_the_record_projects(plan: Plan) -> None:
    output = sum(output_bytes(plan, MEDIUM).values())
    tokens = 128 * 2048
    moved = 2 * 128 * 10**9 + output + 88 * tokens * TEXT.width * 2
    times = {
        name: quantizing_time(
            GPUS[name], MEDIUM, num_tokens=tokens, longest_row=2048, moved_bytes=moved
        )
        for name in GPUS
    }
    projected = next(
        x for x in _figures("quantize_gpu") if x["name"] == "quantizing the model on a GPU"
    )
    assert times["h100"].seconds / 60 == pytest.approx(projected["value"], rel=0.35)
    assert times["b200"].seconds <= times["h100"].seconds <= times["l40s"].seconds
    slow = quantizing_time(
        GPUS["b200"], MEDIUM, num_tokens=tokens, longest_row=2048, moved_bytes=moved,
        disk_bytes_per_s=2e8,
    )  # fmt: skip
    assert slow.seconds > moved / 2e8
    said = format_quantizing(list(times.values()), price_per_hour=2.0)
    assert "computed" in said and len(said.splitlines()) == 1 + len(GPUS)


def test_why_fewer_gpus_do_not_do_is_said(plan: Plan) -> None:
    found = host(plan, MEDIUM, context=262_144, requests=2)
    for one in found:
        assert (one.why_not_fewer is None) == (one.tp == 1)
    said = format_hosting(found, price_per_hour=3.0)
    assert "1 would not do: one request of 262,144 tokens does not fit the cache" in said
    assert "an hour" in said and "12.00" in said
    crowd = host(plan, MEDIUM, context=100_000, requests=4, gpus=["h200"])
    assert crowd[0].why_not_fewer == "only 2 of 4 requests of 100,000 tokens fit the cache"
