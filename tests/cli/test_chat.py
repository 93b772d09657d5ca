"""`halfbyte chat DIR` answers as `halfbyte serve DIR` would."""

import json
import shutil
from pathlib import Path

import httpx
import pytest

from halfbyte.cli import chat
from halfbyte.cli.main import build_parser
from halfbyte.client.client import _check
from halfbyte.errors import UsageError
from halfbyte.model.tiny import write_tiny_checkpoint

CHATML = Path(__file__).parents[1] / "data" / "chat" / "chatml"


def test_a_folder_is_sampled_as_its_makers_recommend(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "tiny", layers=1)
    for file in CHATML.iterdir():
        shutil.copy(file, tmp_path / "tiny")
    told = {"temperature": 0.2, "top_p": 0.9}
    (tmp_path / "tiny" / "generation_config.json").write_text(json.dumps(told))
    words = [str(tmp_path / "tiny"), "--max-model-len", "256", "--kv-cache-tokens", "256"]
    args = build_parser("chat", chat).parse_args(words)
    with chat._local_server(args) as url:
        sampling = httpx.get(f"{url}/health", timeout=30).json()["sampling"]
    assert told.items() <= sampling.items()


def test_a_key_comes_from_a_variable_and_a_server_that_asks_for_one_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = ["http://127.0.0.1:9", "--api-key-env", "OUR_KEY"]
    parsed = build_parser("chat", chat).parse_args(args)
    with pytest.raises(UsageError, match="OUR_KEY: the environment has no such variable"):
        chat._key(parsed)
    monkeypatch.setenv("OUR_KEY", "sk-secret")
    assert chat._key(parsed) == "sk-secret"
    assert chat._key(build_parser("chat", chat).parse_args(args[:1])) is None
    with pytest.raises(UsageError, match="no API key was sent; give --api-key-env NAME"):
        _check(httpx.Response(401, json={"error": {"message": "no API key was sent"}}))
