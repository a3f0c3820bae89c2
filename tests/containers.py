"""Images and containers for tests: a storage of their own, of which nothing is left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import require

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240.0
"""Seconds after which a test gives up waiting for a builder."""

_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_SECCOMP = Path("/usr/share/containers/seccomp.json")


def why_no_containers() -> str | None:
    """Why this machine cannot build and run containers; None if it can."""
    for name in ("podman", "buildah", "runc", "dpkg-query"):
        if shutil.which(name) is None:
            return f"there is no {name}"
    return None if os.geteuid() == 0 else "only root can give containers capabilities"


class Storage:
    """Images and containers apart from the machine's."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="lifl-containers-", dir="/tmp"))
        # Gigabytes are written and thrown away again; in memory that takes seconds where disks take minutes.
        options = "size=8g,mode=755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "lifl-tests", self.directory], capture_output=True)
        self.directory.chmod(0o755)  # for the users in the containers
        (self.directory / "tmp").mkdir()
        (self.directory / "storage.conf").write_text(
            f'[storage]\ngraphroot = "{self.directory}/graph"\nrunroot = "{self.directory}/run"\n'
            'driver = "overlay"\n'
        )
        (self.directory / "containers.conf").write_text(_CONTAINERS_CONF)
        self.variables = {
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "TMPDIR": str(self.directory / "tmp"),
        }

    def run(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program on this storage; with `check` it has to succeed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FUNC_")}
        result = subprocess.run(
            words,
            env={**environment, **self.variables, **options.pop("variables", {})},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            **options,
        )
        assert not check or result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result

    def podman(self, *words: str, check: bool = True) -> str:
        """Run podman; returns what it prints."""
        return self.run("podman", *words, check=check).stdout.strip()

    def func(self, *words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run this checkout's `func`."""
        paths = [str(ROOT / part) for part in ("runtime", "gateway", "ebpf", "manifests", "bench")]
        variables = {"PYTHONPATH": os.pathsep.join(paths), "XDG_CONFIG_HOME": str(self.directory / "config")}
        variables |= options.pop("variables", {})
        return self.run(sys.executable, "-m", "lifl.cli", *words, check=check, variables=variables, **options)

    def build(self, *words: str, **options: Any) -> dict[str, Any]:
        """`func build`; returns what it says in JSON."""
        result = self.func("build", "-o", "json", *words, **options)
        document: dict[str, Any] = json.loads(result.stdout)
        return document

    def inspect(self, image: str) -> dict[str, Any]:
        """What podman says of an image."""
        document: dict[str, Any] = json.loads(self.podman("image", "inspect", image))[0]
        return document

    def seccomp(self) -> Path:
        """podman's filter of system calls, and bpf(2) for who has CAP_BPF, as containerd and docker have it."""
        profile = json.loads(_SECCOMP.read_text())
        others = [
            dict(rule, names=[name for name in rule["names"] if name != "bpf"]) for rule in profile["syscalls"]
        ]
        bpf = {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {"caps": ["CAP_BPF"]}}
        rules = [rule for rule in others if rule["names"]]
        file = self.directory / "seccomp.json"
        file.write_text(json.dumps(profile | {"syscalls": [*rules, bpf]}))
        return file

    def close(self) -> None:
        """Remove all containers and images, and the storage itself."""
        self.podman("rm", "--all", "--force", "--time", "1", check=False)
        self.run("buildah", "rm", "--all", check=False)
        for mount in _mounts_below(self.directory):
            subprocess.run(["umount", mount], capture_output=True)
        shutil.rmtree(self.directory)


def _mounts_below(directory: Path) -> list[str]:
    """Where something is mounted at or below a directory, the deepest first."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    below = [mount for mount in mounts if f"{mount}/".startswith(f"{directory}/")]
    return sorted(below, key=len, reverse=True)


@pytest.fixture(scope="session")
def container_storage() -> Iterator[Storage]:
    """A storage for images and containers, removed at the end."""
    require("containers", why_no_containers())
    storage = Storage()
    try:
        yield storage
    finally:
        storage.close()


@dataclass
class Images:
    """The two images, built for real, of a project that stands in `project`."""

    storage: Storage
    project: Path
    function: dict[str, Any] = field(default_factory=dict)
    """What `func build -o json` said."""
    node: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def images(container_storage: Storage) -> Images:
    """Both images, of a new project and of this machine's packages alone."""
    project = container_storage.directory / "fedavg"
    container_storage.func("create", str(project))
    (project / "secret.txt").write_text("not for the image\n")
    with (project / ".funcignore").open("a") as rules:
        rules.write("secret.txt\n")
    images = Images(container_storage, project)
    images.function = container_storage.build("--path", str(project))
    images.node = container_storage.build("--node-image")
    return images


class Container:
    """A container that runs until `stop`, without network, capabilities, and a root that it could write to."""

    def __init__(
        self, storage: Storage, image: str, *command: str, options: Sequence[str] = (), network: str = "none"
    ) -> None:
        self.storage = storage
        self.id = storage.podman(
            *("run", "--detach", "--read-only", f"--network={network}", "--cap-drop=all"),
            *("--security-opt=no-new-privileges", *options, image, *command),
        )

    def exec(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program in it."""
        return self.storage.run("podman", "exec", self.id, *words, check=check)

    def log(self) -> str:
        """What it has written so far."""
        result = self.storage.run("podman", "logs", self.id)
        return result.stdout + result.stderr

    def pid(self) -> int:
        """Of its first process, on this machine."""
        return int(self.storage.podman("inspect", "--format", "{{.State.Pid}}", self.id))

    def status(self) -> Mapping[str, str]:
        """/proc/PID/status of its first process."""
        lines = Path(f"/proc/{self.pid()}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def stop(self) -> None:
        """End and remove it."""
        self.storage.podman("rm", "--force", "--time", "5", self.id)


@contextlib.contextmanager
def running(storage: Storage, image: str, *command: str, **options: Any) -> Iterator[Container]:
    """A container, ended when the block is left."""
    container = Container(storage, image, *command, **options)
    try:
        yield container
    finally:
        container.stop()
