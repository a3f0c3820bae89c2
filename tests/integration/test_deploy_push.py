"""deploy sends the image to a registry, and pins what it deploys by the digest that the registry knows it by."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from lifl import cli

from tests.kubernetes_api import KnativeController, kubernetes_api

FUNC_YAML = """\
specVersion: 0.36.0
name: fedavg
runtime: python
created: 2026-11-22T12:00:00Z
invoke: cloudevent
registryInsecure: true
"""


class Registry(ThreadingHTTPServer):
    """As much of a container registry as a push needs (OCI distribution specification)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        """By name, a tag or a digest."""


class _Handler(BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/v2/":
            self._reply(200, b"{}")
            return
        name = path.rpartition("/")[2]
        found = (self.server.blobs if "/blobs/" in path else self.server.manifests).get(name)
        if found is None:
            self._reply(404, b'{"errors": [{"code": "NOT_FOUND"}]}')
        else:
            self._reply(200, found, Docker_Content_Digest=_digest(found))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._body()
        self.server.blobs["upload"] = b""
        self._reply(202, Location=f"{urlsplit(self.path).path}1", Range="0-0")

    def do_PATCH(self) -> None:
        self.server.blobs["upload"] += self._body()
        self._reply(202, Location=self.path, Range=f"0-{len(self.server.blobs['upload'])}")

    def do_PUT(self) -> None:
        parts, body = urlsplit(self.path), self._body()
        if "/manifests/" in parts.path:
            self.server.manifests[parts.path.rpartition("/")[2]] = body
            self._reply(201, Docker_Content_Digest=_digest(body))
            return
        content = self.server.blobs.pop("upload") + body
        (wanted,) = parse_qs(parts.query)["digest"]
        assert _digest(content) == wanted
        self.server.blobs[wanted] = content
        self._reply(201, Docker_Content_Digest=wanted)


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture
def registry() -> Iterator[Registry]:
    server = Registry()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def image(registry: Registry, tmp_path: Path) -> Iterator[str]:
    """A small image of this machine, under a name of the registry's."""
    if shutil.which("podman") is None:
        pytest.skip("podman, by which the image is made and pushed, is not here")
    name = f"127.0.0.1:{registry.server_port}/team/fedavg:1"
    context = tmp_path / "context"
    context.mkdir()
    (context / "Containerfile").write_text("FROM scratch\nCOPY hello /\n")
    (context / "hello").write_text("hello")
    build = ["podman", "build", "--quiet", "--tag", name, str(context)]
    subprocess.run(build, check=True, capture_output=True, timeout=60)
    yield name
    subprocess.run(["podman", "rmi", "--force", name], check=True, capture_output=True, timeout=60)


def test_deployed_image_is_the_one_that_was_pushed(
    registry: Registry,
    image: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "func.yaml").write_text(FUNC_YAML)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["func"])
    with kubernetes_api(tmp_path) as (api, kubeconfig):
        KnativeController(api)
        options = ["--path", str(tmp_path), "--kubeconfig", str(kubeconfig), "--route", "broker"]
        command = ["deploy", *options, "--image", image, "--build=false", "--builder", "podman", "-o", "json"]
        codes = [cli.main(command) for _ in range(2)]
        out, err = capsys.readouterr()
        assert codes == [0, 0], err
        first, second = (json.loads(line) for line in out.splitlines())
    digest = _digest(registry.manifests["1"])
    assert first["image"] == f"{image.removesuffix(':1')}@{digest}"
    assert (first["result"], second["result"]) == ("deployed", "unchanged")
    assert "not pinned" not in err
    assert re.search(
        rf"deploy:\n(  .*\n)*  image: {re.escape(first['image'])}\n", (tmp_path / "func.yaml").read_text()
    )
