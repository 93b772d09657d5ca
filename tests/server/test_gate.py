import base64
import json
from pathlib import Path

import pytest

from halfbyte.errors import RequestError, UsageError
from halfbyte.log import logger
from halfbyte.server.http.app import create_app
from halfbyte.server.http.gate import Keys, file_log, log_access
from server.conftest import MakeBench


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_keys_in_every_form() -> None:
    keys = Keys(["one", "zwei é"])
    names = {keys.name_of(value) for value in ("Bearer one", "bearer  one ", basic("x:one"))}
    assert len(names) == 1
    assert keys.name_of(basic(":zwei é")) not in names
    for wrong in ("", "one", "Bearer", "Bearer One", "Basic one", basic("one"), "Digest one"):
        with pytest.raises(RequestError) as caught:
            keys.name_of(wrong)
        assert caught.value.status == 401


def test_no_keys_ask_for_none() -> None:
    assert Keys([]).name_of("") == "anyone"


async def test_access_log_is_one_json_object_without_secrets(make_bench: MakeBench) -> None:
    bench = make_bench("x", 2, api_keys=("sesame",))
    backend = bench.app.state.backend
    lines: list[str] = []
    bench.app = create_app(backend.service, bench.chat, backend.config, access_log=lines.append)
    async with bench.http() as client:
        await client.get(
            "/v1/models?q=secret",
            headers={"Authorization": "Bearer sesame", "X-Request-Id": "a-1"},
        )
        await client.get("/v1/models")
    first, second = map(json.loads, lines)
    assert first["request_id"] == "a-1" and first["status"] == 200 and first["path"] == "/v1/models"
    assert first["client"] == "127.0.0.1"
    assert second["status"] == 401 and second["key"] == "-"
    assert "sesame" not in str(lines) and "secret" not in str(lines)


def test_access_log_goes_to_the_log_or_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda message, *rest: said.append(message % rest))
    log_access('{"a": 1}')
    assert said == ['access {"a": 1}']
    write = file_log(tmp_path / "access.jsonl")
    write('{"a": 1}')
    (tmp_path / "access.jsonl").rename(tmp_path / "old.jsonl")
    write('{"b": 2}')
    assert (tmp_path / "access.jsonl").read_text() == '{"b": 2}\n'
    # A disk that is full or gone later is no reason to stop serving, but is told each time.
    told: list[str] = []
    monkeypatch.setattr(logger, "error", lambda message, *rest: told.append(message % rest))
    (tmp_path / "access.jsonl").unlink()
    (tmp_path / "access.jsonl").mkdir()
    write('{"c": 3}')
    assert len(told) == 1 and "access.jsonl" in told[0] and "directory" in told[0]
    with pytest.raises(UsageError, match="cannot write the access log"):
        file_log(tmp_path / "nowhere" / "access.jsonl")
