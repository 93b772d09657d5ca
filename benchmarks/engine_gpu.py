"""The serving engine on the big geometry, random weights: steps, guesses and starts on one GPU.

Question: what does batch-invariant decoding cost a step (`deterministic`), what do the guesses of
an EAGLE head cost (`draft`), and how long does a checkpoint in page cache take to its first token
(`start`)?

Method: an engine as it is loaded for serving, over weights of `bench.synthetic`. A decode step is
the median time between two steps that gave every sequence a token, by how tokens are chosen; a
graph's time is that of ten replays; a prompt's is the least of three. No guess of the draft model
is right, so a step says what guesses cost. `start` writes a checkpoint of random bytes and loads
it twice.

Reading the result: guesses pay where a step brings more tokens than its time grew by; the second
start is the one that a restart takes.

Last records: benchmarks/records/deterministic.json, benchmarks/records/draft_model.json,
benchmarks/records/start.json.

Run: PYTHONPATH=src:tests python benchmarks/engine_gpu.py deterministic|draft|start
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cuda_checks import GREEDY, answers, device_of, executor_of, prompt_of, request, time_ms
from halfbyte.bench import record
from halfbyte.engine.config import EngineConfig
from halfbyte.engine.core import Engine
from halfbyte.engine.generate import generate
from halfbyte.engine.generate import steps as steps_of
from halfbyte.engine.load import HopperPart, resolve_alone
from halfbyte.engine.request import SamplingParams, TokensEvent
from halfbyte.engine.runner import Runner
from halfbyte.figures import Against, Figure

RECORDS = Path(__file__).parent / "records"
LARGE = EngineConfig(
    device="cuda",
    max_model_len=8192,
    max_sequences=64,
    mode="fp8_declared",
    target_gap_ms="none",
)


def engine_of(
    library: Any, weights: Any, config: EngineConfig, draft: Any = None
) -> tuple[Engine, EngineConfig]:
    """An engine over weights that lie on the GPU."""
    part = HopperPart(config, library, weights, draft)
    device, resolved = part.build(resolve_alone(config))
    return Engine(Runner(device, resolved), resolved), resolved


def speed(num_layers: int) -> dict[str, Any]:
    """The engine over random weights of the big geometry: memory, capture, decode, prefill."""
    from halfbyte.bench.synthetic import formats_of, medium_geometry, random_weights
    from halfbyte.kernels.cuda.library import KernelLibrary

    library = KernelLibrary(torch.device("cuda", 0))
    geometry = medium_geometry(num_layers)
    weights = random_weights(library, geometry, formats_of(geometry))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "layers": num_layers}
    for name, config in (("plain", LARGE), ("deterministic", replace(LARGE, deterministic=True))):
        start = time.perf_counter()
        engine, resolved = engine_of(library, weights, config)
        rows: dict[str, Any] = {
            "ready_s": round(time.perf_counter() - start, 2),
            "kv_cache_tokens": resolved.kv_cache_tokens,
            "free_bytes": torch.cuda.mem_get_info()[0],
            **engine.facts(),
        }
        for batch in (1, 16, 64):
            rows[f"decode_{batch}_ms"] = _decode_ms(engine, batch)
        executor = executor_of(engine)
        for size in executor.sizes:
            rows[f"graph_{size}_ms"] = time_ms(partial(executor.replay, size))
        rows["prompt_2048_ms"] = _prompt_ms(engine, 2000)
        rows["prompt_100_ms"] = _prompt_ms(engine, 100)
        result[name] = rows
        print(json.dumps(rows), flush=True)
        del engine, executor
    return result


def write_big(directory: Path, num_layers: int) -> int:
    """A mixed checkpoint of the big geometry with the bytes of one random buffer; its size."""
    from halfbyte.bench.synthetic import formats_of, medium_geometry
    from halfbyte.checkpoint.inventory import expected_tensors
    from halfbyte.checkpoint.metadata import Quantization
    from halfbyte.checkpoint.names import foreign_name
    from halfbyte.checkpoint.shards import DTYPE_NAMES, bytes_of
    from halfbyte.checkpoint.written_metadata import hub_config, modelopt_configs
    from halfbyte.config import ModelConfig

    config = ModelConfig(medium_geometry(num_layers), None)
    formats = formats_of(config.text)
    raw, older = modelopt_configs(hub_config(config), formats, "fp8", "hf-text")
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "hf_quant_config.json").write_text(json.dumps(older))
    # Finite as e4m3, as bf16 and as anything made of them: no byte has all exponent bits set.
    source = bytes_of(torch.randint(0x20, 0x3C, (1 << 28,), dtype=torch.uint8))
    header: dict[str, Any] = {}
    offset = 0
    for name, one in expected_tensors(config, Quantization("modelopt", formats, "fp8")).items():
        size = math.prod(one.shape) * one.dtypes[0].itemsize
        header[foreign_name(name, "hf-text", "modelopt")] = {
            "dtype": DTYPE_NAMES[one.dtypes[0]],
            "shape": list(one.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                left -= file.write(source[: min(left, len(source))])
    return offset


def start_big(directory: Path, num_layers: int) -> dict[str, Any]:
    """From a directory in page cache to an engine that has answered."""
    start = time.perf_counter()
    num_bytes = write_big(directory, num_layers)
    result: dict[str, Any] = {
        "layers": num_layers,
        "bytes": num_bytes,
        "written_s": time.perf_counter() - start,
    }
    for turn in ("first", "second"):
        start = time.perf_counter()
        config = EngineConfig(device="cuda", max_model_len=8192, max_sequences=64)
        engine = Engine.load(directory, config)
        loaded_s = time.perf_counter() - start
        answers(engine, [prompt_of(20, 0)], replace(GREEDY, max_tokens=1))
        facts = engine.facts()
        result[turn] = {
            "ready_s": round(loaded_s, 2),
            "first_token_s": round(time.perf_counter() - start, 2),
            "weights_s": facts["load_weights_s"],
            "gb_per_s": round(num_bytes / 1e9 / float(str(facts["load_weights_s"])), 2),
            "graph_capture_s": facts["graph_capture_s"],
        }
        executor_of(engine)
        del engine
    return result


def draft_speed(num_layers: int, guesses: int = 3) -> dict[str, Any]:
    """What a draft model of two layers adds to a step, random weights: no guess is right."""
    from halfbyte.bench.synthetic import (
        formats_of,
        make_tables,
        medium_geometry,
        random_weight,
        random_weights,
    )
    from halfbyte.kernels.cuda.library import KernelLibrary
    from halfbyte.model.cuda.weights import CudaLinear

    library = KernelLibrary(torch.device("cuda", 0))
    geometry = medium_geometry(num_layers)
    weights = random_weights(library, geometry, formats_of(geometry))
    # Two layers, all in FP8, over the target's embedding and head.
    small = replace(geometry, num_layers=2, vocab_size=64)
    own = random_weights(library, small, formats_of(small, "fp8"))
    fuse = random_weight(library, make_tables(library.device), "fp8", 12288, 2 * 12288, 99)
    draft = replace(
        own,
        config=replace(geometry, num_layers=2),
        embedding_VD=weights.embedding_VD,
        head=weights.head,
        fuse=CudaLinear(fuse, 8.0 / 448.0),
    )
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "layers": num_layers,
        "guesses": guesses,
        "draft_weight_bytes": draft.num_bytes,
    }
    drafting = replace(
        LARGE, speculative="draft", num_speculative_tokens=guesses, adaptive_speculation=False
    )
    for name, config, one in (("plain", LARGE, None), ("draft", drafting, draft)):
        engine, resolved = engine_of(library, weights, config, one)
        rows: dict[str, Any] = {"kv_cache_tokens": resolved.kv_cache_tokens}
        for batch in (1, 4, 16):
            found = _decode_ms(engine, batch)
            rows[f"decode_{batch}_ms"] = found["ahead" if one is None else "host"]
        rows["prompt_2048_ms"] = _prompt_ms(engine, 2000)
        device = device_of(engine)
        if device.draft is not None:
            for size in (1, 4, 16, 64):
                rows[f"draft_graph_{size}_ms"] = time_ms(
                    partial(device.draft.executor.replay, size)
                )
            rows["verify_graph_4_ms"] = time_ms(partial(device.executor.replay, 4))
        result[name] = rows
        print(json.dumps(rows), flush=True)
        del engine, device
    return result


def draft_figures(found: dict[str, Any]) -> list[Figure]:
    """A step with guesses against one without: so many tokens a step must it bring to pay."""
    plain, draft = found["plain"], found["draft"]
    conditions = {"layers": found["layers"], "guesses": found["guesses"]}
    return [
        Figure("decode step with guesses of an EAGLE head", draft[f"decode_{batch}_ms"], "ms",
               "speculation", {**conditions, "batch": batch},
               (Against("without", plain[f"decode_{batch}_ms"]),))
        for batch in (1, 4, 16)
    ]  # fmt: skip


def _decode_ms(engine: Engine, batch: int, steps: int = 40) -> dict[str, float]:
    """Milliseconds a step of the whole engine, chosen on the device and by the host."""
    found = {}
    for name, params in (
        ("ahead", SamplingParams(temperature=0.0, max_tokens=steps + 20, ignore_eos=True)),
        (
            "sampled",
            SamplingParams(temperature=0.7, seed=1, max_tokens=steps + 20, ignore_eos=True),
        ),
        (
            "top_p",
            SamplingParams(
                temperature=0.7, top_p=0.9, seed=1, max_tokens=steps + 20, ignore_eos=True
            ),
        ),
        (
            "host",
            SamplingParams(temperature=0.0, logprobs=0, max_tokens=steps + 20, ignore_eos=True),
        ),
    ):
        engine.clear_prefix_cache()
        for index in range(batch):
            engine.add(request(f"{name}{index}", prompt_of(100, index), params))
        times: list[float] = []
        last = time.perf_counter()
        for events in steps_of(engine):
            now = time.perf_counter()
            if sum(isinstance(event, TokensEvent) for event in events) == batch:
                times.append(now - last)
            last = now
        middle = sorted(times[5:])
        if not middle:  # deterministic: so many never get past their prompts together
            continue
        found[name] = round(middle[len(middle) // 2] * 1e3, 3)
    return found


def _prompt_ms(engine: Engine, length: int) -> float:
    """From a prompt to its first token, in milliseconds; the least of three."""
    least = math.inf
    for seed in range(3):
        asked = request("p", prompt_of(length, seed + 77), replace(GREEDY, max_tokens=1))
        start = time.perf_counter()
        generate(engine, [asked])
        least = min(least, time.perf_counter() - start)
    return round(least * 1e3, 2)


def deterministic_figures(found: dict[str, Any]) -> list[Figure]:
    """A step of each batch size: greedy, the device ahead of the host."""
    plain, fixed = found["plain"], found["deterministic"]
    return [
        Figure("deterministic decode step", fixed[f"decode_{batch}_ms"]["ahead"], "ms", "decode",
               {"layers": found["layers"], "batch": batch},
               (Against("plain", plain[f"decode_{batch}_ms"]["ahead"]),))
        for batch in (1, 16, 64)
    ]  # fmt: skip


def start_figures(found: dict[str, Any]) -> list[Figure]:
    """The slower of the two starts."""
    seconds = max(found[turn]["first_token_s"] for turn in ("first", "second"))
    size = f"{found['bytes'] / 1e9:.1f} GB in page cache"
    conditions = {"layers": found["layers"], "weights": size}
    return [Figure("start to the first token", seconds, "s", "start", conditions)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("deterministic", "draft", "start"))
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--directory", type=Path, help="for start: where the checkpoint goes")
    parser.add_argument("--out", type=Path, help="the record to write (the last one's place)")
    args = parser.parse_args()
    figures: Callable[[dict[str, Any]], list[Figure]]
    if args.what == "deterministic":
        name, figures, found = "deterministic", deterministic_figures, speed(args.layers)
        question = "What does batch-invariant decoding cost the serving engine?"
    elif args.what == "draft":
        name, figures, found = "draft_model", draft_figures, draft_speed(args.layers)
        question = "What do the guesses of an EAGLE head cost on a GPU?"
    else:
        if args.directory is None:
            parser.error("start: --directory says where the checkpoint goes, best a RAM disk")
        name, figures, found = "start", start_figures, start_big(args.directory, args.layers)
        question = "How long from a checkpoint in page cache to the first token?"
    print(json.dumps(found))
    record.write(
        args.out or RECORDS / f"{name}.json",
        name=name,
        question=question,
        command="PYTHONPATH=src:tests python benchmarks/engine_gpu.py " + " ".join(sys.argv[1:]),
        figures=figures(found),
        results={"config": {"layers": found["layers"]}, **found},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
