"""`halfbyte chat DIR` answers as `halfbyte serve DIR` would."""

import json
import shutil
from pathlib import Path

import httpx

from halfbyte.cli import chat
from halfbyte.cli.main import build_parser
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
