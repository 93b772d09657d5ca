"""What the server may fetch: against real sockets on this machine, names resolved by the test."""

import asyncio
import contextlib
import gzip
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import RequestError
from halfbyte.server.api import fetch
from halfbyte.server.api.fetch import fetch_image, host_allowed, is_public
from halfbyte.server.config import ImageFetch

OPEN = ImageFetch(hosts=("*",), deadline_s=2.0)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:0:0:0:0:80ff:fffe",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    for address in (
        "93.184.216.34",
        "1.1.1.1",
        "::ffff:93.184.216.34",
        "64:ff9b::5db8:d822",
        "2606:2800:220:1:248:1893:25c8:1946",
        "2a00:1450:4001::1",
    ):
        assert is_public(address), address


# First and last addresses of what must not be reached, and one between.
NETWORKS = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
    "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "2001::/32",
    "2001:2::/48", "2001:10::/28", "2001:db8::/32", "3fff::/20", "4000::/3", "5f00::/16",
    "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
]  # fmt: skip


@given(st.sampled_from(NETWORKS), st.data())
def test_no_address_of_a_special_network_is_public_in_any_guise(
    network: str, data: st.DataObject
) -> None:
    within = ipaddress.ip_network(network)
    offset = data.draw(
        st.sampled_from([0, within.num_addresses - 1]) | st.integers(0, within.num_addresses - 1)
    )
    address = within[offset]
    assert not is_public(str(address))
    if isinstance(address, ipaddress.IPv4Address):
        number = int(address)
        # Compatible, mapped, translated, and the well-known prefix of NAT64.
        for prefix in (0, 0xFFFF << 32, 0xFFFF << 48, 0x64FF9B << 96):
            assert not is_public(str(ipaddress.IPv6Address(prefix | number)))
        assert not is_public(str(ipaddress.IPv6Address(0x2002 << 112 | number << 80)))


def test_allowlist() -> None:
    hosts = ("images.example.org", ".example.com")
    for host in ("images.example.org", "example.com", "a.b.example.com"):
        assert host_allowed(host, hosts)
    for host in ("example.org", "badexample.com", "example.com.evil.net", "images.example.org.x"):
        assert not host_allowed(host, hosts)
    assert not host_allowed("anything", ())


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://localhost/x.png",
        "http://[::1]/x.png",
        "http://2130706433/x.png",
        "http://0x7f000001/",
        "http://127.1/",
        "http://user:password@example.com/x.png",
        "http:///x.png",
        "http://",
        "https://exa mple.com/",
        "http://example.com:99999/",
        "file:///etc/passwd",
        "ftp://example.com/x.png",
        "gopher://x",
        "javascript:alert(1)",
        "//example.com/x.png",
        "x.png",
        "",
        "http://" + "a" * 9000,
    ],
)
async def test_urls_that_are_refused_even_when_every_host_is_allowed(url: str) -> None:
    with pytest.raises(RequestError) as caught:
        await fetch_image(url, "messages[0]", OPEN, 1000)
    assert caught.value.param == "messages[0]" and caught.value.status == 400


@pytest.mark.parametrize(
    ("found", "is_reached"),
    [
        (["93.184.215.14"], True),
        (["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"], True),
        (["93.184.215.14", "10.0.0.1"], False),
        (["127.0.0.1"], False),
        ([], False),
    ],
)
async def test_a_host_is_reached_if_all_its_addresses_are_public(
    monkeypatch: pytest.MonkeyPatch, found: list[str], is_reached: bool
) -> None:
    async def looked_up(host: str, port: int, **options: Any) -> Any:
        assert (host, port) == ("example.com", 443)
        return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", looked_up)
    if is_reached:
        assert await fetch._resolve("example.com", 443, "p") == found[0]
        return
    with pytest.raises(RequestError, match="not a public address"):
        await fetch._resolve("example.com", 443, "p")


async def test_nothing_is_fetched_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*arguments: Any) -> Any:
        raise AssertionError("resolved a name")

    monkeypatch.setattr(fetch, "_resolve", never)
    with pytest.raises(RequestError, match="does not fetch"):
        await fetch_image("http://example.com/x.png", "p", ImageFetch(), 1000)
    policy = ImageFetch(hosts=("other.example.com",))
    with pytest.raises(RequestError, match="allowlist"):
        await fetch_image("http://example.com/x.png", "p", policy, 1000)


Reply = Callable[[str], bytes]


@contextlib.asynccontextmanager
async def site(reply: Reply) -> AsyncIterator[tuple[int, list[str]]]:
    """An HTTP server on this machine; gives its port and the requests it saw."""
    seen: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            seen.append(head)
            writer.write(reply(head.split()[1]))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], seen


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """example.com is this machine, and counts as public; the rest is resolved as always."""
    asked: list[str] = []
    resolve = fetch._resolve

    async def pinned(host: str, port: int, path: str) -> str:
        asked.append(host)
        return "127.0.0.1" if host == "example.com" else await resolve(host, port, path)

    monkeypatch.setattr(fetch, "_resolve", pinned)
    return asked


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


async def test_fetches_from_the_checked_address_under_the_hosts_name(names: list[str]) -> None:
    async with site(lambda path: ok(b"pixels")) as (port, seen):
        url = f"http://example.com:{port}/a.png?x=1"
        assert await fetch_image(url, "p", OPEN, 1000) == b"pixels"
    assert names == ["example.com"]
    assert "GET /a.png?x=1" in seen[0] and f"Host: example.com:{port}" in seen[0]


async def test_redirects_are_checked_again_and_counted(names: list[str]) -> None:
    async with site(lambda path: redirect("/b") if path == "/a" else ok(b"x")) as (port, _):
        assert await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 9) == b"x"
    assert names == ["example.com", "example.com"]
    async with site(lambda path: redirect("/a")) as (port, seen):
        with pytest.raises(RequestError, match="redirects"):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 9)
    assert len(seen) == 4


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:{port}/b", "http://localhost:{port}/b", "file:///etc/passwd"]
)
async def test_redirects_into_the_own_network_are_refused(names: list[str], location: str) -> None:
    def reply(path: str) -> bytes:
        return redirect(location.format(port=port)) if path == "/a" else ok(b"secret")

    async with site(reply) as (port, seen):
        with pytest.raises(RequestError):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 1000)
    assert len(seen) == 1


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher", "ws", "data"])
async def test_a_redirect_leads_to_http_only(names: list[str], scheme: str) -> None:
    """Refused before the name is looked up, whatever the client that fetches would say to it."""
    async with site(lambda path: redirect(f"{scheme}://example.com/b")) as (port, _):
        with pytest.raises(RequestError, match="not a plain http or https URL"):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 1000)
    assert names == ["example.com"]


@pytest.mark.parametrize("status", [300, 301, 304, 307, 399])
@pytest.mark.parametrize("location", [None, "http://[", "http://[::1/x", "//[x]", "\u2100", ""])
async def test_redirects_to_nowhere_are_refused(
    names: list[str], status: int, location: str | None
) -> None:
    to = "" if location is None else f"Location: {location}\r\n"
    answer = f"HTTP/1.1 {status} x\r\n{to}Content-Length: 0\r\n\r\n".encode()
    async with site(lambda path: answer) as (port, _):
        with pytest.raises(RequestError, match=r"^p: "):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 1000)


@pytest.mark.parametrize(
    "url",
    ["http://[", "http://[x]/", "http://a]/", "https://[::1", "http:", "https:/", "http://\0/",
     "http://\u2100.com/", "http://a:b/", "http://a:99999/", "http://a..b/", "http://%00/",
     "http://" + "a" * 300, "http://" + "a." * 200, "http://xn--/", "http://x@/", "HTTP://[::1]x/",
     "http://example.com/" + "a" * 9000, "//example.com/", "[", ":", "", "http"],
)  # fmt: skip
async def test_what_is_no_address_is_refused_whatever_the_policy(url: str) -> None:
    for policy in (OPEN, ImageFetch()):
        with pytest.raises(RequestError, match=r"^p: "):
            await fetch_image(url, "p", policy, 9)


async def test_body_is_cut_off_while_it_streams(names: list[str]) -> None:
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 10_000_000
    async with site(lambda path: endless) as (port, _):
        with pytest.raises(RequestError, match="larger than 5,000"):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 5000)


async def test_compressed_bodies_count_unpacked(names: list[str]) -> None:
    body = gzip.compress(b"x" * 1_000_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with site(lambda path: head + body) as (port, _):
        with pytest.raises(RequestError, match="larger"):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 5000)


async def test_slow_and_failing_servers(names: list[str]) -> None:
    missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    async with site(lambda path: missing) as (port, _):
        with pytest.raises(RequestError, match="404"):
            await fetch_image(f"http://example.com:{port}/a", "p", OPEN, 9)
    policy = ImageFetch(hosts=("*",), deadline_s=0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://example.com:{silent.getsockname()[1]}/a"
        with pytest.raises(RequestError, match=r"within 0\.2 s"):
            await fetch_image(url, "p", policy, 9)
