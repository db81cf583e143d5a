"""A stand-in for the Hugging Face hub on this machine: as much of its protocol as pushing and fetching needs."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_secretsecretsecret"


@contextmanager
def stand_in():
    """Yields the server's address and its files, repository -> path -> bytes; user/gated and user/other are closed."""
    files: dict[str, dict[str, bytes]] = {}

    def commit(repo):
        """Another number for other content, as git has it."""
        return hashlib.sha1(repr(sorted(files[repo].items())).encode()).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code):
            self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0].strip("/")
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo == "user/gated":
                return self.refuse(401, "GatedRepo")
            if repo not in files:
                return self.refuse(404, "RepoNotFound")
            if "/tree/" in path or path == f"api/models/{repo}":
                names = sorted(files[repo])
                if "/tree/" in path:
                    found = [{"type": "file", "path": name, "size": 1, "oid": "a" * 40} for name in names]
                    return self.answer(200, found)
                return self.answer(
                    200, {"id": repo, "sha": commit(repo), "siblings": [{"rfilename": name} for name in names]}
                )
            if "/revision/" in path:
                return self.answer(200, {"id": repo, "sha": commit(repo), "siblings": []})
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name not in files[repo]:
                return self.refuse(404, "EntryNotFound")
            body = files[repo][name]
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit(repo))

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0].strip("/")
            if path == "api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.refuse(401, "Unauthorized")
            if path == "api/repos/create":
                asked = json.loads(body)
                repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
                if repo == "user/other":
                    return self.refuse(403, "Forbidden")
                files.setdefault(repo, {})
                return self.answer(200, {"url": f"{address}/{repo}"})
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if "/preupload/" in path:
                paths = [one["path"] for one in json.loads(body)["files"]]
                found = [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in paths]
                return self.answer(200, {"files": found})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = commit(repo)
            self.answer(200, {"commitUrl": f"{address}/{repo}/commit/{found}", "commitOid": found})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, files
    finally:
        server.shutdown()
        server.server_close()
