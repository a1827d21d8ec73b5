"""A Hugging Face hub of one model on this machine, spoken to over HTTP by the real client."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"


@contextmanager
def serve(name: str, folder: Path, token: str = "") -> Iterator[str]:
    """The address of a hub that has `folder` as the model `name`; with a token, only for its holder."""
    handler = type("Hub", (_Hub,), {"name": name, "folder": folder, "token": token})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Hub(BaseHTTPRequestHandler):
    name: str
    folder: Path
    token: str

    def do_HEAD(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(401, b"")
        elif path.startswith(f"/api/models/{self.name}/tree/"):
            self._json([{"type": "file", **self._described(f)} for f in self._files()])
        elif path in (f"/api/models/{self.name}", f"/api/models/{self.name}/revision/main"):
            files = [{"rfilename": file.name} for file in self._files()]
            self._json({"id": self.name, "modelId": self.name, "sha": COMMIT, "siblings": files})
        elif path.startswith(f"/{self.name}/resolve/"):
            file = self.folder / path.rpartition("/")[2]
            if file.is_file():
                self._answer(200, file.read_bytes())
            else:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD

    def _files(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if path.is_file()]

    def _described(self, file: Path) -> dict:
        content = file.read_bytes()
        return {"path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
