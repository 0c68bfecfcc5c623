# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A small server on loopback that speaks enough of the Hub's protocol for the real `huggingface_hub` client.

It serves model repositories from memory: create, upload (regular files and LFS), list, download. Tests run the client
in a fresh process with `HubServer.environment`, since huggingface_hub reads `HF_ENDPOINT` once, at import. It can be
told to fail: a connection that is dropped in the middle of an upload, a commit that is refused.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


USER = "tester"
TOKEN = "hf_loopback"
# Of the identifiers that the Hub knows.
LICENSES = ("apache-2.0", "mit", "creativeml-openrail-m", "other")


class HubServer:
    """A Hub with no repositories. Use it as a context manager.

    Attributes:
        repos: {repo id: {path: bytes}}, the newest state of each repository.
        private: ids of the private ones.
        commits: (repo id, paths that it changed) of every commit, in order.
        tokens: that came with commits.
        downloads: (repo id, path) of every file whose content was sent, in order.
        uploads: hash of every LFS file that arrived whole, in order.
        upload_faults: what happens to the next LFS uploads: "" none, "drop" the connection in the middle, "stall" there
            until the client is gone.
        stalled: set when an upload stalls.
        commit_faults: the HTTP status of the next commits, 200 for those that shall pass.
        url: the endpoint.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, list[str]]] = []
        self.tokens: set[str] = set()
        self.downloads: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.upload_faults: Iterator[str] = iter(())
        self.stalled = threading.Event()
        self.commit_faults: Iterator[int] = iter(())
        self.blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a client process with its cache and token under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            # The protocol of git LFS; Xet storage would need a second server.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def add_folder(self, repo_id: str, folder: Path) -> None:
        """Puts a local folder up as a repository, without the client."""
        self.repos[repo_id] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def commit_hash(self, repo_id: str) -> str:
        files = self.repos[repo_id]
        text = repo_id + "".join(f"{path} {_oid(files[path])}\n" for path in sorted(files))
        return hashlib.sha1(text.encode()).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        """Quiet."""

    def do_POST(self):
        path, body = self._path(), self._body()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+", path):
            repo_id, action = match.groups()
            if repo_id not in self.hub.repos:
                return self._error(404, "RepoNotFound")
            return self._preupload(repo_id, json.loads(body)) if action == "preupload" else self._commit(repo_id, body)
        return self._error(404, "RepoNotFound")

    def do_PUT(self):
        oid, fault = self._path().removeprefix("/lfs/"), next(self.hub.upload_faults, "")
        if fault:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            if fault == "stall":
                self.hub.stalled.set()
                self.rfile.read()
            return None
        body = self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "BadChecksum")
        self.hub.blobs[oid] = body
        self.hub.uploads.append(oid)
        return self._json({})

    def do_GET(self):
        path = self._path()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path):
            repo_id, action = match.groups()
            if repo_id not in self.hub.repos:
                return self._error(404, "RepoNotFound")
            files = self.hub.repos[repo_id]
            if action == "tree":
                return self._json(
                    [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in sorted(files.items())]
                )
            siblings = [{"rfilename": p} for p in sorted(files)]
            about = {"id": repo_id, "sha": self.hub.commit_hash(repo_id), "private": repo_id in self.hub.private}
            return self._json({**about, "siblings": siblings})
        return self._resolve(path)

    def do_HEAD(self):
        return self._resolve(self._path())

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _create(self, request: dict):
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200 and request.get("visibility") == "private":
            self.hub.private.add(repo_id)
        self.hub.repos.setdefault(repo_id, {})
        return self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id}, status)

    def _validate(self, card: str):
        license = re.search(r"^license: (.+)$", card, re.M)
        if license is None or license[1] in LICENSES:
            return self._json({"errors": [], "warnings": []})
        return self._json({"errors": [{"message": f'"license" must be one of {LICENSES}'}], "warnings": []}, 400)

    def _preupload(self, repo_id: str, request: dict):
        files = self.hub.repos[repo_id]
        answers = []
        for file in request["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            oid = _oid(files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": answers})

    def _lfs_batch(self, request: dict):
        objects = []
        for item in request["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(answer)
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, body: bytes):
        self.hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        status = next(self.hub.commit_faults, 200)
        if status != 200:
            return self._error(status, "CommitFailed")
        files = dict(self.hub.repos[repo_id])
        changed = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] != "header":
                changed.append(value["path"])
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo_id] = files
        self.hub.commits.append((repo_id, changed))
        oid = self.hub.commit_hash(repo_id)
        return self._json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _resolve(self, path: str):
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match is None or match[1] not in self.hub.repos:
            return self._error(404, "RepoNotFound")
        repo_id, name = match.groups()
        headers = {"X-Repo-Commit": self.hub.commit_hash(repo_id)}
        content = self.hub.repos[repo_id].get(name)
        if content is None:
            return self._error(404, "EntryNotFound", headers)
        headers["ETag"] = f'"{_oid(content)}"'
        if self.command == "GET":
            self.hub.downloads.append((repo_id, name))
        return self._send(200, content, "application/octet-stream", headers)

    def _json(self, value, status: int = 200):
        return self._send(status, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, headers: dict[str, str] = {}):
        return self._send(status, b"", "text/plain", {"X-Error-Code": code, "X-Error-Message": code, **headers})

    def _send(self, status: int, content: bytes, content_type: str, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Type": content_type, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
