"""A page of another origin in a real browser, against the API and the admin port."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.browser import CHROMIUM, Browser
from halfbyte.chat.tokens import load_chat
from halfbyte.server.config import ServerConfig
from halfbyte.server.http.admin import create_admin
from halfbyte.server.http.app import create_app
from halfbyte.server.ops.supervise import Supervisor
from halfbyte.server.run import address, listen, serving
from server.scripted import ScriptedService

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="needs Chromium (apt-get install chromium); make check has no way to it",
)

DATA = Path(__file__).parent.parent / "data" / "chat"
EOS = 2
CHAT = '{"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]}'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another origin</title>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def other_origin() -> Iterator[str]:
    """A page that is not the server's."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def served(
    service: ScriptedService, *, origins: tuple[str, ...] = ()
) -> Iterator[tuple[str, str, socket.socket]]:
    chat = load_chat(DATA / "tekken")
    config = ServerConfig(("m",), 4096, 800, allowed_origins=origins)
    app = create_app(Supervisor(service, lambda: service), chat, config, access_log=None)
    with listen("127.0.0.1", 0) as listener:
        admin = create_admin(app.state.backend, access_log=None)
        with serving(app, (admin, listener)) as url:
            yield url, address(listener), listener


def tried(browser: Browser, url: str, options: str) -> str:
    """What a page's script learns of a request: its answer, or that there is none for it."""
    return str(
        browser.run(
            f"fetch({url!r}, {options}).then(async r => r.type === 'opaque' ? 'opaque' : "
            "r.status + ' ' + await r.text(), e => 'failed')"
        )
    )


WAYS = {
    "as text": "{method: 'POST', mode: 'no-cors', body: BODY}",
    "as a form": "{method: 'POST', mode: 'no-cors', body: new URLSearchParams({a: BODY})}",
    "as a blob": "{method: 'POST', mode: 'no-cors', body: new Blob([BODY])}",
    "as json": "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: BODY}",
    "with a key": "{method: 'POST', headers: {Authorization: 'Bearer x'}, body: BODY}",
}


def test_no_page_of_another_origin_uses_or_reads_a_server(
    browser: Browser, other_origin: str
) -> None:
    service = ScriptedService(lambda request: [200, EOS])
    with served(service) as (url, admin, _):
        browser.open(other_origin)
        for name, way in WAYS.items():
            way = way.replace("BODY", repr(CHAT))
            assert tried(browser, f"{url}/v1/chat/completions", way) in ("failed", "opaque"), name
        for path in ("/drain", "/prefix-cache/clear"):
            tried(browser, admin + path, "{method: 'POST', mode: 'no-cors'}")
        for path in ("/v1/models", "/health", "/metrics"):
            assert tried(browser, url + path, "{}") == "failed"
            assert tried(browser, admin + path, "{}") == "failed"
        # A form that is sent by a script leaves the page and shows the refusal.
        browser.run(
            f"""(() => {{
              const form = document.createElement("form");
              form.method = "POST"; form.enctype = "text/plain";
              form.action = "{admin}/drain";
              document.body.append(form); form.submit();
            }})()"""
        )
        browser.until(f"location.href.startsWith({admin!r}) && document.readyState === 'complete'")
        assert "origin_not_allowed" in browser.run("document.body.textContent")
        assert not service.requests and "clear" not in service.calls
        # Nothing was drained, and the server's own page works.
        browser.open(url + "/")
        browser.until("document.getElementById('model').textContent.includes('m')")
        own = "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: BODY}"
        assert tried(browser, "v1/chat/completions", own.replace("BODY", repr(CHAT))).startswith(
            "200"
        )
        # A link from elsewhere leads to it.
        browser.open(other_origin)
        browser.run(f"location.href = {url + '/'!r}")
        browser.until("document.getElementById('model') !== null")
    browser.open("about:blank#done")


def test_an_allowed_origin_uses_and_reads_the_api_only(browser: Browser, other_origin: str) -> None:
    service = ScriptedService(lambda request: [200, EOS])
    with served(service, origins=(other_origin,)) as (url, admin, _):
        browser.open(other_origin)
        way = WAYS["as json"].replace("BODY", repr(CHAT))
        assert tried(browser, f"{url}/v1/chat/completions", way).startswith("200 ")
        assert tried(browser, f"{url}/v1/models", "{}").startswith("200 ")
        with_key = "{headers: {Authorization: 'Bearer x', 'x-stainless-lang': 'js'}}"
        assert tried(browser, f"{url}/v1/models", with_key).startswith("200 ")
        # An error can be read as well.
        wrong = WAYS["as json"].replace("BODY", "'{'")
        assert tried(browser, f"{url}/v1/chat/completions", wrong).startswith("400 ")
        assert tried(browser, f"{admin}/requests", "{}") == "failed"
        assert tried(browser, f"{admin}/drain", "{method: 'POST'}") == "failed"
        assert tried(browser, f"{url}/v1/models", "{}").startswith("200 ")
    assert len(service.requests) == 1
    browser.open("about:blank#done")
