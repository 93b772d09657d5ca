"""Every flag of the engine reads back as the field it was rendered from."""

import argparse
from dataclasses import fields
from typing import Any

import pytest

from halfbyte.cli.engine_flags import add_engine_arguments, engine_config, refuse_ours
from halfbyte.engine.options import EngineConfig, options
from halfbyte.errors import UsageError

GIVEN: dict[str, tuple[list[str], Any]] = {
    "max_model_len": (["64"], 64),
    "max_sequences": (["3"], 3),
    "kv_cache_tokens": (["640"], 640),
    "mode": (["declared"], "declared"),
    "device": (["cuda:1"], "cuda:1"),
    "kv_cache": (["bf16"], "bf16"),
    "gpu_memory_utilization": (["0.5"], 0.5),
    "products": (["fast"], "fast"),
    "deterministic": ([], True),
    "accept": (["mscale_all_dim"], ("mscale_all_dim",)),
    "speculative": (["ngram"], "ngram"),
    "num_speculative_tokens": (["5"], 5),
    "fp8_activations": (["per-token"], "per-token"),
    "count_saturation": ([], True),
    "target_gap_ms": (["120"], 120.0),
    "tensor_parallel_size": (["2"], 2),
}


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def test_without_flags_the_fields_keep_their_defaults() -> None:
    found = engine_config(parse("--device", "cpu"))
    assert found == EngineConfig()


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.flag])
def test_a_flag_sets_its_field_and_no_other(name: str) -> None:
    words, value = GIVEN[name]
    option = options()[name]
    for flag in (option.flag, *option.also):
        found = engine_config(parse("--device", "cpu", flag, *words))
        for one in fields(EngineConfig):
            wanted = value if one.name == name else getattr(EngineConfig(), one.name)
            assert getattr(found, one.name) == wanted


@pytest.mark.parametrize("name", list(GIVEN))
def test_what_only_our_engine_knows_is_refused_for_another(name: str) -> None:
    option = options()[name]
    args = parse(option.flag, *GIVEN[name][0])
    if option.is_ours:
        with pytest.raises(UsageError, match=f"{option.flag} is for our own engine"):
            refuse_ours(args)
    else:
        refuse_ours(args)


def test_what_no_type_allows_is_refused() -> None:
    for words in (["--mode", "exact"], ["--max-model-len", "many"], ["--accept", "all"]):
        with pytest.raises(SystemExit):
            parse(*words)
