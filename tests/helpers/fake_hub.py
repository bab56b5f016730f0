"""A small Hugging Face Hub on this machine: the routes that the client library needs to make, fill and read models."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """What the hub holds.

    Attributes:
        repos: Id -> file name -> content; ``ID@REVISION`` for revisions that differ from ``main``.
        gated: Ids that are read with the token only.
        private: Id -> whether it was made private.
        commits: Messages, in order.
        requests: Method and path of every request.
        token: Token that writing needs.
    """

    token = "hf_right"

    def __init__(self):
        self.repos, self.private, self.commits, self.requests, self.gated = {}, {}, [], [], set()
        self.address = ""

    def sha(self, repo):
        digest = hashlib.sha256()
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()[:40]


class _Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, status, body=b"", kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data))}.items() | headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code, text):
        self._send(404, {"error": text}, X_Error_Code=code, X_Error_Message=text)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.requests.append(("POST", path))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._send(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+?/.+?)/(preupload|commit)/main", path):
            self._preupload(json.loads(body)) if found[2] == "preupload" else self._commit(found[1], body)
        else:
            self._missing("EntryNotFound", f"no route {path}")

    def _create(self, asked):
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repos:
            self._send(409, {"error": "exists", "url": f"{self.hub.address}/{repo}"})
            return
        self.hub.repos[repo], self.hub.private[repo] = {}, asked.get("visibility") == "private"
        self._send(200, {"url": f"{self.hub.address}/{repo}", "name": repo})

    def _preupload(self, asked):
        modes = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked["files"]
        ]
        self._send(200, {"files": modes})

    def _commit(self, repo, body):
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                self.hub.commits.append(item["value"]["summary"])
            elif item["key"] == "file":
                self.hub.repos[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        url = f"{self.hub.address}/{repo}/commit/{self.hub.sha(repo)}"
        self._send(200, {"commitUrl": url, "commitOid": self.hub.sha(repo), "hookOutput": "", "success": True})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._info(self._at(found[1], found[3]), found[2])
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+/.+", path):
            self._missing("EntryNotFound", "Entry not found")  # repositories hold no such folders
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(self._at(found[1], found[2]), found[3])
        else:
            self._missing("RepoNotFound", f"no route {path}")

    def _at(self, repo, revision):
        """The key of a repository's revision; of none, where the token is missing."""
        if repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return None
        known = [key for key in self.hub.repos if key.startswith(f"{repo}@")]
        named = next((key for key in known if revision in (key.partition("@")[2], self.hub.sha(key))), None)
        return named or repo

    def _info(self, repo, what):
        if repo not in self.hub.repos:
            self._missing("RepoNotFound", "Repository not found")
            return
        files = self.hub.repos[repo]
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            self._send(200, rows)
            return
        siblings = [{"rfilename": name} for name in files]
        private = self.hub.private.get(repo, False)
        self._send(
            200,
            {
                "id": repo.partition("@")[0],
                "sha": self.hub.sha(repo),
                "private": private,
                "siblings": siblings,
                "tags": [],
            },
        )

    def _file(self, repo, name):
        if repo not in self.hub.repos:
            self._missing("RepoNotFound", "Repository not found")
        elif name not in self.hub.repos[repo]:
            self._missing("EntryNotFound", "Entry not found")
        else:
            content = self.hub.repos[repo][name]
            facts = {"X_Repo_Commit": self.hub.sha(repo), "ETag": f'"{_oid(content)}"'}
            self._send(200, content, "application/octet-stream", **facts)


def _oid(content):
    return hashlib.sha256(content).hexdigest()[:40]


@contextmanager
def fake_hub():
    """Yields a hub that runs until the block ends; ``hub.address`` is its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
