"""A Hugging Face hub on the loopback interface: the routes that listing and downloading a repository use."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Refusal:
    """An error status with the headers by which the hub tells what kind it is."""

    status: int
    code: str = ""
    message: str = ""


@dataclass
class FakeHub:
    """Serves `repositories` (name to files) at `url`; `api_refusals` and `file_refusals` are by name.

    `downloaded` has the path of every file that was sent, `tokens` the authorization of every request.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    api_refusals: dict[str, Refusal] = field(default_factory=dict)
    file_refusals: dict[str, Refusal] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    downloaded: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.tokens.add(self.headers.get("authorization"))
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self._api(path.removeprefix("api/models/"))
        elif "/resolve/" in path:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._file(name, revision, file)
        else:
            self._send(404)

    def log_message(self, *args: object) -> None:
        pass

    def _api(self, path: str) -> None:
        name, revision, what = path, "main", "info"
        for route in ("revision", "tree"):
            if f"/{route}/" in path:
                name, _, revision = path.partition(f"/{route}/")
                what = route
        if self._refused(name, revision, self.hub.api_refusals):
            return
        files = self.hub.repositories[name]
        if what == "tree":
            listing = [
                {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                for path, content in files.items()
            ]
            self._send(200, body=json.dumps(listing).encode())
            return
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
        self._send(200, body=json.dumps(info).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        if self._refused(name, revision, self.hub.file_refusals):
            return
        content = self.hub.repositories[name].get(file)
        if content is None:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.hub.downloaded.append(file)
        self._send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(content)}"'}, content)

    def _refused(self, name: str, revision: str, refusals: Mapping[str, Refusal]) -> bool:
        if name in refusals:
            refusal = refusals[name]
        elif name not in self.hub.repositories:
            refusal = Refusal(404, "RepoNotFound", "Repository not found")
        elif revision not in self.hub.revisions:
            refusal = Refusal(404, "RevisionNotFound", "Revision not found")
        else:
            return False
        self._send(refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message})
        return True

    def _send(self, status: int, headers: Mapping[str, Any] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
