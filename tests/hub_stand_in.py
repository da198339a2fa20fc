"""A model hub on this machine: the part of the hub's API that fetching and committing use."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit

OWNER_TOKEN = "hf_owner"  # noqa: S105


class Repository:
    """Files by path at every commit, and which commit each branch or tag names."""

    def __init__(self, *, private=False):
        self.private = private
        self.commits, self.refs, self.messages = {}, {}, []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    @property
    def files(self):
        return self.commits[self.refs["main"]]

    def commit(self, changes, message, deleted=()):
        kept = self.commits.get(self.refs.get("main"), {})
        files = {p: c for p, c in {**kept, **changes}.items() if p not in deleted}
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()  # noqa: S324
        self.commits[sha] = files
        self.refs["main"] = sha
        self.messages.append(message)
        return sha

    def find(self, revision):
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub(http.server.BaseHTTPRequestHandler):
    """One request to the hub; the subclass made by ``running_hub`` holds its state."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        self.hub.requests.append((self.command, path))
        status = next((s for part, s in self.hub.refusals.items() if part in path), None)
        if status is not None:
            self.reply({"error": "refused"}, status=status)
        elif path == "/":
            self.reply(b"hub")
        elif path.startswith("/api/models/"):
            self.answer_repository(path.removeprefix("/api/models/"))
        elif path == "/api/repos/create":
            self.create()
        elif path == "/api/validate-yaml":
            self.hub.cards.append(self.json["content"])
            self.reply({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.reply({"objects": [self.where_to_put(wanted) for wanted in self.json["objects"]]})
        elif path.startswith("/lfs/"):
            self.hub.blobs[path.removeprefix("/lfs/")] = self.body
            self.reply({})
        elif "/resolve/" in path:
            self.resolve(path)
        else:
            self.reply({"error": "no such page"}, status=404)

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def answer_repository(self, path):
        owner, name, *rest = path.split("/")
        repository = self.visible(f"{owner}/{name}")
        if repository is None:
            return
        verb, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        sha = repository.find(revision)
        if sha is None:
            self.reply({"error": "Invalid rev id"}, status=404, code="RevisionNotFound")
        elif verb == "revision":
            info = {"id": f"{owner}/{name}", "sha": sha, "private": repository.private}
            self.reply({**info, "siblings": [], "tags": [], "downloads": 0, "likes": 0})
        elif verb == "tree":
            self.reply([entry(p, c) for p, c in repository.commits[sha].items()])
        elif verb == "paths-info":
            asked = parse_qs(self.body.decode())["paths"]
            files = repository.commits[sha]
            self.reply([entry(p, files[p]) for p in asked if p in files])
        elif verb == "preupload":
            self.reply({"files": [upload_mode(file) for file in self.json["files"]]})
        elif verb == "commit":
            self.commit(f"{owner}/{name}", repository)

    def commit(self, name, repository):
        if self.token != OWNER_TOKEN:
            self.reply({"error": "Forbidden"}, status=403)
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, changes, deleted = lines[0]["value"], {}, []
        if header.get("parentCommit", repository.refs["main"]) != repository.refs["main"]:
            self.reply({"error": "A commit has happened since."}, status=412)
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                deleted.append(value["path"])
        sha = repository.commit(changes, header["summary"], deleted)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.reply({"commitUrl": url, "commitOid": sha, "success": True})

    def create(self):
        if self.token != OWNER_TOKEN:
            self.reply({"error": "Invalid username or password."}, status=401)
            return
        asked = self.json
        private = asked.get("visibility") == "private" or asked.get("private") is True
        name = f"{asked['organization']}/{asked['name']}"
        self.hub.repositories[name] = Repository(private=private)
        self.reply({"url": f"{self.hub.endpoint}/{name}", "name": name})

    def where_to_put(self, wanted):
        action = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
        return {**wanted, "actions": {"upload": action}}

    def resolve(self, path):
        owner, name, _, revision, *rest = path.strip("/").split("/")
        repository = self.visible(f"{owner}/{name}")
        if repository is None:
            return
        sha = repository.find(revision)
        content = repository.commits.get(sha, {}).get("/".join(rest))
        if content is None:
            self.reply({"error": "no file"}, status=404, code="EntryNotFound", commit=sha)
            return
        self.reply(content, commit=sha, etag=hashlib.sha256(content).hexdigest())

    def visible(self, name):
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token != OWNER_TOKEN):
            status = 404 if self.token else 401
            self.reply({"error": "Repository not found"}, status=status, code="RepoNotFound")
            return None
        return repository

    def reply(self, content, *, status=200, code=None, commit=None, etag=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for header, value in {"X-Error-Code": code, "X-Repo-Commit": commit, "ETag": etag}.items():
            if value is not None:
                self.send_header(header, f'"{value}"' if header == "ETag" else value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class HubState:
    """What a stand-in holds and what it was asked."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.repositories, self.blobs, self.refusals = {}, {}, {}
        self.requests, self.cards = [], []


def entry(path, content):
    found = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if path.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return found


def upload_mode(file):
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


@contextlib.contextmanager
def running_hub():
    """A stand-in that listens while the block runs."""
    handler = type("Handler", (Hub,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.hub = HubState(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield handler.hub
        finally:
            server.shutdown()
            thread.join()
