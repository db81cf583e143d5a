"""A stand-in for the Hugging Face hub on this machine: as much of its protocol as pushing and fetching needs.

Small files come with the commit. Large ones go by git LFS's batch protocol into a storage of their own, whose address
carries the leave to write, and are fetched from there by redirection; or, where the hub has a folder for it, by hf_xet,
which keeps them there itself (its `local://` storage).
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

TOKEN = "hf_secretsecretsecret"
LARGE = (".safetensors", ".npz", ".gguf")  # as .gitattributes says on the hub
POINTER = "oid sha256:{}\nsize {}\n"


@dataclass
class Hub:
    """What the server holds and was asked for; what it holds may be changed."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> content
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content, once served
    storage: dict[str, bytes] = field(default_factory=dict)  # sha256 -> content of large files
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)  # method and path of each request
    broken: str = "nothing"  # requests whose path holds this are answered with status 400
    xet_folder: Path | None = None
    xet_hashes: dict[str, str] = field(default_factory=dict)  # sha256 -> xet's own hash, which only hf_xet can tell


@contextmanager
def stand_in():
    """Yields the hub; its repositories user/gated and user/other are closed."""
    hub = Hub()
    files = hub.files

    def commit(repo):
        """Another number for other content, as git has it."""
        found = hashlib.sha1(repr(sorted(files[repo].items())).encode()).hexdigest()
        hub.history[found] = dict(files[repo])
        return found

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def parse_request(self):
            parsed = super().parse_request()
            if parsed:
                hub.asked.append(f"{self.command} {self.path}")
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
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("storage/"):
                return self.answer(200, hub.storage[path.removeprefix("storage/")])
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if repo == "user/gated":
                return self.refuse(403 if self.headers["Authorization"] == f"Bearer {TOKEN}" else 401, "GatedRepo")
            if repo not in files:
                return self.refuse(404, "RepoNotFound")
            revision = re.split("/(?:resolve|revision|tree)/", path)[-1].partition("/")[0]
            if revision.startswith("none"):
                return self.refuse(404, "RevisionNotFound")
            sha = revision if revision in hub.history else commit(repo)
            held = hub.history[sha]
            if "/xet-write-token/" in path or "/xet-read-token/" in path:
                where, until = f"local://{hub.xet_folder}", 9999999999
                headers = {"X_Xet_Cas_Url": where, "X_Xet_Access_Token": "x", "X_Xet_Token_Expiration": str(until)}
                return self.answer(200, {"casUrl": where, "accessToken": "x", "exp": until}, **headers)
            if "/tree/" in path or path == f"api/models/{repo}":
                names = sorted(held)
                if "/tree/" in path:
                    found = [{"type": "file", "path": name, "size": 1, "oid": "a" * 40} for name in names]
                    return self.answer(200, found)
                return self.answer(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in names]})
            if "/revision/" in path:
                return self.answer(200, {"id": repo, "sha": sha, "siblings": []})
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name not in held:
                return self.refuse(404, "EntryNotFound", X_Repo_Commit=sha)
            body = held[name]
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
            """What was sent, in one piece or in chunks."""
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_PUT(self):
            body, (path, _, leave) = self.body(), self.path.strip("/").partition("?")
            oid = path.removeprefix("storage/")
            # A token has no business there: the address itself carries the leave to write.
            if self.headers["Authorization"] or leave != f"leave={oid[:8]}" or hub.broken in path:
                return self.refuse(400, "BadRequest")
            hub.storage[oid] = body
            self.answer(200)

        def large(self, repo, action, body):
            """git LFS: where to put what is not there yet, and whether it has come whole."""
            asked = json.loads(body)
            if action == "verify":
                found = hub.storage.get(asked["oid"], b"")
                whole = (len(found), hashlib.sha256(found).hexdigest()) == (asked["size"], asked["oid"])
                return self.answer(200) if whole else self.refuse(422, "NotWhole")
            objects = [{"oid": one["oid"], "size": one["size"]} for one in asked["objects"]]
            for one in objects:
                if one["oid"] not in hub.storage:
                    address = f"{hub.address}/storage/{one['oid']}?leave={one['oid'][:8]}"
                    verify = f"{hub.address}/{repo}.git/info/lfs/verify"
                    one["actions"] = {"upload": {"href": address}, "verify": {"href": verify}}
            self.answer(200, {"transfer": "basic", "objects": objects})

        def do_POST(self):
            body = self.body()
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
                if asked.get("visibility") == "private":
                    hub.private.add(repo)
                return self.answer(200, {"url": f"{hub.address}/{repo}"})
            if found := re.fullmatch(r"(.+)\.git/info/lfs/(objects/batch|verify)", path):
                return self.large(*found.groups(), body)
            repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
            if "/preupload/" in path:
                paths = [one["path"] for one in json.loads(body)["files"]]
                found = [
                    {"path": one, "uploadMode": "lfs" if one.endswith(LARGE) else "regular", "shouldIgnore": False}
                    for one in paths
                ]
                return self.answer(200, {"files": found})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    # Of what hf_xet has taken only this comes here.
                    pointer = POINTER.format(value["oid"], value["size"]).encode()
                    files[repo][value["path"]] = hub.storage.get(value["oid"], pointer)
            found = commit(repo)
            self.answer(200, {"commitUrl": f"{hub.address}/{repo}/commit/{found}", "commitOid": found})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
