"""A small Hugging Face Hub on 127.0.0.1: what the real client asks for to make, fill and copy a data set."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


@dataclass
class Hub:
    """What the server holds: repository -> path -> bytes."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, for as long as the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, status: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _missing(self) -> None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            if match := re.match(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
                files = hub.repositories.get(match[1])
                if files is None:
                    return self._missing()
                if match[2] not in files:
                    return self._answer(404, b"", X_Error_Code="EntryNotFound")
                data = files[match[2]]
                etag = hashlib.sha1(data).hexdigest()
                return self._answer(200, data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            if match := re.match(r"/api/datasets/([^/]+/[^/?]+)(/[^?]*)?", self.path):
                files = hub.repositories.get(match[1])
                if files is None:
                    return self._missing()
                if (match[2] or "").startswith("/tree"):
                    tree = [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                            for p, d in files.items()]  # fmt: skip
                    return self._answer(200, tree)
                info = {"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": p} for p in files], "private": False,
                        "disabled": False, "downloads": 0, "likes": 0, "tags": []}  # fmt: skip
                return self._answer(200, info)
            return self._answer(404)

        do_HEAD = do_GET  # noqa: N815 (the name is http.server's)

        def do_POST(self) -> None:
            hub.asked.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                if name in hub.repositories:
                    return self._answer(409, {"error": "exists", "url": f"{hub.url}/datasets/{name}"})
                hub.repositories[name] = {}
                return self._answer(200, {"url": f"{hub.url}/datasets/{name}"})
            if self.path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            if match := re.match(r"/api/datasets/([^/]+/[^/]+)/preupload/", self.path):
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._answer(200, {"files": files})
            if match := re.match(r"/api/datasets/([^/]+/[^/]+)/commit/", self.path):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        data = base64.b64decode(entry["value"]["content"])
                        hub.repositories[match[1]][entry["value"]["path"]] = data
                url = f"{hub.url}/datasets/{match[1]}/commit/{COMMIT}"
                return self._answer(200, {"success": True, "commitUrl": url, "commitOid": COMMIT})
            return self._answer(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
