"""What the engine on a Hopper GPU must do, as functions and as a script; no pytest needed.

    python tests/cuda_checks.py checkpoints DIR            small checkpoints, made on any machine
    python tests/cuda_checks.py expect MODEL OUT.json      a real model's answers, on the CPU
    HALFBYTE_KERNELS=reference python tests/cuda_checks.py score MODEL OUT.json OTHER.json
                                                           what other CPU kernels make of them
    python tests/cuda_checks.py run DIR                    every check, on a GPU
    python tests/cuda_checks.py compare MODEL OUT.json OTHER.json
                                                           a real model against both, on a GPU
    python tests/cuda_checks.py fast MODEL                 mode "fast" against "exact", on a GPU
    python tests/cuda_checks.py vision                     the image encoder, on a GPU

`engine/test_cuda_engine.py` runs the checks under pytest.
"""

import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.cache import PagedCache
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.generate import generate
from halfbyte.engine.graphs import HopperExecutor
from halfbyte.engine.hopper import HopperDevice
from halfbyte.engine.plain import PlainDraft
from halfbyte.engine.request import GenerationRequest, ImageInput, SamplingParams
from halfbyte.engine.runner import Computed
from halfbyte.kernels import dispatch
from halfbyte.model.cuda.load import load_cuda_weights
from halfbyte.model.cuda.weights import Products

# How far apart the CPU's two best log-probs may lie where the GPU takes the other one, and how far
# all logits of a text, relative. Rounding activations to FP8 makes a step of 2**-4 of a difference
# of 2**-9, and random layers amplify it: the C and the torch kernels of a CPU differ by 0.13
# on this mixed checkpoint, by 0.024 on the bf16 one. Logits have a deviation of 1, a gap of two
# moves by 2**0.5 times that; three such deviations.
NEAR_TIE = {"mixed": 0.56, "fp8": 0.56, "nvfp4": 0.56, "fp8-head": 0.56, "bf16": 0.11}
RELATIVE = {"mixed": 0.2, "fp8": 0.2, "nvfp4": 0.2, "fp8-head": 0.2, "bf16": 0.04}
# Options that a CPU must be given, too, to compute the same.
NUMERICS = ("fp8_activations",)
# Tokens of a place that are followed from one computation to the next.
CONTENDERS = 16
SMALL: dict[str, Any] = {
    "max_model_len": 512,
    "kv_cache_tokens": 8192,
    "mode": "fp8_declared",
    "target_gap_ms": "none",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
Images = Sequence[tuple[int, tuple[ImageInput, ...]]]
LENGTHS = (1, 2, 15, 16, 17, 31, 64, 100, 128, 129, 200, 333)


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens below 512."""
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = torch.randint(3, 512, (length,), generator=generator).tolist()
    return token_ids


def request(
    request_id: str,
    prompt: Sequence[int],
    params: SamplingParams,
    images: tuple[ImageInput, ...] = (),
) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(prompt), params, images=images)


def load(directory: Path, device: str = "cuda", **options: Any) -> Engine:
    """An engine with small limits; on the CPU in what the kernels compute."""
    defaults: dict[str, Any] = {**SMALL, "kv_cache": "fp8", "device": device}
    return Engine.load(directory, replace(EngineConfig(), **(defaults | options)))


def answers(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams = GREEDY,
    images: Images = (),
) -> list[list[int]]:
    """Tokens of prompts that arrive together; `images` of some, by their number."""
    seen = dict(images)
    found = generate(
        engine,
        (
            request(str(index), prompt, params, seen.get(index, ()))
            for index, prompt in enumerate(prompts)
        ),
    )
    engine.check()
    return [answer.token_ids for answer in found.values()]


def answers_with_gaps(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    images: Images = (),
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens, and how far the two best log-probs of each lie apart."""
    seen, wanted = dict(images), replace(params, logprobs=2)
    found = generate(
        engine,
        (
            request(str(index), prompt, wanted, seen.get(index, ()))
            for index, prompt in enumerate(prompts)
        ),
    ).values()
    gaps = [[one.top[0][1] - one.top[1][1] for one in answer.logprobs] for answer in found]
    return [answer.token_ids for answer in found], gaps


def count_differences(
    found: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float]],
    near_tie: float,
) -> dict[str, Any]:
    """Answers that are equal, that part at a near tie, and that part elsewhere."""
    equal, parted = 0, []
    for ours, theirs, gap in zip(found, wanted, gaps, strict=True):
        assert len(ours) == len(theirs)
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is None:
            equal += 1
        else:
            parted.append(gap[first])
    return {
        "prompts": len(found),
        "equal": equal,
        "near_ties": sum(gap <= near_tie for gap in parted),
        "others": sum(gap > near_tie for gap in parted),
        "largest_gap": max(parted, default=0.0),
        "gaps": sorted(parted),
    }


def device_of(engine: Engine) -> HopperDevice:
    device = engine._runner.device
    assert isinstance(device, HopperDevice), "the engine does not use the kernels"
    return device


def executor_of(engine: Engine) -> HopperExecutor:
    """What computes the engine's rows; fails if it runs on plain ops."""
    executor = device_of(engine).executor
    assert isinstance(executor, HopperExecutor)
    return executor


def check_weights_are_the_same(directory: Path, mode: Products = "exact") -> str:
    """Tiled on the GPU or on the CPU: the same bytes."""
    checkpoint = Checkpoint.open(directory)
    ours = load_cuda_weights(checkpoint, torch.device("cuda", 0), mode=mode)
    theirs = load_cuda_weights(checkpoint, torch.device("cpu"), mode=mode)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            x, y = getattr(a, name), getattr(b, name)
            assert torch.equal(x.weight.data.cpu(), y.weight.data), name
            assert torch.equal(x.weight.row_scale_O.cpu(), y.weight.row_scale_O), name
            assert x.input_scale == y.input_scale
    assert torch.equal(ours.head.weight.data.cpu(), theirs.head.weight.data)
    assert ours.head.input_scale == theirs.head.input_scale
    return f"{len(ours.layers)} layers"


@torch.inference_mode()
def check_graph_equals_eager(directory: Path, **options: Any) -> str:
    """Every size: replayed, launched eagerly, and on a cache of NaN where nothing was written."""
    engine = load(directory, **options)
    answers(engine, [prompt_of(length, length) for length in LENGTHS])
    executor, cache = executor_of(engine), device_of(engine).cache
    generator = torch.Generator().manual_seed(1)
    for size in executor.sizes:
        inputs = executor.inputs.packed_5T
        inputs[0, :size] = torch.randint(3, 512, (size,), generator=generator)
        inputs[1, :size] = -1
        inputs[2, :size] = torch.randint(0, 40, (size,), generator=generator)
        inputs[3, :size] = -1
        inputs[4, :size] = torch.randint(0, 8, (size,), generator=generator)
        replayed = executor.replay(size).clone()
        again = executor.replay(size).clone()
        eager = executor.run_eagerly(size).clone()
        assert bool(torch.isfinite(replayed).all()), size
        assert torch.equal(replayed, again), size
        assert torch.equal(replayed, eager), size
    for pair in cache.layers:
        for pages in pair:
            pages.view(torch.uint8).fill_(0x7F)
    engine.clear_prefix_cache()
    tokens = answers(engine, [prompt_of(length, length) for length in LENGTHS])
    assert all(len(answer) == GREEDY.max_tokens for answer in tokens), (
        "something unwritten was read"
    )
    return f"sizes {executor.sizes}"


def check_tokens_are_those_of_the_cpu(directory: Path, **options: Any) -> dict[str, Any]:
    """Greedy answers, prompts shorter and longer than a graph, chunks, found prefixes."""
    prompts = [prompt_of(length, length) for length in LENGTHS]
    prompts += [[*prompt_of(333, 333)[:n], 7, 8, 9] for n in (100, 160, 320)]
    numerics = {key: options[key] for key in NUMERICS if key in options}
    wanted, gaps = answers_with_gaps(load(directory, "cpu", **numerics), prompts, GREEDY)
    engine = load(directory, **options)
    near_tie = NEAR_TIE[directory.name]
    counts = count_differences(answers(engine, prompts), wanted, gaps, near_tie)
    again = count_differences(answers(engine, prompts), wanted, gaps, near_tie)
    assert counts["others"] == 0 and again["others"] == 0, (counts, again)
    device = device_of(engine)
    counts["replays"], counts["prefills"] = device.num_replays, device.num_prefills
    del counts["gaps"]
    return counts


def check_scores_are_those_of_the_cpu(directory: Path, **options: Any) -> str:
    """Logits of a text in chunks through graphs, and through products for many rows."""
    text = prompt_of(400, 4)
    wanted = torch.cat(list(load(directory, "cpu", **options).score(text, 400)))
    engine = load(directory, **options)
    largest = []
    for chunk in (100, 400, 150):
        found = torch.cat(list(engine.score(text, chunk))).cpu()
        largest.append(float((found - wanted).norm() / wanted.norm()))
        assert largest[-1] < RELATIVE[directory.name], (chunk, largest)
    return f"relative errors {[f'{x:.4f}' for x in largest]}"


def check_saturation_is_counted(directory: Path) -> str:
    """Every kind's activations are counted, as many as on the CPU, and as many of them clipped."""
    found = []
    for device in ("cpu", "cuda"):
        engine = load(directory, device, count_saturation=True)
        for length in (5, 150, 400):  # a graph, a graph or a prefill, a prefill
            list(engine.score(prompt_of(length, length), 400))
        time.sleep(1.1)  # counts are read once a second
        found.append({(kind, rows): both for kind, rows, *both in engine.stats().saturation})
    ours, theirs = found
    for key, (clipped, every) in ours.items():
        assert theirs[key][1] == every, (key, ours, theirs)
        assert abs(theirs[key][0] - clipped) <= 5 + 0.02 * every, (key, ours, theirs)
    assert ours["qkv", "text"][1] > 0
    return f"{theirs}"


def check_two_runs_are_identical(directory: Path, **options: Any) -> str:
    prompts = [prompt_of(length, length) for length in LENGTHS]
    sampled = SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=24, ignore_eos=True)
    for params in (GREEDY, sampled):
        runs = [answers(load(directory, **options), prompts, params) for _ in range(2)]
        assert runs[0] == runs[1]
    return f"{len(prompts)} prompts, greedy and sampled"


def check_device_and_host_choose_alike(directory: Path) -> str:
    """The same request chosen on the device and, because log-probs are asked for, by the host."""
    prompts = [prompt_of(20, seed) for seed in range(12)]
    for params in (
        GREEDY,
        SamplingParams(temperature=0.9, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.9, top_p=0.8, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.9, top_k=9, min_p=0.02, seed=3, max_tokens=24),
        SamplingParams(temperature=0.7, banned_token_ids=tuple(range(99)), seed=1, max_tokens=24),
    ):
        device = answers(load(directory), prompts, params)
        host = answers(load(directory), prompts, replace(params, logprobs=0))
        assert device == host, params
    return "5 kinds of request"


def check_masks_are_those_of_the_cpu(directory: Path) -> str:
    """Logits on the device, closed by bits that the host wrote."""
    del directory
    generator = torch.Generator().manual_seed(6)
    sizes = (1, 31, 33, 1000, 131072)
    for size in sizes:
        words = torch.randint(
            -(2**31), 2**31, (-(-size // 32),), dtype=torch.int32, generator=generator
        )
        wanted = torch.randn(size, generator=generator)
        found = wanted.cuda()
        dispatch.mask_logits(wanted, words)
        dispatch.mask_logits(found, words)
        assert torch.equal(found.cpu(), wanted), size
    return f"{len(sizes)} vocabularies"


def check_deterministic(directory: Path, **options: Any) -> str:
    """A prompt's tokens and log-probs, bit for bit, alone and in company."""
    prompts = [prompt_of(length, length) for length in LENGTHS]
    params = replace(GREEDY, logprobs=1)
    alone: list[Any] = []
    engine = load(directory, deterministic=True, **options)

    def run(batch: Sequence[Sequence[int]]) -> list[list[float]]:
        engine.clear_prefix_cache()
        found = generate(engine, (request(str(i), ids, params) for i, ids in enumerate(batch)))
        return [
            [number for one in answer.logprobs for number in (float(one.token_id), one.logprob)]
            for answer in found.values()
        ]

    for prompt in prompts:
        alone += run([prompt])
    together = run([*prompts, *(prompt_of(50 + i, 1000 + i) for i in range(40))])
    same = [a[::2] == b[::2] for a, b in zip(alone, together[: len(prompts)], strict=True)]
    assert all(same), same
    exact = sum(a == b for a, b in zip(alone, together[: len(prompts)], strict=True))
    return f"{len(prompts)} prompts alone and among 52; log-probs identical in {exact}"


def check_images(directory: Path, **options: Any) -> dict[str, Any]:
    """Answers about pictures, among others, through graphs and prefills, also found again."""
    prompts: list[list[int]] = []
    images: list[tuple[int, tuple[ImageInput, ...]]] = []
    generator = torch.Generator().manual_seed(8)
    for index, length in enumerate((9, 30, 40, 70, 200)):
        text = [token for token in prompt_of(length, index) if token not in (10, 12, 13)]
        if index == 1:
            prompts.append(text)
            continue
        rows, columns = 2 + index, 3 + index
        size = 3, rows * 28, columns * 28
        pixels = torch.randint(256, size, dtype=torch.uint8, generator=generator).numpy()
        layout = [*([10] * columns + [12]) * rows]
        layout[-1] = 13
        prompts.append([*text[:5], *layout, *text[5:]])
        images.append((index, (ImageInput.of(pixels, 5, len(layout)),)))
    # Pictures go through a tower, too, that rounds to bf16 in an order of its own: over four sets
    # of prompts the largest gap was 0.14.
    near_tie = 2 * NEAR_TIE["bf16"]
    wanted, gaps = answers_with_gaps(load(directory, "cpu"), prompts, GREEDY, images)
    blind = answers(load(directory, "cpu"), prompts)
    assert sum(a != b for a, b in zip(blind, wanted, strict=True)) >= 3, "pictures change nothing"
    engine = load(directory, **options)
    counts: dict[str, Any] = {}
    for turn in ("first", "again"):
        counts = count_differences(answers(engine, prompts, GREEDY, images), wanted, gaps, near_tie)
        assert counts["others"] == 0, (turn, counts)
    # Alone each is a graph's rows, together they are a prefill's.
    engine.clear_prefix_cache()
    for index, seen in images:
        found = answers(engine, [prompts[index]], GREEDY, [(0, seen)])
        alone = count_differences(found, [wanted[index]], [gaps[index]], near_tie)
        assert alone["others"] == 0, (index, alone)
    device = device_of(engine)
    counts["replays"], counts["prefills"] = device.num_replays, device.num_prefills
    assert engine.stats().cached_tokens > 0
    del counts["gaps"]
    return counts


def check_draft_model(directory: Path, head: str) -> str:
    """What a draft model makes of given states beside the CPU; answers with and without it."""
    drafts: dict[str, Any] = {
        "speculative": str(directory.parent / head),
        "adaptive_speculation": False,
    }

    def force(_: GenerationRequest, known: Sequence[int], logits_V: torch.Tensor) -> None:
        # The same tokens on both, or guesses cannot be compared.
        logits_V[len(known) % 300 + 5] = 1e4

    def start(device: str) -> Engine:
        config: dict[str, Any] = {**SMALL, "kv_cache": "fp8", "device": device, **drafts}
        engine = Engine.load(directory, replace(EngineConfig(), **config), logits_hook=force)
        assert engine._drafter is not None
        if isinstance(engine._drafter.model, PlainDraft):
            # As the kernels keep them.
            cache = engine._drafter.model.cache
            engine._drafter.model.cache = PagedCache(
                Checkpoint.open_eagle(directory.parent / head).config.text,
                format="fp8",
                num_pages=cache.num_pages,
                block_tokens=cache.block_tokens,
                kv_scales=[(1.0, 1.0)] * 2,
            )
        return engine

    def guessed(
        engine: Engine, lengths: Sequence[int], given: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What comes behind some prompts, then behind forced guesses; from the states that are
        `given`, or the engine's own, which are then added there.
        """
        drafter = engine._drafter
        assert drafter is not None
        states = iter(list(given))
        follow = drafter.follow

        def noted(found: Sequence[Computed]) -> None:
            (one,) = found
            assert one.hidden_TD is not None
            taken = next(states, None)
            if taken is None:
                given.append(one.hidden_TD.clone())
            else:
                error = relative(one.hidden_TD.cpu(), taken)
                assert error < RELATIVE[directory.name], (lengths, error)
                one = one._replace(hidden_TD=taken.to(one.hidden_TD.device))
            follow([one])

        engine.clear_prefix_cache()
        for length in lengths:
            engine.add(request(f"p{length}", prompt_of(length, length), GREEDY))
        drafter.follow = noted  # type: ignore[method-assign]
        engine.step()
        drafter.follow = follow  # type: ignore[method-assign]
        assert drafter._last is not None
        sequences = list(engine._scheduler.running)
        assert [s.num_generated for s in sequences] == [1] * len(lengths)
        for sequence in sequences:
            engine._scheduler.reserve(sequence, 4)
        last = drafter._last
        found = []
        for ahead in range(4):
            logits_RV = drafter.model.logits(last.hidden_RD)
            if last.logits_RV is not None:
                assert relative(last.logits_RV, logits_RV) < 1e-3, "a graph has another head"
            found += [last.hidden_RD.float().cpu(), logits_RV.cpu()]
            ids = [(17 * ahead + i) % 500 + 5 for i in range(len(lengths))]
            last = drafter._extend(sequences, ids, last.hidden_RD, ahead + 1)
        for length in lengths:
            engine.abort(f"p{length}")
        engine.check()
        return found

    cpu, gpu = (start(device) for device in ("cpu", "cuda"))
    draft = device_of(gpu).draft
    assert draft is not None and isinstance(draft.executor, HopperExecutor)
    largest: list[float] = []
    for lengths in ((33,), (99,), (333,), (20, 37, 260), tuple(range(17, 117, 4))):
        given: list[torch.Tensor] = []
        wanted, found = (guessed(engine, lengths, given) for engine in (cpu, gpu))
        errors = [relative(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
        largest = [max(pair) for pair in zip(errors, largest or errors, strict=True)]
    # Two layers where the bound is for six; four times over, as a guess goes on from a guess.
    assert max(largest) < RELATIVE[directory.name] * (2 / 6 * 4) ** 0.5, largest
    prompts = [prompt_of(length, length) for length in LENGTHS]
    prompts += [prompt_of(40, 3)[:20] * 5]
    plain = answers(load(directory, deterministic=True), prompts)
    engine = load(directory, deterministic=True, **drafts)
    assert answers(engine, prompts) == plain
    stats = engine.stats()
    assert stats.proposed_tokens > 0
    return (
        f"relative errors {[f'{x:.4f}' for x in largest]} of states and logits, guess by guess; "
        f"{len(prompts)} answers the same with {stats.proposed_tokens} guesses, "
        f"{stats.accepted_tokens} right"
    )


def check_lookup(directory: Path) -> str:
    """Guesses from the text itself: the same answers, bit for bit, some of the guesses right."""
    few = tuple(token for token in range(515) if token not in (5, 6, 7))
    prompts = [[5, 6, 7, 5, 7, 6, 6, 5] * 5, [7, 6] * 70, [5] * 9]
    counts = []
    for params in (
        replace(GREEDY, banned_token_ids=few),
        SamplingParams(temperature=0.8, seed=3, max_tokens=24, banned_token_ids=few),
    ):
        plain = answers(load(directory, deterministic=True), prompts, params)
        engine = load(
            directory, deterministic=True, speculative="ngram", adaptive_speculation=False
        )
        assert answers(engine, prompts, params) == plain, params
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.proposed_tokens
        counts.append(f"{stats.accepted_tokens} of {stats.proposed_tokens}")
    return f"guesses right: {', '.join(counts)}"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference, as a share of the norm."""
    return float((found - wanted).float().norm() / wanted.float().norm())


CHECKS: tuple[tuple[str, Callable[..., Any], dict[str, Any]], ...] = (
    ("mixed", check_weights_are_the_same, {}),
    ("mixed", check_graph_equals_eager, {}),
    ("mixed", check_scores_are_those_of_the_cpu, {}),
    ("bf16", check_scores_are_those_of_the_cpu, {}),
    ("mixed", check_tokens_are_those_of_the_cpu, {}),
    ("mixed", check_tokens_are_those_of_the_cpu, {"max_batch_tokens": 64}),
    ("fp8", check_tokens_are_those_of_the_cpu, {}),
    ("bf16", check_tokens_are_those_of_the_cpu, {}),
    ("mixed", check_two_runs_are_identical, {}),
    ("mixed", check_device_and_host_choose_alike, {}),
    ("mixed", check_masks_are_those_of_the_cpu, {}),
    ("mixed", check_deterministic, {}),
    ("seeing", check_images, {}),
    ("seeing", check_images, {"max_batch_tokens": 64}),
    ("mixed", check_lookup, {}),
    ("mixed", check_draft_model, {"head": "eagle-fp8"}),
    ("bf16", check_draft_model, {"head": "eagle-bf16"}),
    ("nvfp4", check_weights_are_the_same, {}),
    ("nvfp4", check_graph_equals_eager, {}),
    ("nvfp4", check_scores_are_those_of_the_cpu, {}),
    ("nvfp4", check_tokens_are_those_of_the_cpu, {}),
    ("nvfp4", check_draft_model, {"head": "eagle-fp8"}),
    ("fp8-head", check_scores_are_those_of_the_cpu, {}),
    ("fp8-head", check_draft_model, {"head": "eagle-fp8"}),
    ("fp8", check_saturation_is_counted, {}),
    ("fp8-head", check_saturation_is_counted, {}),
    ("fp8-head", check_scores_are_those_of_the_cpu, {"fp8_activations": "per-token"}),
    ("mixed", check_scores_are_those_of_the_cpu, {"fp8_activations": "per-token"}),
    ("mixed", check_tokens_are_those_of_the_cpu, {"fp8_activations": "per-token"}),
    ("mixed", check_graph_equals_eager, {"fp8_activations": "per-token"}),
    ("fp8", check_tokens_are_those_of_the_cpu, {"fp8_activations": "per-token"}),
    ("mixed", check_weights_are_the_same, {"mode": "fast"}),
    ("mixed", check_graph_equals_eager, {"products": "fast"}),
    ("mixed", check_two_runs_are_identical, {"products": "fast"}),
    ("mixed", check_deterministic, {"products": "fast"}),
)


def run_checks(folder: Path) -> int:
    """Every check, the failed ones with the end of their traceback."""
    failed = 0
    for variant, check, options in CHECKS:
        start = time.perf_counter()
        try:
            result = check(folder / variant, **options)
        except Exception:
            failed += 1
            result = "FAILED " + traceback.format_exc(limit=-4)[-1500:]
        seconds = time.perf_counter() - start
        print(f"[{seconds:5.1f} s] {variant} {check.__name__} {options} {result}", flush=True)
        torch.cuda.empty_cache()
    return failed


def write_checkpoints(folder: Path) -> None:
    """The variants that `run` wants, in a geometry that the kernels take."""
    from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint, write_tiny_eagle

    sys.path.insert(0, str(Path(__file__).parent))
    from hopper import hopper_config, uniform_recipe, write_fp8, write_mixed

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_checkpoint(folder / "bf16", config=hopper_config())
    write_fp8(folder / "fp8", hopper_config())
    write_mixed(folder / "mixed", folder / "fp8", folder)
    write_mixed(folder / "nvfp4", folder / "fp8", folder, uniform_recipe("nvfp4", "nvfp4"))
    write_mixed(folder / "fp8-head", folder / "fp8", folder, uniform_recipe("fp8", "fp8"))
    seeing = replace(hopper_config(), vision=tiny_config(vision=True).vision)
    write_tiny_checkpoint(folder / "seeing", config=seeing)
    write_tiny_eagle(folder / "eagle-bf16", hopper_config())
    write_tiny_eagle(folder / "eagle-fp8", hopper_config(), dialect="mistral-fp8")


def real_prompts(model: Path, count: int = 200) -> list[list[int]]:
    """Pieces of the held-out text of 3 to 300 tokens."""
    from tokenizers import Tokenizer

    # Not through `cli.demo_steps`, which needs more packages than a machine for kernels has.
    held_out = files("halfbyte.fidelity") / "data" / "held_out.txt"
    text = held_out.read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    lengths = [3 + int(297 * (i / count) ** 3) for i in range(count)]
    step = (len(ids) - 300) // count
    return [ids[i * step : i * step + length] for i, length in enumerate(lengths)]


def forced(
    model: Path, known: dict[str, Any], device: str, **options: Any
) -> list[list[dict[str, Any]]]:
    """Log-probs at each place of the known answers, the prompt and the answer so far given.

    Of the tokens that `known["places"]` names, or of the best `CONTENDERS`; best first.
    """
    engine = load(model, device, kv_cache="auto", max_model_len=512, **options)
    found = []
    for index, (prompt, answer) in enumerate(zip(known["prompts"], known["tokens"], strict=True)):
        logits_TV = torch.cat(list(engine.score([*prompt, *answer[:-1]], 512)))
        logprobs_TV = logits_TV[len(prompt) - 1 :].log_softmax(-1)
        if "places" in known:
            tokens = torch.tensor([place["tokens"] for place in known["places"][index]])
        else:
            tokens = logprobs_TV.topk(CONTENDERS).indices
        logprobs = logprobs_TV.gather(1, tokens.to(logprobs_TV.device))
        found.append(
            [
                {"best": best, "tokens": ids, "logprobs": values}
                for best, ids, values in zip(
                    logprobs_TV.argmax(-1).tolist(),
                    tokens.tolist(),
                    logprobs.tolist(),
                    strict=True,
                )
            ]
        )
    return found


def _deviations(found: list[Any], wanted: list[Any]) -> torch.Tensor:
    """How far the contenders' log-probs moved, about their common shift: (places, CONTENDERS)."""
    a, b = (
        torch.tensor([place["logprobs"] for answer in side for place in answer], dtype=torch.double)
        for side in (found, wanted)
    )
    moved = a - b
    return moved - moved.mean(dim=1, keepdim=True)


def noise_of_gaps(found: list[Any], wanted: list[Any]) -> torch.Tensor:
    """At each place, the deviation of a difference of two log-probs between two computations."""
    moved = _deviations(found, wanted)
    return (2 * moved.square().sum(1) / (CONTENDERS - 1)).sqrt()


def flips_in_noise(
    found: list[Any], wanted: list[Any], noise: torch.Tensor
) -> tuple[dict[str, Any], list[list[float]]]:
    """Places where another token is best; each: gap, how far that gap moved, noise there.

    A flip is a tie within rounding where the gap is below twice the noise.
    """
    flips: list[list[float]] = []
    unknown = 0
    for place, (ours, theirs) in enumerate(zip(chain(*found), chain(*wanted), strict=True)):
        if ours["best"] == theirs["best"]:
            continue
        if ours["best"] not in theirs["tokens"]:
            unknown += 1
            continue
        at = theirs["tokens"].index(ours["best"])
        gap = theirs["logprobs"][0] - theirs["logprobs"][at]
        moved = gap - (ours["logprobs"][0] - ours["logprobs"][at])
        flips.append([gap, moved, float(noise[place])])
    gaps = torch.tensor([flip[0] for flip in flips] or [0.0])
    counts = {
        "places": len(noise),
        "flips": len(flips) + unknown,
        "within_twice_the_noise": sum(gap <= 2 * least for gap, _, least in flips),
        "beyond": sum(gap > 2 * least for gap, _, least in flips) + unknown,
        "largest_gap_in_noise": max((gap / least for gap, _, least in flips), default=0.0),
        "gap_median": float(gaps.median()),
        "gap_p90": float(gaps.quantile(0.9)),
        "gap_largest": float(gaps.max()),
    }
    return counts, flips


def expect(model: Path, out: Path) -> None:
    """Answers of the CPU, to be compared on a GPU, and its log-probs at each place of them."""
    prompts = real_prompts(model)
    engine = load(model, "cpu", kv_cache="auto", max_sequences=32, kv_cache_tokens=16384)
    tokens, gaps = answers_with_gaps(engine, prompts, replace(GREEDY, max_tokens=32))
    known: dict[str, Any] = {"prompts": prompts, "tokens": tokens, "gaps": gaps}
    out.write_text(json.dumps({**known, "places": forced(model, known, "cpu")}))


def score(model: Path, expected: Path, out: Path) -> None:
    """The same log-probs by whatever kernels HALFBYTE_KERNELS names."""
    known = json.loads(expected.read_text())
    out.write_text(json.dumps(forced(model, known, "cpu")))


def _part_from(
    found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], num_places: int
) -> list[int]:
    """The place, counted over all answers, of the first token that differs in each that does."""
    return [
        index * num_places + next(i for i in range(num_places) if ours[i] != theirs[i])
        for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True))
        if list(ours) != list(theirs)
    ]


def compare(model: Path, expected: Path, other: Path) -> dict[str, Any]:
    """A real model's greedy answers on this GPU and the CPU's.

    other   log-probs of other kernels of the CPU (`score`): what rounding alone moves
    """
    known = json.loads(expected.read_text())
    prompts, wanted, places = known["prompts"], known["tokens"], known["places"]
    theirs = json.loads(other.read_text())
    cpu_noise = noise_of_gaps(theirs, places)
    ours = forced(model, known, "cuda")
    gpu_noise = noise_of_gaps(ours, places)
    on_cpu, cpu_flips = flips_in_noise(theirs, places, cpu_noise)
    on_gpu, gpu_flips = flips_in_noise(ours, places, cpu_noise)
    gaps = torch.tensor([p["logprobs"][0] - p["logprobs"][1] for a in places for p in a])
    result: dict[str, Any] = {
        "noise_between_cpu_kernels_median": float(cpu_noise.median()),
        "noise_between_gpu_and_cpu_median": float(gpu_noise.median()),
        "top2_gap_median": float(gaps.median()),
        "between_cpu_kernels": on_cpu,
        "gpu": on_gpu,
        "gpu_and_other_cpu": flips_in_noise(ours, theirs, noise_of_gaps(ours, theirs))[0],
    }
    engine = load(model, kv_cache="auto", max_sequences=64, kv_cache_tokens=65536)
    params = replace(GREEDY, max_tokens=32)
    start = time.perf_counter()
    found = answers(engine, prompts, params)
    seconds = time.perf_counter() - start
    result["tokens_per_s"] = round(sum(map(len, found)) / seconds, 1)
    parted = _part_from(found, wanted, params.max_tokens or 0)
    result["free_running"] = {
        "prompts": len(prompts),
        "equal": len(prompts) - len(parted),
        "part_within_twice_the_noise": sum(bool(gaps[p] <= 2 * cpu_noise[p]) for p in parted),
        "part_beyond": sum(bool(gaps[p] > 2 * cpu_noise[p]) for p in parted),
        "largest_gap": max((float(gaps[p]) for p in parted), default=0.0),
    }
    fresh = load(model, kv_cache="auto", max_sequences=64, kv_cache_tokens=65536)
    result["second_engine_identical"] = answers(fresh, prompts, params) == found
    eager = load(model, kv_cache="auto", deterministic=True)
    alone = [answers(eager, [prompt], params)[0] for prompt in prompts[100:120]]
    eager.clear_prefix_cache()
    result["deterministic_identical"] = answers(eager, prompts, params)[100:120] == alone
    result["flips_gap_moved_noise"] = {"cpu": cpu_flips, "gpu": gpu_flips}
    return result


@torch.inference_mode()
def fast_against_exact(model: Path) -> dict[str, Any]:
    """Mean KL of mode "fast" from "exact" on held-out text, through prefill and through graphs."""
    from tokenizers import Tokenizer

    held_out = files("halfbyte.fidelity") / "data" / "held_out.txt"
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(held_out.read_text("utf-8")).ids
    windows = [ids[i : i + 1024] for i in range(0, min(len(ids) - 1024, 8192), 1024)]
    limits: dict[str, Any] = {"max_model_len": 1024, "kv_cache": "auto", "max_batch_tokens": 1024}
    engines = [load(model, products=mode, **limits) for mode in ("exact", "fast")]
    result: dict[str, Any] = {"tokens": sum(map(len, windows))}
    for name, chunk in (("prefill", 1024), ("decode", 128)):
        kls: list[float] = []
        agreed: list[bool] = []
        for window in windows:
            exact, fast = (
                torch.cat([x.clone() for x in engine.score(window, chunk)]).log_softmax(-1)
                for engine in engines
            )
            kls += (exact.exp() * (exact - fast)).sum(-1).tolist()
            agreed += (exact.argmax(-1) == fast.argmax(-1)).tolist()
        result[name] = {
            "mean_kl_nats": sum(kls) / len(kls),
            "largest_kl_nats": max(kls),
            "top1_agreement": sum(agreed) / len(agreed),
        }
    return result


def vision_on_gpu(side: int = 1540) -> dict[str, Any]:
    """The image encoder of the big model, random bf16 weights: correct when small, and its time."""
    from halfbyte.config import VisionConfig
    from halfbyte.model.vision import EncoderLayerWeights, ProjectorWeights, VisionModel

    def build(config: VisionConfig, width: int, device: str) -> VisionModel:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> torch.Tensor:
            fan_in = math.prod(shape[1:])
            values = torch.randn(shape, generator=generator, device=device) / fan_in**0.5
            rounded: torch.Tensor = values.to(torch.bfloat16)
            return rounded

        def ones() -> torch.Tensor:
            return torch.ones(config.width, dtype=torch.bfloat16, device=device)

        heads, d = config.num_heads * config.head_dim, config.width
        layers = [
            EncoderLayerWeights(
                ones(),
                drawn(3 * heads, d),
                drawn(d, heads),
                ones(),
                drawn(2 * config.mlp_width, d),
                drawn(d, config.mlp_width),
            )
            for _ in range(config.num_layers)
        ]
        merged = d * config.spatial_merge_size**2
        projector = ProjectorWeights(
            ones(), drawn(d, merged), drawn(width, d), None, drawn(width, width), None
        )
        patch = drawn(d, config.num_channels, config.patch_size, config.patch_size)
        return VisionModel(
            config, patch=patch, norm_D=ones(), layers=layers, projector=projector,
            projector_eps=1e-5,
        )  # fmt: skip

    def geometry(num_layers: int, width: int, num_heads: int, mlp_width: int) -> VisionConfig:
        return VisionConfig(
            num_layers, width, num_heads, width // num_heads, mlp_width, 14, 1540, 3,
            10000.0, 1e-5, "silu", 2, "gelu", False, 10, -1,
        )  # fmt: skip

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float().cpu() - b.float()).norm() / b.float().norm())

    generator = torch.Generator().manual_seed(1)
    small = build(geometry(4, 416, 4, 1024), 512, "cpu")
    pixels = torch.randn(3, 154, 210, generator=generator)
    wanted = small([pixels])[0]
    found = _on_cuda(small)([pixels])[0]
    # Four layers and the projector in bf16, 2**-9 a rounding.
    result: dict[str, Any] = {"relative_error_small": relative(found, wanted)}
    assert found.shape == wanted.shape and result["relative_error_small"] < 0.02, result
    big = build(geometry(48, 1664, 16, 8192), 12288, "cuda")
    pixels = torch.randn(3, side, side, generator=generator)
    torch.cuda.reset_peak_memory_stats()
    vectors = big([pixels])[0]
    assert bool(torch.isfinite(vectors).all())
    result |= {
        "device": torch.cuda.get_device_name(),
        "image": side,
        "vectors": len(vectors),
        "image_ms": time_ms(lambda: big([pixels]), 5),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }
    return result


def _on_cuda(model: Any) -> Any:
    """The image encoder with all weights on the GPU."""

    def moved(weights: Any) -> Any:
        names = [one.name for one in fields(weights)]
        values = (getattr(weights, name) for name in names)
        return replace(
            weights,
            **{
                name: value.cuda()
                for name, value in zip(names, values, strict=True)
                if value is not None
            },
        )

    other = model.cuda()
    other.projector = moved(other.projector)
    for layer in other.layers:
        layer.weights = moved(layer.weights)
    return other


def time_ms(function: Callable[[], Any], repeats: int = 10) -> float:
    """Milliseconds of one call, the mean of `repeats` after one that is not counted."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) / repeats * 1e3, 3)


def main() -> int:
    command, *arguments = sys.argv[1:]
    paths = [Path(argument) for argument in arguments]
    if command == "checkpoints":
        write_checkpoints(paths[0])
    elif command == "expect":
        expect(paths[0], paths[1])
    elif command == "score":
        score(*paths)
    elif command == "run":
        return run_checks(paths[0])
    elif command == "compare":
        print(json.dumps(compare(*paths)))
    elif command == "fast":
        print(json.dumps(fast_against_exact(paths[0])))
    elif command == "vision":
        print(json.dumps(vision_on_gpu()))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
