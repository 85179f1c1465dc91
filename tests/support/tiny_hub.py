"""A hub on this machine: serves folders as repositories, as far as huggingface_hub asks, and notes what it is asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

_PIECE = 2**16
"""Bytes that are sent at a time."""


class Hub:
    """A running hub.

    Attributes:
        url: Its address, for HF_ENDPOINT.
        root: The folder with its repositories.
        cut: Name of a file of which only the first half can be had, as when the connection is lost.
        begun: By name, at which byte the latest download of a file began.
        gated: Whether only those may read who have accepted the terms.
        etag_begins: What stands before the checksum in the files' etags.
        pause: Seconds after each piece of a file, for downloads that last.
    """

    def __init__(self, repositories: Path):
        """Serves the folders `owner/name` below a folder."""
        self.cut: str | None = None
        self.gated = False
        self.etag_begins = ""
        self.pause = 0.0
        self.begun: dict[str, int] = {}
        self.root, self._sent = repositories, set[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self)

            do_GET = do_HEAD  # noqa: N815 - the library's name

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def names(self) -> set[str]:
        """Names of the files that were downloaded so far; forgets them."""
        names, self._sent = self._sent, set()
        return names

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository, rest = self.root / "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if self.gated or not repository.is_dir():
            error = "GatedRepo" if self.gated else "RepoNotFound"
            self._send(request, 403 if self.gated else 404, b"{}", {"X-Error-Code": error, "X-Error-Message": "no"})
        elif api and rest[:1] == ["tree"]:
            files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
            tree = [
                {"type": "file", "path": path.relative_to(repository).as_posix(), "size": path.stat().st_size,
                 "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                for path in files
            ]  # fmt: skip
            self._send(request, 200, json.dumps(tree).encode())
        elif api:
            siblings = [{"rfilename": path.relative_to(repository).as_posix()} for path in repository.rglob("*.*")]
            info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(request, 200, json.dumps(info).encode())
        elif rest[:1] == ["resolve"] and (path := repository / "/".join(rest[2:])).is_file():
            self._file(request, path)
        else:
            self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})

    def _file(self, request: BaseHTTPRequestHandler, path: Path) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{self.etag_begins}{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        begin = int(wanted[1]) if wanted else 0
        if request.command == "GET":
            self._sent.add(path.name)
            self.begun[path.name] = begin
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = path.name == self.cut
        if cut and begin:
            self._send(request, 503, b"")
        else:
            self._send(request, 206 if begin else 200, data[begin:], headers, len(data) // 2 if cut else None)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            sent = data[:cut]
            with suppress(ConnectionError):  # whoever asked is gone
                for begin in range(0, len(sent), _PIECE):
                    request.wfile.write(sent[begin : begin + _PIECE])
                    time.sleep(self.pause)


@contextmanager
def serve(repositories: Path) -> Iterator[Hub]:
    """A hub that runs meanwhile."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()
