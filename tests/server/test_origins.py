"""Web pages of other origins get nothing, programs notice nothing."""

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import RequestError, UsageError
from halfbyte.server.http.admin import create_admin
from halfbyte.server.http.origins import Origins, read_hosts, read_origins
from server.conftest import MakeBench

EOS = 2
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
FRIEND = "https://chat.example.com"


def headers(**fields: str) -> dict[bytes, bytes]:
    return {name.replace("_", "-").encode(): value.encode() for name, value in fields.items()}


def status_of(origins: Origins, method: str = "POST", **fields: str) -> int:
    """200, or how the request is refused."""
    try:
        origins.check(method, headers(**fields))
    except RequestError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "[::1]", "192.168.1.7:8000", "8.8.8.8",
        "localhost", "LOCALHOST:8000", "chat.localhost:8000", "gpu-box", "gpu-box:8000", "test",
    ],
)  # fmt: skip
def test_addresses_and_local_names_are_answered(host: str) -> None:
    assert status_of(Origins(), host=host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
        "127.0.0.1:8000.evil.example", "localhost.", "evil.", "", ":8000", "a:b:c",
        "[evil.example]",
        "[::1].evil.example", "evil.example:port", "user@evil.example", "::1.",
    ],
)  # fmt: skip
def test_names_of_others_are_not(host: str) -> None:
    assert status_of(Origins(), host=host) == 403
    assert status_of(Origins(hosts=("*",)), host=host) == 200


@given(st.from_regex(r"[a-z0-9-]{1,9}(\.[a-z0-9-]{1,9}){1,3}\.[a-z]{2,6}", fullmatch=True))
def test_a_name_is_answered_if_and_only_if_it_is_given(name: str) -> None:
    assert status_of(Origins(), host=name) == 403
    assert status_of(Origins(hosts=(name,)), host=f"{name.upper()}:8000") == 200
    assert status_of(Origins(hosts=(f".{name}",)), host=f"a.{name}") == 200
    assert status_of(Origins(hosts=(name,)), host=f"a.{name}") == 403
    assert status_of(Origins(hosts=(name,)), host=f"{name}.evil.example") == 403


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        # Programs.
        ({}, 200),
        ({"content_type": "text/plain", "content_length": "5"}, 200),
        # The server's own page.
        ({"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"}, 200),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        # Behind a proxy that changes Host.
        ({"origin": "https://chat.example", "sec_fetch_site": "same-origin"}, 200),
        # Other pages, as old and new browsers put it.
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://evil.example", "sec_fetch_site": "cross-site"}, 403),
        ({"origin": "http://127.0.0.1:3000", "sec_fetch_site": "same-site"}, 403),
        ({"origin": "http://localhost:8000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://127.0.0.1:8000.evil.example"}, 403),
        ({"origin": "file://"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate",
          "sec_fetch_dest": "document"}, 403),
        # A form of the server's own page could only be made by markup that got in.
        ({"origin": "http://127.0.0.1:8000", "content_type": "text/plain",
          "content_length": "5"}, 415),
        ({"origin": "http://127.0.0.1:8000", "content_length": "5"}, 415),
        ({"origin": "http://127.0.0.1:8000", "content_type": "multipart/form-data; boundary=x",
          "transfer_encoding": "chunked"}, 415),
        ({"origin": "http://127.0.0.1:8000", "content_type": "Application/JSON; charset=utf-8",
          "content_length": "5"}, 200),
    ],
)  # fmt: skip
def test_who_may_post(fields: dict[str, str], status: int) -> None:
    assert status_of(Origins(), host="127.0.0.1:8000", **fields) == status


def test_a_link_to_the_page_may_be_followed_but_not_framed() -> None:
    link = {"host": "localhost", "sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert status_of(Origins(), "GET", **link, sec_fetch_dest="document") == 200
    for place in ("iframe", "object", "embed", "frame"):
        assert status_of(Origins(), "GET", **link, sec_fetch_dest=place) == 403
    assert status_of(Origins(), "GET", **{**link, "sec_fetch_mode": "no-cors"}) == 403


async def test_an_allowed_origin_gets_everything_a_page_needs(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, allowed_origins=read_origins([FRIEND + "/"]), api_keys=("k",))
    asking = {
        "Origin": FRIEND,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        "Access-Control-Request-Private-Network": "true",
    }
    async with bench.http() as client:
        # A preflight carries no key.
        told = await client.request("OPTIONS", CHAT, headers=asking)
        assert told.status_code == 204 and not told.content
        assert told.headers["access-control-allow-origin"] == FRIEND
        assert "POST" in told.headers["access-control-allow-methods"]
        assert "x-stainless-lang" in told.headers["access-control-allow-headers"]
        assert told.headers["access-control-allow-private-network"] == "true"
        assert "Origin" in told.headers["vary"]
        sent = {"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"}
        # What is refused must be readable, too.
        for key, status in (("wrong", 401), ("k", 200)):
            answer = await client.post(
                CHAT, json=BODY, headers={**sent, "Authorization": f"Bearer {key}"}
            )
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == FRIEND
            assert "access-control-allow-credentials" not in answer.headers
        stream = await client.post(
            CHAT, json={**BODY, "stream": True}, headers={**sent, "Authorization": "Bearer k"}
        )
        assert stream.headers["access-control-allow-origin"] == FRIEND
        for origin in ("https://chat.example.com.evil.example", "http://chat.example.com", "null"):
            other = await client.request("OPTIONS", CHAT, headers={**asking, "Origin": origin})
            assert other.status_code == 403 and "--allow-origin" in other.text
            assert "access-control-allow-origin" not in other.headers


async def test_every_origin_may_be_allowed_and_none_is_by_default(make_bench: MakeBench) -> None:
    for allowed, status in ((("*",), 200), ((), 403)):
        bench = make_bench("x", EOS, allowed_origins=allowed)
        async with bench.http() as client:
            answer = await client.post(CHAT, json=BODY, headers={"Origin": "http://evil.example"})
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == (
                "*" if status == 200 else None
            )
    assert not bench.service.requests


async def test_admin_is_for_no_page_and_acts_for_none(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, allowed_origins=("*", FRIEND))
    backend = bench.app.state.backend
    transport = httpx.ASGITransport(app=create_admin(backend, access_log=None))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9") as client:
        for sent in (
            {"Origin": FRIEND},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Host": "evil.example"},
        ):
            for path in ("/drain", "/prefix-cache/clear"):
                assert (await client.post(path, headers=sent)).status_code == 403, sent
            assert (await client.get("/requests", headers=sent)).status_code == 403, sent
        assert not backend.admission.is_draining
        assert (await client.post("/drain")).status_code == 200


async def test_a_head_that_can_be_read_in_two_ways_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench("x", EOS, api_keys=("k",))
    async with bench.http() as client:
        for sent in (
            [("Authorization", "Bearer wrong"), ("Authorization", "Bearer k")],
            [("Authorization", "Bearer k"), ("Authorization", "Bearer k")],
            [("Authorization", "Bearer k"), ("Origin", "http://test"), ("Origin", "http://a.b")],
            [("Authorization", "Bearer k"), ("Content-Type", "a/b"), ("Content-Type", "c/d")],
        ):
            answer = await client.get("/v1/models", headers=sent)
            assert answer.status_code == 400 and answer.headers["connection"] == "close"
            assert sent[-1][0] in answer.json()["error"]["message"]
        both = {"Content-Length": "2", "Transfer-Encoding": "chunked"}
        answer = await client.post(CHAT, headers={"Authorization": "Bearer k", **both})
        assert answer.status_code == 400 and "Transfer-Encoding" in answer.text


def test_flags_are_read_strictly() -> None:
    assert read_origins(["HTTPS://Chat.Example.com/", "http://[::1]:3000", "*", "http://a:80"]) == (
        "https://chat.example.com", "http://[::1]:3000", "*", "http://a",
    )  # fmt: skip
    assert read_hosts(["GPU.example", ".example.com", "*"]) == ("gpu.example", ".example.com", "*")
    for wrong in ("chat.example.com", "https://a/b", "https://", "https://a b", "https://u@a", ""):
        with pytest.raises(UsageError, match="--allow-origin"):
            read_origins([wrong])
    for wrong in ("http://a", "a:80", "", "a b", "*.example.com", "[::1]"):
        with pytest.raises(UsageError, match="--allowed-host"):
            read_hosts([wrong])
