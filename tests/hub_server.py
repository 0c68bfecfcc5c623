# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A small server on loopback that speaks enough of the Hub's protocol for the real `huggingface_hub` client.

It serves model repositories from memory: create, upload (regular files and LFS), list, download. Tests run the client
in a fresh process with `HubServer.environment`, since huggingface_hub reads `HF_ENDPOINT` once, at import.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


USER = "tester"


class HubServer:
    """A Hub with no repositories. Use it as a context manager.

    Attributes:
        repos: {repo id: {path: bytes}}, the newest state of each repository.
        downloads: (repo id, path) of every file whose content was sent, in order.
        url: the endpoint.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.downloads: list[tuple[str, str]] = []
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
            "HF_TOKEN": "hf_loopback",
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
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+", path):
            repo_id, action = match.groups()
            if repo_id not in self.hub.repos:
                return self._error(404, "RepoNotFound")
            return self._preupload(repo_id, json.loads(body)) if action == "preupload" else self._commit(repo_id, body)
        return self._error(404, "RepoNotFound")

    def do_PUT(self):
        oid, body = self._path().removeprefix("/lfs/"), self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "BadChecksum")
        self.hub.blobs[oid] = body
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
            return self._json({"id": repo_id, "sha": self.hub.commit_hash(repo_id), "siblings": siblings})
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
        self.hub.repos.setdefault(repo_id, {})
        return self._json({"url": f"{self.hub.url}/{repo_id}", "id": repo_id}, status)

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
        files = dict(self.hub.repos[repo_id])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repos[repo_id] = files
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
