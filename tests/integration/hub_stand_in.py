"""A stand-in for the Hub's HTTP API on the loopback interface, as far as huggingface_hub's client asks for it.

Repositories, commits of regular and LFS files, branches, metadata and downloads; everything is kept in memory. What
the client sends is checked as the Hub does it: tokens, hashes, sizes, the card's metadata. Xet's binary protocol is
not here: clients run with HF_HUB_DISABLE_XET=1 and take LFS, as they do where hf_xet is not installed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

TOKEN, USER = "hf_standin", "tester"


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Of the LFS object, or of the git blob."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        parts = [self.branches.get(branch, ""), message, *(f"{path} {file.oid}" for path, file in files.items())]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """The state behind the server; ``requests`` has what was asked, for tests to look at."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self.url = ""
        self.storage_url = ""  # large files lie on another host, to which clients send no token

    def files(self, repo_id: str, revision: str = "main") -> dict[str, File]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def card(self, repo_id: str) -> ModelCard:
        return ModelCard(self.files(repo_id)["README.md"].data.decode())


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **more: object) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **more}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    # ------------------------------------------------------------------ plumbing

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: object, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})

    def handle_any(self) -> None:
        body = self.body()
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            try:
                for methods, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and self.command in methods:
                        action(self, body, *match.groups())
                        return
                raise Refused(404, f"no such route: {self.command} {path}", "EntryNotFound")
            except Refused as refusal:
                headers = {"X-Error-Message": str(refusal)}
                if refusal.code:
                    headers["X-Error-Code"] = refusal.code
                self.json(refusal.body, refusal.status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # ------------------------------------------------------------------ who may do what

    @property
    def is_member(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.is_member:
            raise Refused(401, "Invalid credentials in Authorization header")

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.is_member):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def revision(self, repo: Repo, name: str) -> str:
        sha = repo.resolve(name)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return sha

    # ------------------------------------------------------------------ routes

    def whoami(self, _: bytes) -> None:
        self.require_token()
        self.json({"type": "user", "name": USER, "orgs": []})

    def create(self, body: bytes) -> None:
        self.require_token()
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", **url)
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.json(url)

    def branch(self, _: bytes, repo_id: str, name: str) -> None:
        self.require_token()
        repo = self.repo(repo_id)
        if name in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[name] = repo.branches["main"]
        self.json({})

    def validate_card(self, body: bytes) -> None:
        try:
            ModelCard(json.loads(body)["content"])
        except ValueError as error:
            raise Refused(400, "invalid metadata", errors=[{"message": str(error)}], warnings=[]) from error
        self.json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self.require_token()
        repo = self.repo(repo_id)
        there, answers = repo.commits[self.revision(repo, revision)], []
        for file in json.loads(body)["files"]:
            sample = base64.b64decode(file["sample"])
            large = file["path"].endswith(".safetensors") or b"\0" in sample
            old = there.get(file["path"])
            answers.append({
                "path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                "oid": old.oid if old else None,
            })  # fmt: skip
        self.json({"files": answers})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self.require_token()
        self.repo(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            path = f"/lfs/{asked['oid']}"
            actions = {
                "upload": {"href": f"{self.hub.storage_url}{path}"},
                "verify": {"href": f"{self.hub.url}{path}/verify"},
            }
            objects.append({**asked, **({} if asked["oid"] in self.hub.objects else {"actions": actions})})
        self.json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the object's hash is another one")
        self.hub.objects[oid] = body
        self.answer(200)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        self.require_token()
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, "no such object")
        self.answer(200)

    def lfs_get(self, _: bytes, oid: str) -> None:
        if oid not in self.hub.objects:
            raise Refused(404, "no such object")
        self.answer(200, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        self.require_token()
        repo = self.repo(repo_id)
        files, summary = dict(repo.commits[self.revision(repo, revision)]), ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if len(self.hub.objects.get(value["oid"], b"")) != value["size"]:
                    raise Refused(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refused(400, f"operation {key} is not known")
        sha = repo.commit(revision, files, summary)
        url = f"{self.hub.url}/{repo_id}/commit/{sha}"
        self.json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, _: bytes, repo_id: str, revision: str | None = None) -> None:
        repo = self.repo(repo_id)
        sha = self.revision(repo, revision or "main")
        files = repo.commits[sha]
        content = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": []}
        if "README.md" in files:
            data = ModelCard(files["README.md"].data.decode()).data.to_dict()
            content |= {"tags": data.get("tags", []), "library_name": data.get("library_name"), "cardData": data}
        self.json({**content, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, _: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        repo = self.repo(repo_id)
        files = repo.commits[self.revision(repo, revision)]
        inside = f"{folder}/" if folder else ""
        rows = [
            {"type": "file", "path": path, "oid": file.oid, "size": len(file.data)}
            for path, file in files.items()
            if path.startswith(inside)
        ]
        if folder and not rows:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.json(rows)

    def resolve(self, _: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id)
        sha = self.revision(repo, revision)
        file, headers = repo.commits[sha].get(path), {"X-Repo-Commit": sha}
        if file is None:
            self.json({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound", **headers})
        elif file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            self.answer(302, headers={**headers, "Location": f"{self.hub.storage_url}/lfs/{file.oid}"})
        else:
            self.answer(200, file.data, {**headers, "ETag": f'"{file.oid}"'})


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_card),
    (("POST",), f"/api/models/{REPO}/branch/(.+)", Handler.branch),
    (("POST",), f"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (("POST",), f"/api/models/{REPO}/commit/(.+)", Handler.commit),
    (("GET",), f"/api/models/{REPO}", Handler.info),
    (("GET",), f"/api/models/{REPO}/revision/(.+)", Handler.info),
    (("GET",), f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", Handler.lfs_put),
    (("POST",), "/lfs/([0-9a-f]{64})/verify", Handler.lfs_verify),
    (("GET", "HEAD"), "/lfs/([0-9a-f]{64})", Handler.lfs_get),
    (("GET", "HEAD"), f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running_hub():
    """A ``Hub`` that answers on 127.0.0.1 while the block runs."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
