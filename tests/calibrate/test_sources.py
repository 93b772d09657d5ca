"""Where files are found: folders laid out as on the hub, and the hub itself (a local stand-in)."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from halfbyte.calibrate.blend import Blend, Source
from halfbyte.calibrate.documents import builtin_documents
from halfbyte.calibrate.draw import draw
from halfbyte.calibrate.sources import DataAccess, OpenedSource, open_source
from halfbyte.errors import UnsupportedError, UsageError

DATASET = "owner/rows"
OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


def _open(access: DataAccess, **source: Any) -> OpenedSource:
    blend = Blend("test", [Source(**source)])
    return open_source(blend.sources[0], blend, access)


def _rows(opened: OpenedSource) -> dict[str, list[str]]:
    return {
        split.name: [json.loads(line.data)["text"] for _, line in split.lines()]
        for split in opened.splits
    }


def _fill(folder: Path, names: dict[str, list[str]]) -> None:
    for name, texts in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


# --- folders


@pytest.mark.parametrize("place", ["owner/rows", "rows"])
def test_splits_are_found_as_files_shards_or_folders(tmp_path: Path, place: str) -> None:
    _fill(
        tmp_path / place,
        {
            "data/low.jsonl": ["a"],
            "data/lower.jsonl": ["no"],
            "high-00001-of-00002.jsonl": ["c"],
            "high-00000-of-00002.jsonl": ["b"],
            "mid/part.jsonl": ["d"],
            "mid/part.parquet": ["a copy of the same rows"],
        },
    )
    access = DataAccess(folder=tmp_path)
    opened = _open(access, dataset=DATASET, splits=["low", "high", "mid"])
    assert _rows(opened) == {"low": ["a"], "high": ["b", "c"], "mid": ["d"]}
    assert (opened.origin, opened.revision) == ("folder", None)
    with pytest.raises(UsageError, match=r"no none\.jsonl"):
        _open(access, dataset=DATASET, splits=["none"])


def test_the_download_cache_gives_the_pinned_revision(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--owner--rows"
    _fill(cache / "snapshots" / OLD, {"low.jsonl": ["old"]})
    _fill(cache / "snapshots" / NEW, {"low.jsonl": ["new"]})
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(OLD)
    access = DataAccess(folder=tmp_path)

    def text(**source: Any) -> list[str]:
        return _rows(_open(access, dataset=DATASET, splits=["low"], **source))["low"]

    assert text(revision="fedcba98") == ["new"]
    assert text() == ["old"]
    with pytest.raises(UsageError, match="pinned to revision 77"):
        text(revision="77")


def test_a_path_may_be_a_file_a_folder_or_a_pattern(tmp_path: Path) -> None:
    _fill(tmp_path, {"a__x.jsonl": ["1"], "a__y.jsonl": ["2"], "b.csv": ["3"]})
    blend = Blend(
        "test", [Source(path=path) for path in ("a__x.jsonl", ".", "a__*.jsonl", "b.csv")]
    )
    blend = Blend("test", blend.sources, folder=tmp_path)
    one, whole, pattern, wrong = blend.sources
    assert len(open_source(one, blend, DataAccess()).splits) == 1
    for source in (whole, pattern):
        names = [split.name for split in open_source(source, blend, DataAccess()).splits]
        assert names == ["a__x", "a__y"]
    with pytest.raises(UsageError, match=r"b\.csv is not one of"):
        open_source(wrong, blend, DataAccess())
    with pytest.raises(UsageError, match="no such file"):
        open_source(Source(path="missing"), blend, DataAccess())


def test_the_text_in_the_package_covers_seven_domains() -> None:
    names = [name for name, _ in builtin_documents()]
    assert len({name.rpartition("-")[0] for name in names}) == 7
    assert len(set(names)) == len(names)


# --- the hub


class _Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that reading a data set needs, from a folder per revision."""

    folder: Path
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        self.requests.append(format % args)

    def _say(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _info(self, revision: str) -> dict[str, Any]:
        root = self.folder / revision
        files = sorted(path for path in root.rglob("*") if path.is_file())
        siblings = [
            {
                "rfilename": path.relative_to(root).as_posix(),
                "size": path.stat().st_size,
                "blobId": "0" * 40,
                "lfs": {
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "size": path.stat().st_size,
                    "pointerSize": 130,
                },
            }
            for path in files
        ]
        return {"id": DATASET, "sha": revision, "private": False, "siblings": siblings}

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        api = f"/api/datasets/{DATASET}"
        if path == api:
            self._say(200, self._info(NEW))
        elif path.startswith(f"{api}/revision/"):
            revision = path.rpartition("/")[2]
            self._say(200, self._info(NEW if revision == "main" else revision))
        elif path.startswith(f"{api}/tree/"):
            files = self._info(path.rpartition("/")[2])["siblings"]
            entries = [
                {"type": "file", "path": file["rfilename"], "size": file["size"], "oid": "0" * 40}
                for file in files
            ]
            self._say(200, entries)
        elif path.startswith(f"{api}/commits/"):
            made = "2026-01-01T00:00:00.000Z"
            commits = [
                {"id": sha, "title": "t", "message": "", "date": made, "authors": []}
                for sha in (NEW, OLD)
            ]
            self._say(200, commits)
        elif path.startswith(f"/datasets/{DATASET}/resolve/"):
            revision, _, name = path.removeprefix(f"/datasets/{DATASET}/resolve/").partition("/")
            self._file(self.folder / revision / name)
        else:
            self._say(404, {"error": "Repository not found"})

    do_HEAD = do_GET

    def _file(self, path: Path) -> None:
        data = path.read_bytes()
        asked = self.headers.get("Range")
        if asked is None:
            self._send(200, data, "application/octet-stream")
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(data)
        if start >= len(data):
            self._say(416, {"error": "range"})
            return
        part = data[start:stop]
        stated = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        self._send(206, part, "application/octet-stream", Content_Range=stated)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Address, folder and request log of a stand-in hub."""
    pytest.importorskip("huggingface_hub", reason="reading from a hub needs huggingface_hub")
    folder = tmp_path / "revisions"
    folder.mkdir()
    requests: list[str] = []
    handler = type("Handler", (_Hub,), {"folder": folder, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_rows_come_from_the_hub_at_the_pinned_commit(
    hub: tuple[str, Path, list[str]], tekken: Path
) -> None:
    address, folder, requests = hub
    _fill(folder / OLD, {"data/low.jsonl": [f"old row {n}" for n in range(50)]})
    _fill(folder / NEW, {"data/low.jsonl": ["new"]})
    blend = Blend("t", [Source(dataset=DATASET, splits=["low"], revision=OLD[:8])], samples=3)
    data = draw(blend, tekken, access=DataAccess(allow_hub=True, endpoint=address))
    (member,) = data.provenance["members"]
    assert (member["origin"], member["revision"]) == ("hub", OLD)
    (file,) = member["splits"][0]["files"]
    stored = (folder / OLD / "data" / "low.jsonl").read_bytes()
    assert file["sha256"] == hashlib.sha256(stored).hexdigest()
    assert file["bytes"] == len(stored)
    assert not any(NEW in line and "resolve" in line for line in requests)
    local = Blend("t", [Source(path=str(folder / OLD / "data"), name=DATASET)], samples=3)
    assert draw(local, tekken).rows == data.rows


def test_parquet_on_the_hub_is_read_at_offsets(
    hub: tuple[str, Path, list[str]], tekken: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    address, folder, _ = hub
    (folder / NEW).mkdir()
    table = pyarrow.Table.from_pylist([{"text": f"row {n}"} for n in range(20)])
    parquet.write_table(table, folder / NEW / "low.parquet")
    blend = Blend("t", [Source(dataset=DATASET, splits=["low"])], samples=3, select="first")
    data = draw(blend, tekken, access=DataAccess(allow_hub=True, endpoint=address))
    assert data.provenance["members"][0]["revision"] == NEW
    assert len(data.rows) == 3


def test_what_the_hub_refuses_is_said_with_a_way_out(hub: tuple[str, Path, list[str]]) -> None:
    address, folder, _ = hub
    _fill(folder / NEW, {"low.jsonl": ["new"]})
    access = DataAccess(allow_hub=True, endpoint=address)
    with pytest.raises(UnsupportedError, match="local copy"):
        _open(access, dataset="owner/other", splits=["low"])
    with pytest.raises(UsageError, match="no commit begins with the pinned beef"):
        _open(access, dataset=DATASET, splits=["low"], revision="beef")
    with pytest.raises(UsageError, match=r"no high\.jsonl"):
        _open(access, dataset=DATASET, splits=["high"])


def test_a_local_folder_is_preferred_to_the_hub(
    hub: tuple[str, Path, list[str]], tmp_path: Path
) -> None:
    address, _, requests = hub
    _fill(tmp_path / "local" / DATASET, {"low.jsonl": ["here"]})
    access = DataAccess(folder=tmp_path / "local", allow_hub=True, endpoint=address)
    assert _rows(_open(access, dataset=DATASET, splits=["low"])) == {"low": ["here"]}
    assert requests == []
    shutil.rmtree(tmp_path / "local")
