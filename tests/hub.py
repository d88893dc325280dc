"""A Hugging Face hub on this machine, which knows as much as making and filling a model repository takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_a_test"


class Hub:
    """Repositories as they were committed, and what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.commits: list[str] = []
        self.asked: list[str] = []
        self.refuses_commits = False
        self.url = ""
        self._objects: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return status and what is sent back as JSON."""
        self.asked.append(f"{method} {path}")
        if path == "/api/whoami-v2":
            return 200, {"name": "ann", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'ann'}/{wanted['name']}"
            if name in self.repositories:
                return 409, {"url": f"{self.url}/{name}", "error": "You already created this model repo"}
            self.repositories[name] = {}
            visible = wanted.get("visibility") or ("private" if wanted.get("private") else "public")
            self.visibility[name] = visible
            return 200, {"url": f"{self.url}/{name}"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith((".safetensors", ".png")) else "regular" for file in files]
            return 200, {
                "files": [
                    {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    {**item, "actions": {"upload": {"href": f"{self.url}/store/{item['oid']}"}}} for item in objects
                ],
            }
        if path.startswith("/store/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/store/")
            self._objects[path.removeprefix("/store/")] = body
            return 200, {}
        if "/commit/" in path:
            return self._commit(path, body)
        return 404, {"error": f"no such thing: {path}"}

    def _commit(self, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses_commits:
            return 403, {"error": "Forbidden: this token may not write"}
        name = path.removeprefix("/api/models/").split("/commit/")[0]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self._objects[value["oid"]]
        self.commits.append(name)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "abc"}


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.split("?")[0]
            if path.startswith("/store/") or self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, answer = hub.answer(self.command, path, body)
            else:
                hub.asked.append(f"{self.command} {path}")
                status, answer = 401, {"error": "Invalid username or password."}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
