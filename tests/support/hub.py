"""A small stand-in for the Hugging Face hub: takes repositories and uploads, and keeps them."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator


class Hub(http.server.ThreadingHTTPServer):
    """files: repository -> path -> bytes. created: what was asked of each new repository."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.created, self.blobs, self.tokens = {}, {}, {}, set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def reply(self, values: dict | list, status: int = 200) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.body()
        self.reply({})

    def do_GET(self):
        self.body()
        if "refused" in self.path:
            return self.reply({"error": "you may not read here"}, 403)
        if "/tree/" in self.path:
            held = self.server.files["/".join(self.path.split("/")[3:5])]
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": "0"}
                for path, data in held.items()
            ]
            return self.reply(files)
        return self.reply({"id": "me", "name": "me", "sha": "0" * 40})

    def do_POST(self):
        hub, path, data = self.server, self.path, self.body()
        if "/lfs/objects/batch" not in path:
            hub.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if "refused" in path or b"refused" in data[:200]:
            return self.reply({"error": "you may not write here"}, 403)
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            hub.created[name] = asked
            hub.files.setdefault(name, {})
            return self.reply({"url": f"{hub.url}/{name}"})
        if path.endswith("/preupload/main"):
            large = (".safetensors", ".gguf")
            found = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            return self.reply({"files": found})
        if "/lfs/objects/batch" in path:
            found = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": found})
        if path.endswith("/commit/main"):
            name = "/".join(path.split("/")[3:5])
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "deletedFile":
                    del hub.files[name][value["path"]]
                if entry["key"] == "lfsFile":
                    hub.files[name][value["path"]] = hub.blobs[value["oid"]]
            return self.reply({"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/0"})
        return self.reply({})


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
