"""docs/api.md and the dashboard say what the program does."""

import json
import re
from pathlib import Path

import pytest

from halfbyte.cli.main import main
from halfbyte.server.api import wire
from server.conftest import MakeBench

DOCS = Path(__file__).parent.parent.parent / "docs"


async def test_every_route_is_in_the_document(make_bench: MakeBench) -> None:
    text = (DOCS / "api.md").read_text()
    async with make_bench().http() as client:
        document = (await client.get("/openapi.json")).json()
    for path in document["paths"]:
        assert path.replace("{name}", "NAME") in text, path


def test_every_field_and_every_ignored_field_is_in_the_document() -> None:
    text = (DOCS / "api.md").read_text()
    fields = {*wire.ChatRequest.model_fields, *wire.ChatRequest.IGNORED}
    fields |= wire.AssistantMessage.IGNORED | {"echo", "best_of", "suffix"}
    obvious = {"model", "messages", "stream", "modalities", "verbosity"}
    for name in fields - obvious:
        assert f"`{name}`" in text or f"`{name}:" in text, name


async def test_dashboard_asks_for_figures_that_exist(
    make_bench: MakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--print-dashboard"])
    assert not ended.value.code
    dashboard = capsys.readouterr().out
    json.loads(dashboard)
    async with make_bench().http() as client:
        text = (await client.get("/metrics")).text
    asked = set(re.findall(r"halfbyte_\w+", dashboard))
    # The engine's figures come from the real engine's statistics, which flows test.
    for name in asked - {name for name in asked if name.startswith("halfbyte_engine_")}:
        assert name in text, name
