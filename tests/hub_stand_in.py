"""A small hub on 127.0.0.1: what publishing asks of the real one, and faults on demand."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

NAME = "me/small"


@dataclass
class Hub:
    """One model repository.

    commits    names of the files of each commit
    fails_at   number of the commit that is refused with 500, from 1
    damages    name of a file that arrives with other bytes
    """

    url: str = ""
    exists: bool = False
    private: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    fails_at: int | None = None
    damages: str | None = None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        if path == f"/api/models/{NAME}" and hub.exists:
            self._json({"id": NAME, "sha": "0" * 40, "private": hub.private, "siblings": []})
        else:
            self._json({"error": "Repository not found"}, 404)

    def do_PUT(self) -> None:
        hub, path, body = self.hub, urlsplit(self.path).path, self._body()
        if path == f"/api/models/{NAME}/settings":
            told = json.loads(body)
            hub.private = told.get("visibility", "private") == "private"
            self._json({})
        else:
            hub.objects[path.rpartition("/")[2]] = body
            self._json({})

    def do_POST(self) -> None:
        hub, path, body = self.hub, urlsplit(self.path).path, self._body()
        if path == "/api/repos/create":
            status = 409 if hub.exists else 200
            if not hub.exists:
                hub.private = json.loads(body).get("visibility") == "private"
            hub.exists = True
            self._json({"url": f"{hub.url}/{NAME}", "name": NAME, "id": "1"}, status)
        elif path == "/api/validate-yaml":
            _, block, _ = json.loads(body)["content"].split("---\n", 2)
            is_fine = "license" in yaml.safe_load(block)
            errors = [] if is_fine else [{"message": "license is missing"}]
            self._json({"errors": errors, "warnings": []}, 200 if is_fine else 400)
        elif path == f"/api/models/{NAME}/preupload/main":
            files = [
                {"path": one["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            self._json({"files": files})
        elif path == f"/{NAME}.git/info/lfs/objects/batch":
            objects = []
            for one in json.loads(body)["objects"]:
                entry = dict(one)
                if one["oid"] not in hub.objects:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
                objects.append(entry)
            self._json({"transfer": "basic", "objects": objects})
        elif path == f"/api/models/{NAME}/commit/main":
            self._commit(body)
        elif path == f"/api/models/{NAME}/paths-info/main":
            names = parse_qs(body.decode())["paths"]
            self._json([self._info(name) for name in names if name in hub.files])
        else:
            self._json({"error": f"no such route {path}"}, 404)

    def _commit(self, body: bytes) -> None:
        hub, names = self.hub, []
        if hub.fails_at == len(hub.commits) + 1:
            hub.fails_at = None
            self._json({"error": "the stand-in was told to fail"}, 400)
            return
        for line in map(json.loads, body.splitlines()):
            told = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(told["content"])
            elif line["key"] == "lfsFile":
                content = hub.objects[told["oid"]]
                hub.large.add(told["path"])
            else:
                continue
            names.append(told["path"])
            hub.files[told["path"]] = content + b"!" if told["path"] == hub.damages else content
        hub.commits.append(names)
        oid = f"{len(hub.commits):040x}"
        self._json({"commitUrl": f"{hub.url}/{NAME}/commit/{oid}", "commitOid": oid})

    def _info(self, name: str) -> dict[str, Any]:
        content = self.hub.files[name]
        head = f"blob {len(content)}\0".encode()
        info = {"type": "file", "path": name, "size": len(content),
                "oid": hashlib.sha1(head + content).hexdigest()}  # fmt: skip
        if name in self.hub.large:
            digest = hashlib.sha256(content).hexdigest()
            info["lfs"] = {"size": len(content), "oid": digest, "pointerSize": 130}
        return info


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub while it lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
