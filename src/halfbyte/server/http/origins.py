"""Which web pages may use this server: the checks of Host, Origin and content type, and CORS.

A browser sends whatever page it shows to any address that the page names, this machine's own
included. It says whose page that is (Origin, Sec-Fetch-*), asks before requests that a form could
not make (preflight), and keeps answers from pages that were not allowed to read them. A page whose
name is made to resolve to this machine is of the same origin, though; only Host tells it apart
(decision 0047). Programs that are no browsers send none of these and notice nothing but Host.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from halfbyte.errors import RequestError, UsageError
from halfbyte.server.api.fetch import host_allowed

Headers = Mapping[bytes, bytes]

# A preflight's answer is good for so long.
_MAX_AGE_S = 600
# What a page may read of an answer beside its body.
_EXPOSED = b"x-request-id, retry-after, x-halfbyte-warning"
_METHODS = b"GET, POST, OPTIONS"
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,2000}\Z")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/:?#@\[\]]+)(:[0-9]{1,5})?\Z")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def read_origins(given: Iterable[str]) -> tuple[str, ...]:
    """Origins of the command line, as browsers write them; UsageError for a word that is none."""
    origins = []
    for value in given:
        origin = value.strip().lower().removesuffix("/")
        if origin not in ("*", "null") and not _ORIGIN.match(origin):
            raise UsageError(
                f"--allow-origin {value}: an origin is SCHEME://HOST or SCHEME://HOST:PORT without "
                "a path, as in https://chat.example.com, or * for every page"
            )
        origins.append(_without_default_port(origin))
    return tuple(dict.fromkeys(origins))


def read_hosts(given: Iterable[str]) -> tuple[str, ...]:
    """Host names of the command line; UsageError for a word that is none."""
    hosts = []
    for value in given:
        host = value.strip().lower()
        if not re.match(r"\*\Z|\.?[^\s/:@*\[\]]+\Z", host):
            raise UsageError(
                f"--allowed-host {value}: give a name without scheme and port, .example.com for "
                "all below, or * for any"
            )
        hosts.append(host)
    return tuple(dict.fromkeys(hosts))


@dataclass(frozen=True, slots=True)
class Origins:
    """Which hosts and web origins one listener lets in.

    hosts     names of this server beside loopback ones, addresses and names without a dot; "*" for
              any, ".example.com" for all below
    allowed   origins whose pages may use it, "*" for any
    """

    hosts: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()

    def check(self, method: str, headers: Headers) -> None:
        """Refuse (403, 415) what no page may send, and pages of origins that are not let in."""
        self._check_host(headers)
        origin = headers.get(b"origin")
        # No page can make this up; it holds behind a proxy that changes Host, too.
        is_own = headers.get(b"sec-fetch-site") == b"same-origin"
        if origin is not None and not is_own:
            name = _text(origin)
            if not self.allows(name) and not _is_own(name, _text(headers.get(b"host", b""))):
                raise _foreign(f"of the origin {name!r}", f"--allow-origin {name}")
        else:
            self._check_fetch(method, headers)
        if origin is not None or b"sec-fetch-site" in headers:
            _check_content_type(method, headers)

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin were named as ones that may use the server."""
        return "*" in self.allowed or _without_default_port(origin.lower()) in self.allowed

    def preflight(self, method: str, headers: Headers) -> list[tuple[bytes, bytes]] | None:
        """Headers that answer an allowed preflight request; None for any other request."""
        origin = headers.get(b"origin")
        if method != "OPTIONS" or origin is None or not self.allows(_text(origin)):
            return None
        if b"access-control-request-method" not in headers:
            return None
        answer = [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", str(_MAX_AGE_S).encode()),
        ]
        names = headers.get(b"access-control-request-headers", b"")
        if names and _HEADER_NAMES.match(names):
            # Client libraries add headers of their own; none of them means anything dangerous here.
            answer.append((b"access-control-allow-headers", names))
        if headers.get(b"access-control-request-private-network") == b"true":
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer

    def response_headers(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """What lets a page of an allowed origin read the answer."""
        origin = headers.get(b"origin")
        if origin is None or not self.allowed:
            return []
        vary = [(b"vary", b"Origin")]
        if not self.allows(_text(origin)):
            return vary
        shown = b"*" if "*" in self.allowed else origin
        return [
            *vary,
            (b"access-control-allow-origin", shown),
            (b"access-control-expose-headers", _EXPOSED),
        ]

    def _check_host(self, headers: Headers) -> None:
        host = headers.get(b"host")
        # Only HTTP/1.0 may leave it out, and no browser does.
        if host is None or "*" in self.hosts:
            return
        name = _host_name(_text(host))
        # The public name system has no name without a dot, so nobody can make one resolve here.
        is_local = name == "localhost" or name.endswith(".localhost") or "." not in name
        if not is_local and not _is_address(name) and not host_allowed(name, self.hosts):
            raise RequestError(
                f"this server does not answer to the name {name!r}; whoever runs it can allow the "
                f"name with --allowed-host {name}",
                param="Host",
                code="host_not_allowed",
                status=403,
            )

    def _check_fetch(self, method: str, headers: Headers) -> None:
        """Requests for which browsers send no Origin: links, pictures, scripts, forms of old."""
        site = headers.get(b"sec-fetch-site", b"none")
        if site in (b"none", b"same-origin") or "*" in self.allowed:
            return
        # Following a link from elsewhere is how one comes to the page. It shows the answer to the
        # reader only, and nothing that answers to GET changes anything.
        is_link = headers.get(b"sec-fetch-mode") == b"navigate"
        is_link = is_link and headers.get(b"sec-fetch-dest") == b"document"
        if not (is_link and method in ("GET", "HEAD")):
            raise _foreign("of another origin", "--allow-origin")


def _check_content_type(method: str, headers: Headers) -> None:
    """Bodies from browsers must be of a type that no form and no script can send unasked."""
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    if method in ("GET", "HEAD", "OPTIONS") or not has_body:
        return
    kind = _text(headers.get(b"content-type", b"")).partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"a web page's request must have the content type application/json, not {kind!r}",
            param="Content-Type",
            code="unsupported_media_type",
            status=415,
        )


def _foreign(whose: str, flag: str) -> RequestError:
    return RequestError(
        f"this server is not open to pages {whose}; whoever runs it can allow them with {flag}",
        param="Origin",
        code="origin_not_allowed",
        status=403,
    )


def _is_own(origin: str, host: str) -> bool:
    """Whether a page came from this server itself, by the name it was asked for.

    Without a look at the scheme: a proxy may have taken TLS off.
    """
    scheme, _, netloc = origin.lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    own = {host.lower(), host.lower().removesuffix(f":{port}")}
    return bool(netloc) and netloc in own


def _without_default_port(origin: str) -> str:
    scheme, _, _ = origin.partition("://")
    return origin.removesuffix(f":{_DEFAULT_PORTS.get(scheme, '-')}")


def _host_name(host: str) -> str:
    """The name or address of a Host header, without port; "" for what is neither."""
    match = re.match(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]{0,5})?\Z", host.strip().lower())
    if match is None:
        return host.strip().lower() + "."
    if match[1] is not None:
        # Brackets hold addresses only.
        return match[1] if _is_address(match[1]) else match[1] + "."
    return match[2] or "."


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _text(value: bytes) -> str:
    return value.decode("latin-1")
