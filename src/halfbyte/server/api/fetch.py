"""Fetches images from http(s) URLs, if the server was told to (decision 0011).

Off by default. When on: hosts from the allowlist only; each host is resolved once, every address
it has is checked, and the connection goes to the address that was checked; redirects start over;
the body is cut off at the limit while it streams; the whole has a deadline.
"""

import asyncio
import ipaddress
import socket
from urllib.parse import urljoin

import httpx

from halfbyte.errors import RequestError
from halfbyte.server.config import ImageFetch

# What the public internet does not route, by IANA's special-purpose registries, and ranges that
# once meant something else. Listed here because Python's own tables differ between versions.
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",
            "100.64.0.0/10",  # carrier NAT
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",
            "192.88.99.0/24",  # relays of 6to4, retired
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
            "2001:db8::/32",
            "2620:4f:8000::/48",
            "3fff::/20",
        ),
    )
)
# The only part of IPv6 that is handed out; all else is local, retired, or without a meaning yet.
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_MAX_URL_CHARS = 8192
# An IPv4 address in the last 32 bits, for the gateways of the network.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def fetch_image(url: str, path: str, policy: ImageFetch, max_bytes: int) -> bytes:
    """Fetch the bytes behind an image URL; RequestError if that is forbidden or fails."""
    if url.partition(":")[0].lower() not in ("http", "https"):
        raise _refused(path, "image URLs must begin with data:, http: or https:")
    if len(url) > _MAX_URL_CHARS:
        raise _refused(path, f"an address of {len(url):,} characters; {_MAX_URL_CHARS:,} are read")
    if not policy.hosts:
        raise _refused(path, "this server does not fetch image URLs; send a data: URL")
    try:
        async with asyncio.timeout(policy.deadline_s):
            for _ in range(policy.max_redirects + 1):
                data, redirect = await _get(url, path, policy, max_bytes)
                if redirect is None:
                    return data
                url = _joined(url, redirect, path)
    except TimeoutError as error:
        raise _refused(path, f"not fetched within {policy.deadline_s:g} s") from error
    raise _refused(path, f"more than {policy.max_redirects} redirects")


async def _get(url: str, path: str, policy: ImageFetch, max_bytes: int) -> tuple[bytes, str | None]:
    """One request: (body, None), or (b"", where it redirects to)."""
    host, request, extensions = await _pinned(url, path, policy)
    # Proxies and redirects of the client would connect to places that nobody has checked.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client:
        try:
            async with client.stream(
                "GET", request, headers={"Host": host}, extensions=extensions
            ) as response:
                if response.has_redirect_location:
                    return b"", response.headers["location"]
                if response.status_code != 200:
                    raise _refused(path, f"the image's server answered {response.status_code}")
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > max_bytes:
                        raise _refused(path, f"larger than {max_bytes:,} bytes")
                return bytes(body), None
        except httpx.HTTPError as error:
            raise _refused(path, f"not fetched: {type(error).__name__}") from error


def _joined(url: str, redirect: str, path: str) -> str:
    """Where a redirect leads; RequestError if that is no address."""
    try:
        return urljoin(url, redirect)
    except ValueError as error:
        raise _refused(path, "it redirects to an invalid URL") from error


async def _pinned(url: str, path: str, policy: ImageFetch) -> tuple[str, httpx.URL, dict[str, str]]:
    """(Host header, URL with the checked address for a host, TLS name) of a permitted URL."""
    try:
        parsed = httpx.URL(url)
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        host = parsed.host.rstrip(".").lower()
    except (httpx.InvalidURL, ValueError) as error:
        raise _refused(path, "not a valid URL") from error
    if parsed.scheme not in ("http", "https") or not host or parsed.userinfo:
        raise _refused(path, "not a plain http or https URL")
    if not host_allowed(host, policy.hosts):
        raise _refused(path, f"the host {host!r} is not on this server's allowlist")
    address = await _resolve(host, port, path)
    header = parsed.netloc.decode("ascii").rpartition("@")[2]
    return header, parsed.copy_with(host=address), {"sni_hostname": host}


async def _resolve(host: str, port: int, path: str) -> str:
    """One public address of a host; refused if any of its addresses is not public."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _refused(path, f"the host {host!r} cannot be resolved") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise _refused(path, f"the host {host!r} is not a public address")
    return addresses[0]


def host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a host is on the list: "*", an exact name, or ".example.com" and below."""
    for entry in allowed:
        name = entry.lower()
        if name == "*" or host == name.removeprefix("."):
            return True
        if name.startswith(".") and host.endswith(name):
            return True
    return False


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also when it hides in IPv6."""
    value = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(value, ipaddress.IPv6Address):
        hidden = value.ipv4_mapped or value.sixtofour
        if value in _NAT64:
            hidden = ipaddress.IPv4Address(int(value) & 0xFFFFFFFF)
        if hidden is not None:
            return is_public(str(hidden))
        if value not in _GLOBAL_UNICAST:
            return False
    is_listed = any(value in network for network in _NOT_PUBLIC)
    return value.is_global and not is_listed


def _refused(path: str, reason: str) -> RequestError:
    return RequestError(f"{path}: {reason}", param=path, code="invalid_image_url")
