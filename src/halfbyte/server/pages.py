"""The chat page at /: files of this package, nothing from elsewhere."""

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

from halfbyte.errors import RequestError

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
}

_HEADERS = {
    # Whatever a model writes into the page, nothing is loaded and no script runs.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    """Routes of the page; read once."""
    folder = files("halfbyte.server").joinpath("web")
    contents = {name: folder.joinpath(name).read_bytes() for name in _TYPES}

    def page(name: str) -> Response:
        return Response(contents[name], media_type=_TYPES[name], headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/web/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in contents:
            raise RequestError(f"no such path: /web/{name}", code="not_found", status=404)
        return page(name)
