"""Files of the chat page: those that there are, as what they are, and no others."""

from importlib.resources import files

import httpx
import pytest
from fastapi import FastAPI

from halfbyte.errors import RequestError
from halfbyte.server.http.pages import add_pages


async def test_every_file_is_served_and_no_other() -> None:
    app = FastAPI()
    add_pages(app)
    folder = files("halfbyte.server.http").joinpath("web")
    names = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert len(names) >= 3
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://here"
    ) as client:
        for name, content in names.items():
            found = await client.get(f"/web/{name}")
            assert found.content == content
            kind = kinds.get(name.rpartition(".")[2])
            assert kind is None or found.headers["Content-Type"].startswith(kind)
            assert "default-src 'none'" in found.headers["Content-Security-Policy"]
        assert (await client.get("/")).content == names["index.html"]
        assert (await client.get("/web/code.css")).status_code == 200
        with pytest.raises(RequestError, match=r"no such path: /web/other\.js"):
            await client.get("/web/other.js")
