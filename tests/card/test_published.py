"""What a card publishes names no host, no path and no key."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from card.test_render import arm
from halfbyte.card.published import findings, published_figures, published_run, scrubbed

PRIVATE = (
    "/home/ann/models/x", "/mnt/nfs/team-a/evals", "~/runs/fp8/run.json", "C:\\Users\\ann\\x",
    "http://gpu07.cluster.corp:8000/v1", "https://10.1.2.3:8443/v1/chat", "192.168.0.17:8000",
    "https://ann:geheim@huggingface.co/x", "http://127.0.0.1:8000", "gpu07.internal",
    "sk-proj-abcdefghij0123456789", "hf_abcdefghijklmnop0123", "AKIAABCDEFGHIJKLMNOP",
    "Bearer abcdefghijkl0123456789", "api_key=abcdefghijklm012345", "https://llm.example.com/v1",
)  # fmt: skip
PUBLIC = (
    "integer equality, else math-verify", "https://huggingface.co/math-ai/aime25/tree/main",
    "Apache-2.0", "MMMU/MMMU_Pro, standard (10 options), test", "2.13.0+cpu", "and/or", "3/4",
    "x86_64, 2 cores, Linux", "nvidia/Nemotron-SFT-Agentic-v2", "a token of 12 and a password",
    "halfbyte compare fp8 mixed --text held_out.txt", "tensors:" + "3f" * 32, "e4m3 (448)",
    "hf_quant_config.json", "hf_tokenizer_configuration", "sk_learn_pipeline_of_words",
    "pk-names-of-things",
)  # fmt: skip


@pytest.mark.parametrize("text", PUBLIC)
def test_what_is_public_stays_as_it_is(text: str) -> None:
    assert scrubbed({"a": [text]}) == {"a": [text]}
    assert findings(f"x {text} y") == []


@drawn(
    st.lists(st.sampled_from(PRIVATE), min_size=1, max_size=4),
    st.sampled_from((" ", "; ", ": ", "\n", ", '", ' "')),
)
def test_what_is_private_is_gone_wherever_it_stands(texts: list[str], between: str) -> None:
    whole = "failed at" + between + between.join(texts) + between + "again"
    plain = json.dumps(scrubbed({"why": [["i", 0, whole]], whole: 1}))
    for text in texts:
        assert json.dumps(text)[1:-1] not in plain and text not in plain
    for word in ("ann", "gpu07", "10.1.2.3", "geheim", "abcdefgh", "nfs", "192.168"):
        assert word not in plain
    assert "failed at" in plain and "again" in plain


@pytest.mark.parametrize("text", [p for p in PRIVATE if "127.0.0.1" not in p and "llm." not in p])
def test_what_is_private_in_a_file_is_found(text: str) -> None:
    assert findings(f"Some text, {text} and more")


def test_the_commands_of_a_card_are_fine() -> None:
    assert findings("curl http://127.0.0.1:8000/v1/chat/completions -d '{}'") == []


def test_a_published_run_keeps_its_figures_and_no_place(tmp_path: Path) -> None:
    run = arm(tmp_path, "mixed", 19).run
    result = replace(
        run.benchmarks["aime2025"],
        missing=[["i3", 0, "ConnectError: http://gpu07.corp:8000/v1 refused"]],
        provenance={"source": "team-a/aime2025", "revision": None, "sha256": {"p.jsonl": "00"}},
    )
    run = replace(
        run,
        endpoint="http://gpu07.corp:8000/v1",
        command="halfbyte evaluate http://gpu07.corp:8000 --out /home/ann/evals",
        server={
            "health": {"version": "0.1.0", "engine_device": "cuda", "engine_directory": "/x/y"}
        },
        checkpoint={"folder": "ann-secret", "identity": "tensors:1"},
        judge={"url": "http://judge.corp", "model": "qwen", "revision": "r"},
        benchmarks={"aime2025": result},
    )
    plain = published_run(run)
    text = json.dumps(asdict(plain))
    for word in ("gpu07", "corp", "/home", "ann", "/x/y", "team-a", "http"):
        assert word not in text, word
    assert plain.benchmarks["aime2025"].score == result.score
    assert plain.server == {"health": {"version": "0.1.0", "engine_device": "cuda"}}
    assert plain.judge == {"model": "qwen", "revision": "r"}
    assert plain.benchmarks["aime2025"].missing[0][:2] == ["i3", 0]


def test_a_published_command_has_no_folders() -> None:
    record = {"command": "halfbyte bench cpu build/demo/mixed --record ../r.json", "results": {}}
    assert published_figures(record)["command"] == "halfbyte bench cpu mixed --record r.json"
    assert "'" not in published_figures({"command": "halfbyte 'open"})["command"]
