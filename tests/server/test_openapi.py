"""Requests made up from the OpenAPI document: never a 500, always what the document promises."""

from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from halfbyte.server.config import Limits
from server.conftest import MakeBench

EOS = 2


ASKED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
PATHS = (
    *ASKED,
    "/v1/models",
    "/v1/models/{name}",
    "/tokenizer_info",
    "/health",
    "/ready",
    "/metrics",
)
CASES = [(path, GenerationMode.POSITIVE) for path in PATHS]
# Without a body there is nothing to get wrong.
CASES += [(path, GenerationMode.NEGATIVE) for path in ASKED]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_made_up_requests_get_what_the_document_promises(
    make_bench: MakeBench, path: str, mode: GenerationMode
) -> None:
    # Small limits, so that what is made up meets them.
    bench = make_bench("Hello", EOS, limits=Limits(messages=8, choices=4, prompts=8, stops=4))
    document = schemathesis.openapi.from_asgi("/openapi.json", bench.app)
    (operation,) = document[path].values()

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()


async def test_every_route_is_asked(make_bench: MakeBench) -> None:
    async with make_bench().http() as client:
        document = (await client.get("/openapi.json")).json()
    assert set(PATHS) | {"/health/ready"} == set(document["paths"])
    assert "security" not in document


async def test_document_says_which_routes_need_a_key(make_bench: MakeBench) -> None:
    async with make_bench(api_keys=("sesame",)).http() as client:
        headers = {"Authorization": "Bearer sesame"}
        document = (await client.get("/openapi.json", headers=headers)).json()
    assert document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]


STREAMED = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}


@pytest.mark.parametrize("keys", [(), ("k",)])
async def test_the_document_says_what_streams_and_what_needs_a_key(
    make_bench: MakeBench, keys: tuple[str, ...]
) -> None:
    bench = make_bench("Hello", EOS, api_keys=keys)
    async with bench.http() as client:
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        document = (await client.get("/openapi.json", headers=headers)).json()
    found = {
        path
        for path, operations in document["paths"].items()
        if "text/event-stream" in operations.get("post", {}).get("responses", {}).get("200", {})
        .get("content", {})
    }  # fmt: skip
    assert found == STREAMED
    assert document.get("security") == ([{"key": []}] if keys else None)
    assert ("securitySchemes" in document["components"]) == bool(keys)
    is_open = document["paths"]["/health"]["get"].get("security")
    assert is_open == ([] if keys else None)
