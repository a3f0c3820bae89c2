"""The images, built for real from this machine's packages without a registry, and run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from lifl.cli.common import CommandError
from lifl_knative.images.archive import Archive
from lifl_knative.images.base import ensure_base
from lifl_knative.images.builders import BUILDERS, Podman
from lifl_knative.images.layers import Layers

from tests.containers import Images, Storage, running
from tests.registry import Registry

pytestmark = pytest.mark.timeout(300)

MEGABYTE = 1_000_000
NO_RIGHTS = "0000000000000000"
PROBE = "import sys, urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/health/' + sys.argv[1]).read())"
IMPORT_ALL = """
import importlib, pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("platstdlib"), "lib-dynload")
names = [file.name.partition(".")[0] for file in folder.iterdir() if file.suffix == ".so"]
for name in [*names, *MORE]:
    importlib.import_module(name)
print(len(names))
"""


def run_python(images: Images, image: str, code: str) -> str:
    words = ("run", "--rm", "--network=none", "--read-only", "--cap-drop=all", "--entrypoint", "python3", image)
    return images.storage.podman(*words, "-c", code)


def test_a_function_answers_without_network_rights_and_anything_to_write_to(images: Images) -> None:
    with running(images.storage, images.function["image"]) as container:
        deadline = time.monotonic() + 30
        while (ready := container.exec("python3", "-c", PROBE, "readiness", check=False)).returncode:
            assert time.monotonic() < deadline, container.log()
        assert ready.stdout == "b'fedavg is ready'\n"
        status = container.status()
        assert status["Uid"].split() == ["65532"] * 4
        assert status["CapEff"] == status["CapBnd"] == NO_RIGHTS
        files = container.exec("python3", "-c", "import os; print(sorted(os.listdir('.')), os.getcwd())").stdout
        assert files == "['.funcignore', '.gitignore', 'README.md', 'function', 'pyproject.toml'] /function\n"
        for program in ("sh", "pip", "gcc", "apt-get"):
            assert container.exec(program, "--version", check=False).returncode == 127


def write_little(archive_file: Path, work: Path) -> None:
    with Archive(archive_file) as archive:
        archive.add_bytes("/file", b"content")


def test_everything_in_the_function_image_finds_the_libraries_that_it_needs(images: Images) -> None:
    code = f"MORE = ['numpy', 'llvmlite.binding', 'lifl.zygote', 'hypercorn', 'function']\n{IMPORT_ALL}"
    assert int(run_python(images, images.function["image"], code)) > 30
    code = (
        "import importlib.util as u; print([n for n in ('torch', 'pip', 'lifl_gateway', 'bcc') if u.find_spec(n)])"
    )
    assert run_python(images, images.function["image"], code) == "[]"


def test_everything_in_the_node_image_finds_the_libraries_that_it_needs(images: Images) -> None:
    modules = ["bcc", "lifl_gateway.agent", "lifl_gateway.gateway", "lifl_gateway.coordinator_app", "kubernetes"]
    assert int(run_python(images, images.node["image"], f"MORE = {modules}\n{IMPORT_ALL}")) > 30
    words = ("run", "--rm", "--network=none", "--read-only", "--cap-drop=all", images.node["image"])
    assert images.storage.podman(*words, "func", "version").startswith("v")
    code = "import os; print(os.getuid(), open('/proc/self/status').read().partition('CapEff:')[2].split()[0])"
    assert run_python(images, images.node["image"], code) == f"65533 {NO_RIGHTS}"


def test_the_images_are_small_and_say_what_they_are(images: Images) -> None:
    function = images.storage.inspect(images.function["image"])
    node = images.storage.inspect(images.node["image"])
    assert function["Size"] < 340 * MEGABYTE
    assert node["Size"] < 560 * MEGABYTE
    labels = function["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "fedavg"
    assert labels["org.opencontainers.image.base.name"].startswith("localhost/lifl-base:")
    assert (labels["dev.lifl.image"], labels["dev.lifl.function"]) == ("function", "fedavg")
    assert node["Config"]["Labels"]["dev.lifl.image"] == "node"
    assert function["Config"]["User"] == "65532:65532"
    assert node["Config"]["User"] == "65533:65533"
    assert function["Config"]["Entrypoint"] == ["python3", "-m", "lifl.function_pod"]
    assert "LIFL_FUNCTION=/function/function/fedavg.py" in function["Config"]["Env"]
    assert len(function["RootFS"]["Layers"]) == 4


def test_scanners_find_the_debian_packages_and_python_its_own(images: Images) -> None:
    code = (
        "import importlib.metadata as m\n"
        "status = open('/var/lib/dpkg/status').read()\n"
        "print('Package: libc6\\n' in status, 'Package: dpkg\\n' in status)\n"
        "print({d.metadata['Name'].lower() for d in m.distributions()} >= {'lifl', 'numpy', 'msgspec'})\n"
        "print([d.metadata['Name'] for d in m.distributions() if d.read_text('RECORD')])"
    )
    assert run_python(images, images.function["image"], code).split("\n") == ["True False", "True", "[]"]


def test_nothing_is_built_again_until_a_file_changes_and_then_only_the_last_layer(images: Images) -> None:
    storage, path = images.storage, str(images.project)
    assert storage.build("--path", path) == {**images.function, "built": False}
    (images.project / "secret.txt").write_text("changed, but ignored\n")
    assert storage.build("--path", path)["built"] is False
    before = storage.inspect(images.function["image"])
    file = images.project / "function" / "fedavg.py"
    original = file.read_text()
    try:
        file.write_text(f"{original}\n# edited\n")
        changed = storage.build("--path", path)
        assert changed["built"] is True
        assert changed["id"] != images.function["id"]
        after = storage.inspect(changed["image"])
        assert after["RootFS"]["Layers"][:3] == before["RootFS"]["Layers"][:3]
        assert after["RootFS"]["Layers"][3] != before["RootFS"]["Layers"][3]
    finally:
        file.write_text(original)
    assert storage.build("--path", path) == images.function


def test_another_builder_makes_the_same_image_of_the_same_content(images: Images) -> None:
    """All layers but that of the dependencies are made again; that one hangs on the base being the same."""
    storage = images.storage
    tags = storage.podman("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    function_base = storage.inspect(images.function["image"])["Config"]["Labels"][
        "org.opencontainers.image.base.name"
    ]
    removed = [tag for tag in tags if "lifl-runtime" in tag]
    storage.podman("untag", function_base)
    storage.podman("untag", *removed)
    words = ("--path", str(images.project), "--builder", "buildah", "--force")
    assert storage.build(*words) == {**images.function, "builder": "buildah"}
    assert storage.inspect(removed[0])
    assert storage.build("--node-image", "--builder", "buildah", "--force")["id"] == images.node["id"]


def test_another_time_can_be_chosen(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in images.storage.variables.items():
        monkeypatch.setenv(name, value)

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    layer = Layers(Podman()).make("localhost/time:1", "key", "scratch", write_little)
    assert images.storage.inspect(layer.image)["Created"].startswith("2023-11-14T22:13:20")


def test_a_containerfile_of_the_project_describes_the_base(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in images.storage.variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "Containerfile").write_text(
        "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nARG WORD\n"
        "RUN [\"python3\", \"-c\", \"import os; os.mkdir('/opt'); open('/opt/word', 'w').write('made')\"]\n"
        "COPY extra.txt /opt/\nENV WORD=$WORD\n"
    )
    (tmp_path / "extra.txt").write_text("extra")
    base = ensure_base(Layers(Podman()), None, project=tmp_path, variables={"WORD": "said"})
    assert base.python.version >= (3, 11)
    assert base.python.site_packages.startswith("/usr/local/lib/python3")
    assert not base.python.has_bcc
    code = "import os; print(open('/opt/word').read(), open('/opt/extra.txt').read(), os.environ['WORD'])"
    assert run_python(images, base.layer.image, code) == "made extra said"
    again = ensure_base(Layers(Podman()), None, project=tmp_path, variables={"WORD": "said"})
    assert again.layer == base.layer


@pytest.mark.parametrize(
    ("files", "words", "said"),
    [
        (
            {"requirements.txt": "no-such-package-of-lifl==1\n"},
            [],
            "No matching distribution found for no-such-package-of-lifl==1",
        ),
        (
            {"Dockerfile": "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nCOPY missing.txt /\n"},
            [],
            "missing.txt",
        ),
        ({}, ["--base-image", "localhost:1/nobody/nothing:1"], "could not be pulled. podman says:\n"),
        ({}, ["--platform", "linux/s390x"], "a base made of this machine's packages is for linux/"),
    ],
    ids=["requirement", "containerfile", "base-image", "platform"],
)
def test_a_build_that_fails_says_why_and_what_to_try(
    images: Images, tmp_path: Path, files: dict[str, str], words: list[str], said: str
) -> None:
    project = tmp_path / "project"
    (project / "function").mkdir(parents=True)
    for path in ("func.yaml", "function/fedavg.py"):
        (project / path).write_text((images.project / path).read_text())
    for path, content in files.items():
        (project / path).write_text(content)
    result = images.storage.func("build", "--path", str(project), "--builder", "podman", *words, check=False)
    assert result.returncode == 1
    assert said in result.stderr
    assert "\n\nTry this:\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (project / ".func").exists()


def test_a_base_image_without_python_is_refused(
    container_storage: Storage, images: Images, tmp_path: Path
) -> None:
    (tmp_path / "Containerfile").write_text("FROM scratch\nCOPY file /\n")
    (tmp_path / "file").write_text("content")
    container_storage.podman("build", "--tag", "localhost/empty:1", str(tmp_path))
    words = ("build", "--path", str(images.project), "--base-image", "localhost/empty:1")
    result = container_storage.func(*words, check=False)
    assert result.returncode == 1
    assert "the base image localhost/empty:1 has no python3 that runs here" in result.stderr
    assert "func build --base-image debian-packages" in result.stderr


@pytest.mark.parametrize("name", ["podman", "buildah"])
def test_an_image_is_pushed_and_pulled_and_its_digest_is_the_registrys(
    container_storage: Storage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable, value in container_storage.variables.items():
        monkeypatch.setenv(variable, value)
    builder = BUILDERS[name]()
    with Registry() as registry:
        image = f"{registry.address}/team/little:1"
        layer = Layers(builder).make(image, "key", "scratch", write_little)
        digest = builder.push(image, insecure=True)
        assert digest in registry.manifests
        assert f"sha256:{layer.id}" in registry.blobs
        container_storage.podman("rmi", image)
        assert builder.inspect(image) is None
        builder.pull(image, insecure=True)
        facts = builder.inspect(image)
        assert facts is not None
        assert facts.id == layer.id

        with pytest.raises(CommandError, match="could not be pushed") as caught:
            builder.push(image)
        assert "func build --registry-insecure" in [command for command, _ in caught.value.hints]
        registry.closed_to_all = True
        with pytest.raises(CommandError, match="could not be pushed") as caught:
            builder.push(image, insecure=True)
        assert f"{name} login REGISTRY" in [command for command, _ in caught.value.hints]
