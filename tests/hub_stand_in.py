"""A local replacement for the Hugging Face hub: the part of its protocol that pushing and fetching need.

Small files are part of the commit. Large files are uploaded with git LFS's batch protocol to a separate storage, whose
URL contains the write permission, and are downloaded from it by redirection. If the hub has an `xet_folder`, hf_xet
transfers them instead and stores them there (its `local://` storage).
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

TOKEN = "hf_secretsecretsecret"
LARGE = (".safetensors", ".npz", ".gguf")  # as in .gitattributes on the hub
POINTER = "oid sha256:{}\nsize {}\n"


@dataclass
class Hub:
    """The content of the server, which tests may change, and the requests it has received."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> content
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content, once served
    storage: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content of large files
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)  # method and path of each request
    broken: str = "nothing"  # requests whose path contains this get status 400
    xet_folder: Path | None = None
    xet_hashes: dict[str, str] = field(default_factory=dict)  # sha256 -> xet hash, which only hf_xet can compute


@contextmanager
def serve_hub():
    """Yield the hub; its repositories user/gated and user/other are not accessible."""
    hub = Hub()
    files = hub.files

    def commit(repo):
        """Return a commit hash that depends on the content, as in git."""
        sha = hashlib.sha1(repr(sorted(files[repo].items())).encode()).hexdigest()
        hub.history[sha] = dict(files[repo])
        return sha

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def parse_request(self):
            parsed = super().parse_request()
            if parsed:
                hub.requests.append(f"{self.command} {self.path}")
            return parsed

        def answer(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code, **headers):
            self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(self.path.partition("?")[0].strip("/"))
            if path.startswith("storage/"):
                content = hub.storage[path.removeprefix("storage/")]
                if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                    return self.answer(206, content[int(part[1]) : int(part[2]) + 1])
                return self.answer(200, content)
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo == "user/gated":
                return self.refuse(403 if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401, "GatedRepo")
            if repo not in files:
                return self.refuse(404, "RepoNotFound")
            revision = re.split("/(?:resolve|revision|tree)/", path)[-1].partition("/")[0]
            if revision.startswith("none"):
                return self.refuse(404, "RevisionNotFound")
            sha = revision if revision in hub.history else commit(repo)
            files_of_commit = hub.history[sha]
            if "/xet-write-token/" in path or "/xet-read-token/" in path:
                storage_url, expires = f"local://{hub.xet_folder}", 9999999999
                headers = {
                    "X_Xet_Cas_Url": storage_url,
                    "X_Xet_Access_Token": "x",
                    "X_Xet_Token_Expiration": str(expires),
                }
                return self.answer(200, {"casUrl": storage_url, "accessToken": "x", "exp": expires}, **headers)
            if "/tree/" in path or "/revision/" in path or path == f"api/models/{repo}":
                names = sorted(files_of_commit)
                if "/tree/" in path:
                    entries = [{"type": "file", "path": name, "size": 1, "oid": "a" * 40} for name in names]
                    return self.answer(200, entries)
                return self.answer(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in names]})
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name not in files_of_commit:
                return self.refuse(404, "EntryNotFound", X_Repo_Commit=sha)
            body = files_of_commit[name]
            if name.endswith(LARGE):
                return self.redirect(repo, sha, body)
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=sha)

        def redirect(self, repo, sha, body):
            if in_xet := re.fullmatch(POINTER.format(r"(\w+)", r"(\d+)").encode(), body):
                oid, size = (group.decode() for group in in_xet.groups())
            else:
                oid, size = hashlib.sha256(body).hexdigest(), str(len(body))
            headers = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": size, "X_Repo_Commit": sha}
            if in_xet:
                headers["X_Xet_Hash"] = hub.xet_hashes[oid]
                headers["X_Xet_Refresh_Route"] = f"{hub.address}/api/models/{repo}/xet-read-token/{sha}"
            else:
                hub.storage[oid] = body
            storage = hub.address.replace("127.0.0.1", "localhost")  # another host, as for the hub
            self.answer(302, Location=f"{storage}/storage/{oid}", **headers)

        def body(self):
            """Read the request body, chunked or not."""
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_PUT(self):
            body, (path, _, permission) = self.body(), self.path.strip("/").partition("?")
            oid = path.removeprefix("storage/")
            # No token must be sent: the URL itself contains the write permission.
            if self.headers["Authorization"] or permission != f"permission={oid[:8]}" or hub.broken in path:
                return self.refuse(400, "BadRequest")
            hub.storage[oid] = body
            self.answer(200)

        def large(self, repo, action, body):
            """Answer a git LFS batch with upload URLs for missing objects, or verify an uploaded object."""
            request = json.loads(body)
            if action == "verify":
                content = hub.storage.get(request["oid"], b"")
                complete = (len(content), hashlib.sha256(content).hexdigest()) == (request["size"], request["oid"])
                return self.answer(200) if complete else self.refuse(422, "Incomplete")
            objects = [{"oid": item["oid"], "size": item["size"]} for item in request["objects"]]
            for item in objects:
                if item["oid"] not in hub.storage:
                    address = f"{hub.address}/storage/{item['oid']}?permission={item['oid'][:8]}"
                    verify = f"{hub.address}/{repo}.git/info/lfs/verify"
                    item["actions"] = {"upload": {"href": address}, "verify": {"href": verify}}
            self.answer(200, {"transfer": "basic", "objects": objects})

        def do_POST(self):
            body = self.body()
            path = self.path.partition("?")[0].strip("/")
            if path == "api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.refuse(401, "Unauthorized")
            if path == "api/repos/create":
                request = json.loads(body)
                repo = f"{request.get('organization') or 'user'}/{request['name']}"
                if repo == "user/other":
                    return self.refuse(403, "Forbidden")
                files.setdefault(repo, {})
                if request.get("visibility") == "private":
                    hub.private.add(repo)
                return self.answer(200, {"url": f"{hub.address}/{repo}"})
            if match := re.fullmatch(r"(.+)\.git/info/lfs/(objects/batch|verify)", path):
                return self.large(*match.groups(), body)
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if "/preupload/" in path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
                    for name in paths
                ]
                return self.answer(200, {"files": modes})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    # Files that hf_xet has uploaded are represented by this pointer only.
                    pointer = POINTER.format(value["oid"], value["size"]).encode()
                    files[repo][value["path"]] = hub.storage.get(value["oid"], pointer)
            sha = commit(repo)
            self.answer(200, {"commitUrl": f"{hub.address}/{repo}/commit/{sha}", "commitOid": sha})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
