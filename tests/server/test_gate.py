import base64
import json
import logging

import pytest

from halfbyte.errors import RequestError
from halfbyte.log import logger
from halfbyte.server.app import create_app
from halfbyte.server.gate import Keys, log_access
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


async def test_access_log_is_one_json_object_without_secrets(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench("x", 2, api_keys=("sesame",))
    backend = bench.app.state.backend
    bench.app = create_app(backend.service, bench.chat, backend.config, access_log=log_access)
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger="halfbyte"):
        async with bench.http() as client:
            await client.get(
                "/v1/models?q=secret",
                headers={"Authorization": "Bearer sesame", "X-Request-Id": "a-1"},
            )
            await client.get("/v1/models")
    lines = [record.getMessage() for record in caplog.records]
    lines = [line.removeprefix("access ") for line in lines if line.startswith("access ")]
    first, second = map(json.loads, lines)
    assert first["request_id"] == "a-1" and first["status"] == 200 and first["path"] == "/v1/models"
    assert second["status"] == 401 and second["key"] == "-"
    assert "sesame" not in str(lines) and "secret" not in str(lines)
