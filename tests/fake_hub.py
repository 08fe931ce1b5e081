"""A stand-in of the hub's API: what huggingface_hub 2.4 asks for where a repository is made and pushed to.

Large files come by git LFS (HF_HUB_DISABLE_XET=1 in the client): batch, PUT, verify; small ones inside the
commit. `repositories` holds what was committed, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin_of_a_secret"
OWNER = "ada"
_LARGE = (".safetensors", ".parquet")
_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)/(\w+)/main")
_LFS = re.compile(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[tuple[str, str], bool] = {}
        self.commits: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.checked: list[dict[str, Any]] = []
        self.broken = ""  # a path that answers 500

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: Any = None) -> None:
        body = json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> bool:
        path = self.path.partition("?")[0]
        if self.server.broken and self.server.broken in path:
            self._answer(400, {"error": "out of order"})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        else:
            return False
        return True

    def do_GET(self) -> None:
        if self._refused():
            return
        found = _API.fullmatch(self.path.partition("?")[0])
        if not found or found[3] != "tree":
            return self._answer(404, {"error": f"no {self.path}"})
        files = self.server.repositories.get((found[1], found[2]), {})
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        self._answer(200, rows)

    def do_PUT(self) -> None:
        # a signed address: the real one takes no token either
        data = self._body()
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(data).hexdigest() != oid:
            return self._answer(400, {"error": "these are not the bytes that were promised"})
        self.server.blobs[oid] = data
        self._answer(200)

    def do_POST(self) -> None:
        body = self._body()
        if self._refused():
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            self.server.checked.append(json.loads(body))
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/lfs-verify":
            row = json.loads(body)
            known = len(self.server.blobs.get(row["oid"], b"")) == row["size"]
            return self._answer(200 if known else 404)
        if _LFS.fullmatch(path):
            return self._batch(json.loads(body))
        found = _API.fullmatch(path)
        if found and found[3] == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if found and found[3] == "commit":
            return self._commit((found[1], found[2]), body)
        self._answer(404, {"error": f"no {path}"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        key = (asked.get("type", "model"), name)
        if asked["organization"] != OWNER:
            return self._answer(403, {"error": "You don't have the rights"})
        if key in self.server.repositories:
            return self._answer(409, {"error": "You already created this repo"})
        self.server.repositories[key] = {".gitattributes": b"*.safetensors filter=lfs"}
        self.server.private[key] = asked.get("visibility") == "private" or asked.get("private")
        part = "" if key[0] == "model" else "datasets/"
        self._answer(200, {"url": f"{self.server.url}/{part}{name}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **item,
                "actions": {
                    "upload": {"href": f"{self.server.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs-verify"},
                },
            }
            for item in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, key: tuple[str, str], body: bytes) -> None:
        files = dict(self.server.repositories[key])
        for line in body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                self.server.commits.append(value)
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repositories[key] = files
        oid = hashlib.sha1(body).hexdigest()
        self._answer(
            200,
            {"commitUrl": f"{self.server.url}/{key[1]}/commit/{oid}", "commitOid": oid},
        )


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The stand-in, on a free port of this machine."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
