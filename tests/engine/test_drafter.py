"""An EAGLE head beside the engine: its entries are the right ones, and no answer depends on it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cuda_twin import TwinDraft, TwinExecutor, twin_engine
from engine_driver import (
    GREEDY,
    Answer,
    assert_equal,
    drain,
    load,
    needs_exact_kernels,
    prompt_of,
    request,
    run,
    run_alone,
)
from halfbyte.checkpoint.reader import Checkpoint
from halfbyte.engine.core import Engine
from halfbyte.engine.hopper import HopperDevice
from halfbyte.engine.plan.sequence import Sequence as EngineSequence
from halfbyte.engine.request import ImageInput, SamplingParams
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.model.attention import DenseAttend
from halfbyte.model.decoder import Decoder, Step
from halfbyte.model.eagle import EagleHead
from halfbyte.model.load import load_decoder, load_eagle
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint, write_tiny_eagle
from tolerances import SAME_LOGPROB

pytestmark = needs_exact_kernels

PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((1, 15, 16, 17, 33, 64, 90))]
SHARED = prompt_of(48, 99)
TARGET = tiny_config(layers=2)
SAMPLED = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.95, seed=5, ignore_eos=True)
# Layers that add nothing: what follows depends on the last token alone.
SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture(scope="module")
def random_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eagle") / "random"
    write_tiny_eagle(directory, TARGET, seed=3)
    return directory


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A target whose layers add little, so that a head that knows the token guesses well."""
    directory = tmp_path_factory.mktemp("forgetful")
    for path in tiny.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "halfbyte-manifest.json").unlink(missing_ok=True)
    weaken(directory / "model.safetensors", 0.12)
    return directory


@pytest.fixture(scope="module")
def knowing_head(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Passes the embedding on and adds nothing: exact for a target whose layers add nothing."""
    directory = tmp_path_factory.mktemp("knowing") / "head"
    write_tiny_eagle(directory, TARGET, replaced=knowing_tensors(tiny))
    return directory


def weaken(path: Path, factor: float) -> None:
    files = load_file(path)
    for name, tensor in files.items():
        if name.endswith(SILENT):
            files[name] = tensor * factor
    save_file(files, path)


def knowing_tensors(target: Path) -> dict[str, Tensor]:
    width = TARGET.text.width
    one = torch.eye(width, dtype=torch.bfloat16)
    replaced = {
        "eagle.fuse.weight": torch.cat((one, torch.zeros_like(one)), dim=1),
        "norm.weight": Checkpoint.open(target).tensor("norm.weight"),
    }
    for layer in range(2):
        for short, inputs in (("attention.o", 6 * 32), ("mlp.down", TARGET.text.mlp_width)):
            zeros = torch.zeros(width, inputs, dtype=torch.bfloat16)
            replaced[f"decoder.{layer}.{short}.weight"] = zeros
    return replaced


# Chunks by the clock would differ from run to run.
STEADY: dict[str, Any] = {
    "num_speculative_tokens": 4,
    "adaptive_speculation": False,
    "target_gap_ms": "none",
}


def plain_drafting(target: Path, head: Path, **options: Any) -> Engine:
    return load(target, speculative=str(head), **(STEADY | options))


def twin_drafting(target: Path, head: Path, **options: Any) -> Engine:
    """The Hopper device, a twin in plain ops beneath it."""
    return twin_engine(target, speculative=str(head), **(STEADY | options))


Drafting = Callable[..., Engine]
DEVICES: dict[str, Drafting] = {"plain": plain_drafting, "hopper": twin_drafting}


@pytest.fixture(params=DEVICES)
def drafting(request: pytest.FixtureRequest) -> Drafting:
    """An engine with a draft model, on either device: target, head, options."""
    return DEVICES[request.param]


def test_a_head_that_knows_the_model_is_always_right(
    tmp_path: Path, tiny: Path, drafting: Drafting
) -> None:
    """Greedy and drawn: one step gives five tokens, by the right token at the right place."""
    silent = tmp_path / "silent"
    write_tiny_checkpoint(silent, layers=2)
    weaken(silent / "model.safetensors", 0.0)
    (silent / "halfbyte-manifest.json").unlink(missing_ok=True)
    write_tiny_eagle(tmp_path / "head", TARGET, replaced=knowing_tensors(tiny))
    for params in (replace(GREEDY, max_tokens=41), replace(SAMPLED, max_tokens=41)):
        engine = drafting(silent, tmp_path / "head")
        found = run_alone(engine, SHARED, params)
        assert_equal(found, run_alone(load(silent), SHARED, params))
        stats = engine.stats()
        assert stats.proposed_tokens == stats.accepted_tokens == 32
        assert stats.steps == 1 + 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache": "bf16", "prefix_cache": False},
        {"max_batch_tokens": 24, "max_sequences": 7},
        {"block_tokens": 4, "max_sequences": 3},
        {"kv_cache_tokens": 160, "max_sequences": 7, "block_tokens": 4},
    ],
    ids=["batch", "bf16", "chunks", "blocks", "preempted"],
)
def test_every_answer_equals_the_plain_one(
    forgetful: Path, knowing_head: Path, drafting: Drafting, options: dict[str, Any]
) -> None:
    """With a head that is right about half of the time, over everything a request may ask."""
    if options.get("kv_cache") == "bf16" and drafting is twin_drafting:
        pytest.skip("the kernels' cache is FP8")
    kinds = (
        replace(GREEDY, max_tokens=24),
        SAMPLED,
        replace(SAMPLED, frequency_penalty=0.5, repetition_penalty=1.1, logprobs=1),
        replace(SAMPLED, temperature=1.5, top_p=1.0, stop_token_ids=tuple(range(3, 40))),
        replace(GREEDY, prompt_logprobs=1),
    )
    items = [request(str(i), PROMPTS[i % 7], kinds[i % 5]) for i in range(10)]
    items += [request(f"shared-{i}", SHARED, replace(SAMPLED, seed=i)) for i in range(3)]
    wanted = run(load(forgetful, **options), items)
    engine = drafting(forgetful, knowing_head, **options)
    found = run(engine, items)
    for name, answer in found.items():
        assert_equal(answer, wanted[name])
    stats = engine.stats()
    assert 0.1 < stats.accepted_tokens / stats.proposed_tokens < 0.95
    assert stats.free_blocks == stats.total_blocks


class Watched:
    """Notes every guess that a drafter makes, with the tokens that were known."""

    def __init__(self, engine: Engine) -> None:
        assert engine._drafter is not None
        self.guess_inside = engine._drafter.guess
        self.seen: list[tuple[list[int], list[int]]] = []
        engine._drafter.guess = self.guess  # type: ignore[method-assign]

    def guess(self, wanted: Sequence[tuple[EngineSequence, int]]) -> list[list[int]]:
        guesses = self.guess_inside(wanted)
        for (sequence, _), guess in zip(wanted, guesses, strict=True):
            self.seen.append((list(sequence.token_ids), guess))
        return guesses


def dense_logits(
    decoder: Decoder, head: EagleHead, token_ids: Sequence[int], guess: Sequence[int]
) -> list[Tensor]:
    """Logits behind each guess, from the very beginning and without any cache."""
    known = len(token_ids)
    positions = torch.arange(known)
    step = Step(torch.tensor(token_ids), positions, DenseAttend([0, known]))
    _, hidden = decoder.forward_with_hidden(step)
    hidden = hidden[: known - 1]
    logits = []
    for count in range(len(guess)):
        text = [*token_ids, *guess[:count]]
        attend = DenseAttend([0, len(hidden)])
        places = torch.arange(len(hidden))
        embedded = decoder.embed(Step(torch.tensor(text[1:]), places, attend))
        last = head(embedded, hidden, places, attend)[-1:]
        logits.append(decoder.logits(last)[0])
        hidden = torch.cat((hidden, last))
    return logits


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 12, "max_sequences": 4}, {"block_tokens": 4}],
    ids=["whole", "chunks", "blocks"],
)
def test_guesses_are_those_of_a_head_that_starts_from_scratch(
    tiny: Path, random_head: Path, options: dict[str, Any]
) -> None:
    """Chunks, found prefixes, accepted and fallen guesses leave the entries as they should be."""
    decoder = load_decoder(Checkpoint.open(tiny))
    head = load_eagle(Checkpoint.open_eagle(random_head), decoder.config)
    engine = plain_drafting(tiny, random_head, kv_cache="bf16", **options)
    watched = Watched(engine)
    turns = [SHARED, [*SHARED, *prompt_of(9, 1)], [*SHARED[:40], *prompt_of(9, 2)]]
    for turn in turns:
        run(engine, [request(str(i), [*turn, *[7] * i], GREEDY) for i in range(2)])
    assert engine.stats().cached_tokens > 0
    assert len(watched.seen) > 40
    num_ties = 0
    for token_ids, guess in watched.seen[::5]:
        for token_id, logits in zip(
            guess, dense_logits(decoder, head, token_ids, guess), strict=True
        ):
            if logits.argmax() != token_id:
                assert logits.max() - logits[token_id] <= SAME_LOGPROB
                num_ties += 1
                break
    assert num_ties <= 2


def test_a_prompt_in_slices_reaches_the_head(
    tiny: Path, random_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[Any, dict[int, list[int]]] = {"balanced": {}, "none": {}}
    for gap, guesses in told.items():
        engine = plain_drafting(tiny, random_head, target_gap_ms=gap)
        drafter = engine._drafter
        assert drafter is not None
        guess = drafter.guess

        def noted(
            wanted: Sequence[tuple[EngineSequence, int]],
            guess: Any = guess,
            guesses: dict[int, list[int]] = guesses,
        ) -> list[list[int]]:
            found: list[list[int]] = guess(wanted)
            for (sequence, _), token_ids in zip(wanted, found, strict=True):
                if sequence.request.request_id == "late":
                    guesses[sequence.num_generated] = token_ids
            return found

        monkeypatch.setattr(drafter, "guess", noted)
        answers = {name: Answer([], []) for name in ("stream", "late")}
        engine.add(request("stream", SHARED, replace(GREEDY, max_tokens=100)))
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.add(request("late", prompt_of(90, 31)))
        drain(engine, answers)
        assert (engine._chunk is None) and engine.stats().free_blocks == engine.stats().total_blocks
    assert told["balanced"] == told["none"] != {}


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 12, "max_sequences": 4}, {"block_tokens": 4}, {"max_sequences": 2}],
    ids=["whole", "chunks", "blocks", "queue"],
)
def test_rows_of_a_graph_or_a_prefill_give_the_guesses_of_the_plain_device(
    tiny: Path, random_head: Path, options: dict[str, Any]
) -> None:
    """Steps of up to 128 rows and of more, in company that comes and goes."""
    seen = []
    engines = [make(tiny, random_head, **options) for make in DEVICES.values()]
    for engine in engines:
        watched = Watched(engine)
        for turn in (SHARED, [*SHARED, *prompt_of(9, 1)], [*SHARED[:8], *prompt_of(135, 2)]):
            items = [
                request(str(i), [*turn, *[7] * i], replace(GREEDY, max_tokens=9 + i))
                for i in range(3)
            ]
            run(engine, items)
        assert engine.stats().cached_tokens > 0
        seen.append(watched.seen)
    assert len(seen[0]) > 40 and seen[0] == seen[1]
    device = engines[1]._runner.device
    assert isinstance(device, HopperDevice) and device.num_replays > 0
    assert (device.num_prefills > 0) == ("max_batch_tokens" not in options)
    assert device.draft is not None and isinstance(device.draft.executor, TwinDraft)
    assert len(device.draft.executor.replayed) > 40
    assert (device.draft.executor.num_prefills > 0) == (device.num_prefills > 0)


def test_a_head_goes_with_deterministic_steps(forgetful: Path, knowing_head: Path) -> None:
    """Guesses are more rows of the one graph, and a row does not depend on others."""
    wanted = run_alone(twin_engine(forgetful, deterministic=True), SHARED)
    engine = twin_drafting(forgetful, knowing_head, deterministic=True)
    items = [request("me", SHARED), *(request(str(i), prompt_of(9 + i, i)) for i in range(9))]
    assert_equal(run(engine, items)["me"], wanted)
    assert engine.stats().accepted_tokens > 0
    device = engine._runner.device
    assert isinstance(device, HopperDevice) and isinstance(device.executor, TwinExecutor)
    assert set(device.executor.replayed) == {64}


def test_the_engine_runs_ahead_unless_there_is_a_head(tiny: Path, random_head: Path) -> None:
    plain, engine = twin_engine(tiny), twin_drafting(tiny, random_head)
    assert plain._runs_ahead and plain._drafter is None
    assert not engine._runs_ahead and engine._drafter is not None
    assert "draft_model" not in plain.facts()
    assert "draft_model" in engine.facts()
    head = load_eagle(Checkpoint.open_eagle(random_head), TARGET.text)
    assert engine.stats().weight_bytes == plain.stats().weight_bytes + head.num_weight_bytes


def test_found_prefixes_are_as_long_as_without_a_head(
    tiny: Path, random_head: Path, drafting: Drafting
) -> None:
    engine = drafting(tiny, random_head)
    first, again = (run_alone(engine, SHARED) for _ in range(2))
    assert again.token_ids == first.token_ids
    assert again.finish is not None and again.finish.cached_tokens == 32
    assert run_alone(load(tiny), SHARED).token_ids == first.token_ids


@pytest.mark.parametrize("steps", range(1, 7))
def test_abort_in_any_state_leaks_no_block(
    forgetful: Path, knowing_head: Path, drafting: Drafting, steps: int
) -> None:
    engine = drafting(forgetful, knowing_head, max_sequences=2, max_batch_tokens=20, block_tokens=4)
    answers = {str(i): Answer([], []) for i in range(4)}
    for name in answers:
        engine.add(request(name, SHARED))
    for _ in range(steps):
        for event in engine.step():
            answers[event.request_id].take(event)
        engine.check()
    engine.abort("1")
    engine.check()
    del answers["1"]
    drain(engine, answers)
    wanted = run_alone(load(forgetful), SHARED)
    assert all(answer.token_ids == wanted.token_ids for answer in answers.values())
    assert engine.stats().free_blocks == engine.stats().total_blocks


def test_pictures_reach_the_head(tmp_path: Path, drafting: Drafting) -> None:
    """The embedding of an entry is the picture's vector where the next token is a picture's."""
    target = tmp_path / "seeing"
    config = write_tiny_checkpoint(target, layers=2, vision=True)
    write_tiny_eagle(tmp_path / "head", config, seed=2)
    generator = torch.Generator().manual_seed(0)
    text = [token for token in prompt_of(24, 5) if token not in (10, 12, 13)]
    prompt = [*text[:9], 10, 10, 12, 10, 10, 13, *text[9:]]
    guesses = []
    for seed in (1, 2):
        generator.manual_seed(seed)
        pixels = torch.randint(256, (3, 56, 56), dtype=torch.uint8, generator=generator).numpy()
        picture = (ImageInput.of(pixels, 9, 6),)
        engine = drafting(target, tmp_path / "head", max_batch_tokens=16, max_sequences=4)
        watched = Watched(engine)
        found = run_alone(engine, prompt, GREEDY, images=picture)
        assert_equal(found, run_alone(load(target), prompt, GREEDY, images=picture))
        assert engine._drafter is not None
        guesses.append(engine._drafter.model.cache.layers[0][0].clone())
        assert watched.seen
    # Entries 8 to 13 see the picture as the next token; entry 3 does not.
    first, second = (k.flatten(0, 1) for k in guesses)
    assert torch.equal(first[3], second[3])
    assert not torch.equal(first[8], second[8])


def test_two_engines_do_not_share_a_head(tiny: Path, random_head: Path, drafting: Drafting) -> None:
    engines = [drafting(tiny, random_head) for _ in range(2)]
    answers = [{"a": Answer([], [])} for _ in engines]
    for engine, prompt in zip(engines, (SHARED, PROMPTS[4]), strict=True):
        engine.add(request("a", prompt))
    while any(engine.has_work() for engine in engines):
        for engine, found in zip(engines, answers, strict=True):
            for event in engine.step():
                found["a"].take(event)
    for found, prompt in zip(answers, (SHARED, PROMPTS[4]), strict=True):
        assert_equal(found["a"], run_alone(load(tiny), prompt))


def test_figures_count_the_head(tiny: Path, random_head: Path, drafting: Drafting) -> None:
    plain, engine = load(tiny).stats(), drafting(tiny, random_head).stats()
    assert engine.weight_bytes > plain.weight_bytes
    # Two layers of bf16 beside two of FP8, for each position.
    assert engine.cache_bytes == 3 * plain.cache_bytes


def test_a_head_over_several_processes_is_refused(tiny: Path, random_head: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"one process only; use --speculative ngram"):
        plain_drafting(tiny, random_head, tensor_parallel_size=2)


def test_a_directory_without_a_head_is_refused(
    tiny: Path, tmp_path: Path, drafting: Drafting
) -> None:
    with pytest.raises(CheckpointError, match="no params"):
        drafting(tiny, tmp_path)
    write_tiny_eagle(tmp_path / "other", tiny_config(layers=1))
    head = tmp_path / "other"
    assert drafting(tiny, head, num_speculative_tokens=None).config.num_speculative_tokens == 3
    answers = run(drafting(tiny, head), [request("a", [5], replace(GREEDY, max_tokens=2))])
    assert len(answers["a"].token_ids) == 2


def test_entries_need_no_more_room_than_tokens(
    tiny: Path, random_head: Path, drafting: Drafting
) -> None:
    """At the end of the context nothing is guessed beyond it."""
    engine = drafting(tiny, random_head, max_model_len=64, kv_cache_tokens=64, block_tokens=4)
    found = run_alone(engine, SHARED, replace(GREEDY, max_tokens=None))
    assert len(found.token_ids) == 16
    plain = load(tiny, max_model_len=64, kv_cache_tokens=64, block_tokens=4)
    assert_equal(found, run_alone(plain, SHARED, replace(GREEDY, max_tokens=None)))
    assert all(a < b for a, b in pairwise((0, engine.stats().proposed_tokens)))
