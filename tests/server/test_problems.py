"""Errors as clients of either wire are told them."""

import json
from typing import Any

import pytest

from halfbyte.errors import CapacityError, RequestError, UsageError
from halfbyte.server.api.problems import error_body, response_of


@pytest.mark.parametrize(
    "error, status, kind, code",
    [
        (RequestError("no", param="a"), 400, "invalid_request_error", "invalid_value"),
        (RequestError("no", status=401), 401, "authentication_error", "invalid_value"),
        (RequestError("no", status=403), 403, "permission_error", "invalid_value"),
        (RequestError("no", status=404), 404, "not_found_error", "invalid_value"),
        (RequestError("no", status=408), 408, "timeout_error", "invalid_value"),
        (RequestError("no", status=413), 413, "invalid_request_error", "invalid_value"),
        (RequestError("no", status=422), 422, "invalid_request_error", "invalid_value"),
        (RequestError("no", status=429), 429, "rate_limit_error", "invalid_value"),
        (RequestError("no", status=504), 504, "timeout_error", "invalid_value"),
        (RequestError("no", status=507), 507, "server_error", "invalid_value"),
        (CapacityError("no"), 503, "service_unavailable_error", "over_capacity"),
        (UsageError("no"), 500, "server_error", "internal_error"),
    ],
)
def test_an_error_has_its_status_and_kind(
    error: Exception, status: int, kind: str, code: str
) -> None:
    found = response_of(error, 7)
    told = json.loads(bytes(found.body))["error"]
    assert (found.status_code, told["type"], told["message"]) == (status, kind, "no")
    assert told["code"] == code and told["param"] == getattr(error, "param", None)
    assert found.headers.get("Retry-After") == ("7" if status in (429, 503) else None)
    assert ("WWW-Authenticate" in found.headers) == (status == 401)
    assert found.headers.get("Connection") == ("close" if status == 408 else None)


@pytest.mark.parametrize(
    "error, kind",
    [
        (RequestError("no"), "invalid_request_error"),
        (RequestError("no", status=404), "not_found_error"),
        (RequestError("no", status=413), "request_too_large"),
        (RequestError("no", status=414), "invalid_request_error"),
        (RequestError("no", status=429), "rate_limit_error"),
        (RequestError("no", status=504), "timeout_error"),
        (CapacityError("no"), "overloaded_error"),
        (UsageError("no"), "api_error"),
    ],
)
def test_clients_of_messages_get_its_form_and_words(error: Exception, kind: str) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        told: dict[str, Any] = json.loads(bytes(response_of(error, path=path).body))
        assert told == {"type": "error", "error": {"type": kind, "message": "no"}}
    assert "type" not in json.loads(bytes(response_of(error, path="/v1/chat").body))


def test_an_internal_fault_says_nothing_of_its_inside() -> None:
    found = response_of(ValueError("secret"))
    assert found.status_code == 500 and b"secret" not in bytes(found.body)


def test_of_a_long_message_both_ends_are_told() -> None:
    whole = error_body("a" * 1000 + "b" * 1000, 400)["error"]["message"]
    assert whole == "a" * 1000 + "b" * 1000
    cut = error_body("a" * 1000 + "-" + "b" * 1000, 400)["error"]["message"]
    assert cut == "a" * 1000 + " [...] " + "b" * 1000


def test_a_connection_ends_after_what_is_no_http() -> None:
    found = response_of(RequestError("no", code="invalid_http"))
    assert found.headers["Connection"] == "close"
