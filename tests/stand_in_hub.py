"""A stand-in for the Hugging Face hub: the paths that huggingface_hub asks for, over repositories in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class StandInHub:
    """A running server. repositories : files by name, by USER/NAME;  requests : method and path of each, in order"""

    def __init__(self):
        self.repositories, self.requests = {}, []
        self.private, self.gated = set(), set()  # readable only with the token; and by nobody yet
        self.token = "hf_secret"
        self.created = {}  # what was asked of each new repository
        self.cut = None  # name of a file whose first transfers end early
        self.cuts = 0
        self.ranges = []  # where transfers of a part began
        self.url = ""

    def sha(self, name):
        """The commit of a repository: it changes with the files."""
        files = self.repositories[name]
        text = "".join(f"{path} {hashlib.sha1(data).hexdigest()}\n" for path, data in sorted(files.items()))
        return hashlib.sha1(text.encode()).hexdigest()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def answer(self, status, value=None, headers=()):
            data = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, text in dict(headers).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def answer_text(self, status, text):
            self.send_response(status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def refuse(self, status, code, text):
            self.answer(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

        def is_known(self):
            return self.headers.get("authorization") == f"Bearer {hub.token}"

        def files(self, name, revision):
            """The files of a repository at a revision, or None after a refusal."""
            if name not in hub.repositories or (name in hub.private and not self.is_known()):
                self.refuse(404 if self.is_known() else 401, "RepoNotFound", "Repository not found")
            elif name in hub.gated:
                self.refuse(403, "GatedRepo", "Access to this model is restricted")
            elif revision not in ("main", hub.sha(name)):
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return hub.repositories[name]
            return None

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name, rest = "/".join(parts[2:4]), parts[4:]
                files = self.files(name, rest[1] if len(rest) > 1 else "main")
                if files is None:
                    return
                if rest[:1] == ["tree"]:
                    listed = [
                        {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
                        for path, data in files.items()
                    ]
                    self.answer(200, listed)
                else:
                    siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
                    self.answer(200, {"id": name, "sha": hub.sha(name), "private": False, "siblings": siblings})
            elif parts[2:3] == ["resolve"]:
                self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.answer(404)

        def send_file(self, name, revision, path):
            files = self.files(name, revision)
            if files is None:
                return
            if path not in files:
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            data, start = files[path], 0
            if wanted := self.headers.get("Range"):
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                hub.ranges.append(start)
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.sha(name))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if path == hub.cut and hub.cuts:
                hub.cuts -= 1
                self.wfile.write(data[start : start + (len(data) - start) // 2])
                self.close_connection = True
            else:
                self.wfile.write(data[start:])

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = path.strip("/").split("/")
            if path == "/api/validate-yaml":
                content = json.loads(body)["content"]
                is_listed = any(f"\nlicense: {name}\n" in content for name in ("unknown", "other", "mit"))
                why = '"license" must be one of [mit, ...]'
                if not is_listed and self.headers.get("accept") == "text/plain":
                    self.answer_text(400, why)
                else:
                    self.answer(200 if is_listed else 400, {"errors": [] if is_listed else [{"message": why}]})
            elif not self.is_known():
                self.refuse(401, "", "Invalid username or password.")
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                if name in hub.repositories:
                    self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                else:
                    hub.created[name], hub.repositories[name] = asked, {}
                    self.answer(200, {"url": f"{hub.url}/{name}"})
            elif parts[4:5] == ["preupload"]:
                asked = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                self.answer(200, {"files": modes})
            elif parts[4:5] == ["commit"]:
                name = "/".join(parts[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                sha = hub.sha(name)
                self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})
            else:
                self.answer(404)

    return Handler


@contextlib.contextmanager
def stand_in_hub():
    """A StandInHub in a thread of this process."""
    hub = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
