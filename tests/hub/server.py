"""A local server with the part of the model hub's HTTP API that its client uses: repositories, commits, LFS and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
READ_TOKEN = "hf_" + "r" * 34


@dataclass
class Repository:
    """Commits of one repository, oldest first, each with all of its files.

    Args:
        kind: `model` or `dataset`. `private`: read with a token only. `gated`: read by nobody.
    """

    kind: str = "model"
    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], deleted: Collection[str] = ()) -> str:
        """Adds a commit with these files over the last one's, without the deleted ones; returns its id."""
        merged = {**(self.commits[-1][1] if self.commits else {}), **files}
        merged = {name: data for name, data in merged.items() if name not in deleted}
        text = repr((len(self.commits), sorted((name, hashlib.sha256(data).hexdigest()) for name, data in merged.items())))
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), merged))
        return self.commits[-1][0]

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or commit, or None."""
        found = [each for each in self.commits if each[0] == revision]
        return found[0] if found else self.commits[-1] if revision == "main" and self.commits else None


@dataclass
class Hub:
    """State of the server: its address, repositories by name, uploaded LFS objects, and the requests that it has answered."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, files: Mapping[str, bytes], **settings: Any) -> Repository:
        """Adds a repository with one commit."""
        repository = self.repositories[name] = Repository(**settings)
        repository.commit(files)
        return repository


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs the server in a thread."""
    state = Hub()

    class Answer(_Handler):
        hub = state

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


class _Refusal(Exception):
    """A response with an error status."""

    def __init__(self, status: int, code: str = "", text: str = "refused") -> None:
        super().__init__(text)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *words: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        try:
            self._route(path.strip("/").split("/"), body)
        except _Refusal as refusal:
            self._send(json.dumps({"error": str(refusal)}).encode(), refusal.status, {"X-Error-Code": refusal.code})

    def _route(self, parts: list[str], body: bytes) -> None:
        match parts:
            case [""]:
                self._send(b"")
            case ["api", "whoami-v2"]:
                self._writer(None)
                self._json({"type": "user", "name": "user", "auth": {"accessToken": {"role": "write"}}})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", ("models" | "datasets") as kind, user, name, *rest]:
                self._repository(kind.removesuffix("s"), f"{user}/{name}", rest, body)
            case [user, name, "info", "lfs", "objects", "batch"]:
                self._batch(f"{user}/{name.removesuffix('.git')}", json.loads(body))
            case ["lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise _Refusal(422, text="wrong digest")
                self.hub.objects[oid] = body
                self._send(b"")
            case ["datasets", user, name, "resolve", revision, *file]:
                self._resolve(self._read("dataset", f"{user}/{name}"), revision, "/".join(file))
            case [user, name, "resolve", revision, *file]:
                self._resolve(self._read("model", f"{user}/{name}"), revision, "/".join(file))
            case _:
                raise _Refusal(501, text=f"{self.command} {self.path}")

    def _repository(self, kind: str, name: str, rest: list[str], body: bytes) -> None:
        match rest:
            case [] | ["revision", _]:
                repository = self._read(kind, name)
                commit, files = self._at(repository, rest[1] if rest else "main")
                self._json({"id": name, "sha": commit, "private": repository.private,
                            "siblings": [{"rfilename": file} for file in files]})  # fmt: skip
            case ["tree", revision, *_]:
                self._json([_entry(file, data) for file, data in self._at(self._read(kind, name), revision)[1].items()])
            case ["preupload", "main"]:
                self._writer(name)
                modes = [{"path": each["path"], "shouldIgnore": False, "oid": None,
                          "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular"}
                         for each in json.loads(body)["files"]]  # fmt: skip
                self._json({"files": modes})
            case ["commit", "main"]:
                self._writer(name)
                self._commit(name, body)
            case _:
                raise _Refusal(501, text=f"{self.command} {self.path}")

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _writer(self, name: str | None) -> None:
        """Rejects requests without a token, with a token that cannot write, and to repositories of other users."""
        if self._token() not in (TOKEN, READ_TOKEN):
            raise _Refusal(401, text="Invalid username or password.")
        if name is not None and (self._token() == READ_TOKEN or not name.startswith("user/")):
            raise _Refusal(403, text="You don't have the rights.")

    def _read(self, kind: str, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind or (repository.private and self._token() != TOKEN):
            status = 404 if self._token() == TOKEN else 401  # the hub's own answer to anonymous requests
            raise _Refusal(status, "RepoNotFound", "Repository not found")
        if repository.gated:
            raise _Refusal(403, "GatedRepo", "Access to this model is restricted.")
        return repository

    def _at(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repository.files(revision)
        if found is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _create(self, request: Mapping[str, Any]) -> None:
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        self._writer(name)
        if name in self.hub.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409)
            return
        self.hub.add(
            name, {".gitattributes": b""}, private=bool(request.get("private")) or request.get("visibility") == "private"
        )
        self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def _batch(self, name: str, request: Mapping[str, Any]) -> None:
        self._writer(name)
        objects = []
        for each in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}", "header": {}}}
            objects.append({**each, **({} if each["oid"] in self.hub.objects else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        files: dict[str, bytes] = {}
        deleted: list[str] = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        commit = self.hub.repositories[name].commit(files, deleted)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"})

    def _resolve(self, repository: Repository, revision: str, file: str) -> None:
        commit, files = self._at(repository, revision)
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        entry = _entry(file, files[file])
        if "lfs" in entry:
            headers["X-Linked-Etag"] = f'"{entry["lfs"]["oid"]}"'
            headers["X-Linked-Size"] = str(entry["size"])
        self._send(files[file], 200, {**headers, "ETag": f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"'})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(file: str, data: bytes) -> dict[str, Any]:
    """A file of a tree listing, with the oid of git, or of LFS for large formats."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
    return {
        "type": "file",
        "path": file,
        "oid": oid,
        "size": len(data),
        **(lfs if file.endswith((".safetensors", ".png")) else {}),
    }
