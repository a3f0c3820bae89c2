"""deploy sends the image to a registry, and pins what it deploys by the digest that the registry knows it by."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lifl import cli

from tests.hosts import require
from tests.kubernetes_api import KnativeController, kubernetes_api
from tests.registry import Registry

FUNC_YAML = """\
specVersion: 0.36.0
name: fedavg
runtime: python
created: 2026-11-22T12:00:00Z
invoke: cloudevent
registryInsecure: true
"""


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


@pytest.fixture
def image(registry: Registry, tmp_path: Path) -> Iterator[str]:
    """A small image of this machine, under a name of the registry's."""
    require("podman, by which the image is made and pushed", None if shutil.which("podman") else "it is not here")
    name = f"{registry.address}/team/fedavg:1"
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
    _, manifest = registry.manifests["1"]
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    assert first["image"] == f"{image.removesuffix(':1')}@{digest}"
    assert (first["result"], second["result"]) == ("deployed", "unchanged")
    assert "not pinned" not in err
    assert re.search(
        rf"deploy:\n(  .*\n)*  image: {re.escape(first['image'])}\n", (tmp_path / "func.yaml").read_text()
    )
