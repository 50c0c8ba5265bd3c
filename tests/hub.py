"""A hub of one's own: the part of the hub's API that its library speaks, on this machine, over a folder of models."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Hub:
    """`folders` has what lies at (repository, commit), `refs` the commit of (repository, revision).

    `errors` are a status and the hub's name for an error, by repository. `log` has a line for every request and what
    it took: method, path, bytes sent.
    """

    folders: dict[tuple[str, str], Path] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    address: str = ""

    def add(self, repository: str, folder: Path, commit: str, revision: str = "main") -> None:
        """Publish a folder."""
        self.folders[repository, commit] = folder
        self.refs[repository, revision] = self.refs[repository, commit] = commit

    def answer(self, path: str, wanted: str | None) -> Answer:
        """Status, headers and body for a path; `wanted` is the header Range."""
        words = [unquote(word) for word in urlsplit(path).path.split("/") if word]
        is_api = words[:2] == ["api", "models"]
        words = words[2:] if is_api else words
        repository, what, rest = "/".join(words[:2]), words[2:3], words[3:]
        if repository in self.errors and not (is_api and self.errors[repository][1] == "GatedRepo"):
            status, code = self.errors[repository]
            return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
        revision = rest[0] if rest else "main"
        commit = self.refs.get((repository, revision))
        if commit is None:
            known = any(repository == name for name, _ in self.refs)
            return (404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b"{}")
        folder = self.folders[repository, commit]
        if not is_api:
            return self._file(folder / "/".join(rest[1:]), commit, wanted)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if what == ["tree"]:
            return _json(
                [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": str(index)}
                    for index, f in enumerate(files)
                ]
            )
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        return _json({"_id": "0", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings})

    def _file(self, file: Path, commit: str, wanted: str | None) -> Answer:
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = file.read_bytes()
        headers = {"ETag": f'"{commit[:8]}-{file.parent.name}-{file.name}"', "X-Repo-Commit": commit}
        if wanted is None:
            return 200, headers | {"Accept-Ranges": "bytes"}, body
        first, last = wanted.removeprefix("bytes=").split("-")
        part = body[int(first) : int(last) + 1 if last else None]
        return 206, headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"}, part


def _json(content: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer for a while, at `hub.address`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path, self.headers.get("Range"))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            sent = 0 if self.command == "HEAD" else self.wfile.write(body)
            hub.log.append((self.command, self.path, sent))

        do_HEAD = do_GET

        def log_message(self, *told: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
