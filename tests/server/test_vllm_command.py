"""The command that starts vLLM: what each kind of checkpoint needs, and what is refused."""

import dataclasses
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.vllm_stand_in import read_flags
from halfbyte.chat.tokens import load_chat
from halfbyte.cli.main import main
from halfbyte.errors import UsageError
from halfbyte.model.tiny import tiny_config, write_tiny_checkpoint
from halfbyte.server.vllm.command import (
    VllmOptions,
    VllmPlan,
    completed,
    lacks_hub_tokenizer,
    plan_vllm,
)

DATA = Path(__file__).parent.parent / "data" / "chat"


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hub layout, tekken.json, images, but nothing that turns text into the image token."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(layers=2, vision=True)
    text = dataclasses.replace(config.text, vocab_size=800)
    write_tiny_checkpoint(path, config=dataclasses.replace(config, text=text))
    shutil.copy(DATA / "tekken" / "tekken.json", path)
    return path


@pytest.fixture(scope="module")
def seeing(blind: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of our export's kind."""
    path = tmp_path_factory.mktemp("seeing")
    shutil.copytree(completed(blind, tmp_path_factory.mktemp("links")), path, dirs_exist_ok=True)
    return path


def planned(directory: Path, **options: Any) -> VllmPlan:
    return plan_vllm(directory, load_chat(directory), VllmOptions("m", 8001, **options))


def test_model_with_thoughts_tools_and_images(seeing: Path) -> None:
    plan = planned(seeing, max_images=5)
    assert plan.flags == {
        "served-model-name": "m",
        "host": "127.0.0.1",
        "port": 8001,
        "config-format": "hf",
        "load-format": "safetensors",
        "tokenizer-mode": "hf",
        "enable-auto-tool-choice": True,
        "tool-call-parser": "mistral",
        "reasoning-config": {"reasoning_start_str": "[THINK]", "reasoning_end_str": "[/THINK]"},
        "limit-mm-per-prompt": {"image": 5},
        "structured-outputs-config": {"backend": "guidance"},
        "generation-config": "vllm",
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
    }

    # What vLLM's parser would take out is split off here, and typed names are guarded.
    assert plan.thought_marks == ("[THINK]", "[/THINK]")
    assert {"[IMG]", "[INST]", "</s>"} <= set(plan.control_names) and plan.warnings == planned(
        seeing
    ).warnings


def test_without_a_tokenizer_json_vllm_starts_and_takes_no_pictures(blind: Path) -> None:
    plan = planned(blind)
    assert plan.flags["tokenizer-mode"] == plan.flags["reasoning-parser"] == "mistral"
    assert plan.flags["limit-mm-per-prompt"] == {"image": 0}
    assert any("tokenizer.json" in warning for warning in plan.warnings)
    assert plan.thought_marks is None and plan.control_names == ()


def test_the_missing_files_are_made_in_a_folder_of_links(blind: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in blind.iterdir()}
    folder = completed(blind, tmp_path)
    assert {path.name: path.read_bytes() for path in blind.iterdir()} == before
    made = {path.name for path in folder.iterdir() if not path.is_symlink()}
    assert made == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json",
        "preprocessor_config.json",
    }  # fmt: skip
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert (
        not lacks_hub_tokenizer(folder) and planned(folder).warnings == planned(blind).warnings[:-1]
    )


def test_text_of_a_tekken_model_goes_through_mistral_common(tmp_path: Path) -> None:
    config = tiny_config(layers=1)
    text = dataclasses.replace(config.text, vocab_size=800)
    write_tiny_checkpoint(tmp_path / "m", config=dataclasses.replace(config, text=text))
    shutil.copy(DATA / "tekken" / "tekken.json", tmp_path / "m")
    flags = planned(tmp_path / "m").flags
    assert flags["tokenizer-mode"] == flags["reasoning-parser"] == "mistral"


def test_plain_text_model(seeing: Path, tmp_path: Path) -> None:
    directory = tmp_path / "plain"
    config = tiny_config(layers=1)
    text = dataclasses.replace(config.text, vocab_size=448)
    write_tiny_checkpoint(directory, config=dataclasses.replace(config, text=text))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "chatml" / name, directory)
    flags = planned(directory).flags
    assert flags["config-format"] == "hf"
    for absent in ("tokenizer-mode", "tool-call-parser", "reasoning-parser", "limit-mm-per-prompt"):
        assert absent not in flags


def test_several_machines_go_over_ray(seeing: Path) -> None:
    flags = planned(seeing, tensor_parallel=2, pipeline_parallel=2).flags
    assert flags["tensor-parallel-size"] == 2 and flags["pipeline-parallel-size"] == 2
    assert flags["distributed-executor-backend"] == "ray"
    assert "distributed-executor-backend" not in planned(seeing, tensor_parallel=2).flags
    one = planned(seeing, tensor_parallel=2, uses_ray=True).flags
    assert one["distributed-executor-backend"] == "ray" and "pipeline-parallel-size" not in one


def test_shell_line_and_file_say_the_same_in_vllms_words(seeing: Path) -> None:
    plan = planned(seeing, max_model_len=100, max_sequences=8, gpu_memory_utilization=0.8)
    words = shlex.split(plan.shell().replace("\\\n", " "))
    assert words == plan.command() and words[:3] == ["vllm", "serve", str(seeing)]
    read = read_flags(words[3:])
    told = yaml.safe_load(plan.config())
    assert told.pop("model") == str(seeing)
    assert told == plan.flags and set(read) == set(told)
    for name, value in told.items():
        shown = "" if value is True else json.dumps(value) if isinstance(value, dict) else value
        assert read[name].replace(" ", "") == str(shown).replace(" ", "")
    assert (read["max-model-len"], read["max-num-seqs"]) == ("100", "8")


def test_what_vllm_does_otherwise_is_said(seeing: Path, tmp_path: Path) -> None:
    directory = tmp_path / "both"
    shutil.copytree(seeing, directory)
    (directory / "params.json").write_text("{}")
    plan = planned(directory)
    assert plan.flags["config-format"] == "hf"
    assert len(plan.warnings) == 2 and "llama_4_scaling_beta 0.1" in plan.warnings[1]
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["rope_parameters"]["llama_4_scaling_beta"] = 0.0
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "params.json").unlink()
    assert planned(directory).warnings == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 3}, "does not divide"),
        ({"tensor_parallel": 0}, "does not divide"),
        ({"pipeline_parallel": 5}, "the model has 2 layers"),
    ],
)
def test_impossible_splits_are_refused(seeing: Path, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(seeing, **options)


def test_print_shows_the_command_and_the_file(
    seeing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ["serve", str(seeing), "--engine", "vllm", "--limit", "images=3"]
    names = ["--served-model-name", "medium", "alias"]
    assert main([*serve, *names, "-tp", "2", "-pp", "2", "--print"]) == 0
    out = capsys.readouterr().out
    assert "ray start --head" in out and "THIS_MACHINE" in out
    command = out[out.index("vllm serve") :].replace("\\\n", " ")
    read = read_flags(shlex.split(command)[3:])
    assert read["served-model-name"] == "medium" and read["port"] == "8001"
    assert read["limit-mm-per-prompt"] == '{"image":3}' and read["pipeline-parallel-size"] == "2"
    assert read["max-num-seqs"] == "64" and read["gpu-memory-utilization"] == "0.9"
    assert main([*serve, "--print", "config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"] == str(seeing)


def test_flags_of_the_other_engine_are_refused(
    seeing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for words, message in (
        (["--engine", "vllm", "--kv-cache-tokens", "64", "--print"], "is for our own engine"),
        (["--engine", "vllm", "--mode", "declared", "--print"], "--mode is for our own engine"),
        (["--pipeline-parallel-size", "2"], "need --engine vllm"),
        (["--print"], "the command of --engine vllm"),
        (["--engine", "vllm", "--port", "0"], "vLLM is not installed here"),
    ):
        assert main(["serve", str(seeing), *words]) == 2
        assert message in capsys.readouterr().err


def test_serving_makes_the_missing_files_beside_the_checkpoint_and_takes_them_away(
    blind: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["serve", str(blind), "--engine", "vllm", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert "vLLM is not installed here" in said and "cannot place pictures" not in said
    assert f"vLLM reads {tmp_path}/halfbyte-vllm-" in said
    assert list(tmp_path.iterdir()) == []
