"""A registry of images for tests: what pushing and pulling needs of the OCI distribution specification."""

from __future__ import annotations

import hashlib
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit


class Registry:
    """Listens on loopback without TLS; `blobs` and `manifests` hold what was pushed."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        """Tag or digest to content type and content."""
        self.uploads: dict[str, bytearray] = {}
        self.closed_to_all = False
        """Answer every request with 401."""
        registry = self

        class Handler(_Handler):
            store = registry

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: Registry
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self) -> None:
        body = self._read()
        url = urlsplit(self.path)
        words = url.path.strip("/").split("/")
        if self.store.closed_to_all:
            self._answer(401, WWW_Authenticate='Basic realm="tests"')
        elif words == ["v2"]:
            self._answer(200)
        elif "uploads" in words:
            self._upload(words[words.index("uploads") + 1 :], parse_qs(url.query), body)
        elif words[-2] == "blobs":
            self._find(self.store.blobs.get(words[-1]), "application/octet-stream", words[-1])
        elif self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            kept = (self.headers["Content-Type"], body)
            self.store.manifests |= {words[-1]: kept, digest: kept}
            self._answer(201, Docker_Content_Digest=digest)
        else:
            kind, content = self.store.manifests.get(words[-1], ("", None))
            digest = f"sha256:{hashlib.sha256(content or b'').hexdigest()}"
            self._find(content, kind, digest)

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = _route

    def _upload(self, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        if self.command == "POST":
            upload = uuid.uuid4().hex
            self.store.uploads[upload] = bytearray()
            self._answer(202, Location=f"{self.path.partition('?')[0].rstrip('/')}/{upload}", Range="0-0")
            return
        upload = rest[0]
        self.store.uploads[upload] += body
        if self.command == "PATCH":
            self._answer(
                202, Location=self.path.partition("?")[0], Range=f"0-{len(self.store.uploads[upload]) - 1}"
            )
            return
        content = bytes(self.store.uploads.pop(upload))
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert digest == query["digest"][0]
        self.store.blobs[digest] = content
        self._answer(201, Docker_Content_Digest=digest)

    def _find(self, content: bytes | None, kind: str, digest: str) -> None:
        if content is None:
            self._answer(404)
        else:
            self._answer(200, content, Content_Type=kind, Docker_Content_Digest=digest)
