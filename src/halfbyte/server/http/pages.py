"""The chat page at /: files of this package, and Markdown made into HTML for it.

Nothing comes from elsewhere, and no script runs but the page's own, whatever a model writes.
"""

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

from halfbyte.errors import RequestError
from halfbyte.server.api.markdown import code_styles

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

_HEADERS = {
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
    """Add routes for the files of the chat page, which are read once."""
    folder = files("halfbyte.server.http").joinpath("web")
    contents = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    contents["code.css"] = code_styles().encode()

    def page(name: str) -> Response:
        kind = _TYPES[name[name.rindex(".") :]]
        return Response(contents[name], media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/web/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in contents:
            raise RequestError(f"no such path: /web/{name}", code="not_found", status=404)
        return page(name)
