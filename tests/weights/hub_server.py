"""A small model hub on the loopback interface: what huggingface_hub asks of the real one, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class EngineRequest(NamedTuple):
    """One request as it came: method, path without query, and its Range header."""

    method: str
    path: str
    range: str | None


@dataclass
class Hub:
    """Repositories by id, each with its revisions by name, each with its files by path.

    cut_after: file -> bytes after which the connection is dropped, once. broken: files answered with a server error.
    """

    repos: Mapping[str, Mapping[str, Mapping[str, bytes]]]
    cut_after: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    requests: list[EngineRequest] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """Files whose content was asked for, sorted, once for each time."""
        return sorted(r.path.rpartition("/")[2] for r in self.requests if r.method == "GET" and "/resolve/" in r.path)


def commit_of(revision: str) -> str:
    """The commit hash that the branch or tag stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer on a free port of 127.0.0.1 until the block ends; hub.url says where."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(EngineRequest(self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, kind, revision = found.groups()
            self._info(repo, kind, revision or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._send(404, b"")

    def _files(self, repo: str, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        """(commit, files), or None once the hub's own error has been sent."""
        if repo not in self.state.repos:
            self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return None
        for name, files in self.state.repos[repo].items():
            if revision in (name, commit_of(name)):
                return commit_of(name), files
        self._send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        return None

    def _info(self, repo: str, kind: str | None, revision: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        if kind == "tree":
            answer: object = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
        else:
            siblings = [{"rfilename": path} for path in files]
            answer = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, path: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if path in self.state.broken and self.command == "GET":
            self._send(500, b"")
            return
        content, headers = files[path], {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers)
            return
        cut = self.state.cut_after.pop(path, None) if self.command == "GET" else None
        self._send(200, content, headers, cut)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None) -> None:
        """Send all of it, or promise all of it and close after `cut` bytes."""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = self.close_connection or cut is not None
