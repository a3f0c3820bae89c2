"""Images: what goes in, what is cached, how builders and pip are called, and what is said of failures."""

from __future__ import annotations

import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from lifl import cli
from lifl.cli.common import CommandError
from lifl.errors import InvalidProject
from lifl.func_yaml.document import Document
from lifl_knative.images import builders, recipes
from lifl_knative.images.archive import Archive
from lifl_knative.images.builders import BUILDERS, Buildah, Builder, Docker, Podman, choose_builder
from lifl_knative.images.debian import Package, closure, key_of
from lifl_knative.images.dependencies import find_dependencies, pip_command, requirement_name
from lifl_knative.images.ignore import IgnoreRules
from lifl_knative.images.image_python import ImagePython
from lifl_knative.images.layers import quoted
from lifl_knative.images.lifl_code import find_code
from lifl_knative.images.programs import ProgramFailed, run_program
from lifl_knative.images.project_files import find_project_files, hash_files
from lifl_knative.images.recipes import BuildOptions, BuiltImage
from lifl_knative.images.record import BuildRecord, read_record

PYTHON = ImagePython(
    executable="/usr/local/bin/python3",
    version=(3, 12),
    cache_tag="cpython-312",
    site_packages="/usr/local/lib/python3.12/site-packages",
    machine="x86_64",
    glibc=(2, 36),
    has_bcc=False,
    is_local=False,
)
FUNC_YAML = """\
# kept
specVersion: 0.36.0
name: my-fedavg
runtime: python
created: 2026-11-22T12:00:00Z
invoke: cloudevent
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FUNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    directory = tmp_path / "project"
    (directory / "functions").mkdir(parents=True)
    (directory / "func.yaml").write_text(FUNC_YAML)
    (directory / "functions" / "my_fedavg.py").write_text("# an aggregator\n")
    (directory / "notes.md").write_text("notes\n")
    return directory


# --- the project's files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "ignored", "kept"),
    [
        ("*.md", ["notes.md", "docs/notes.md"], ["notes.mdx", "md"]),
        ("/notes.md", ["notes.md"], ["docs/notes.md"]),
        ("docs/*.md", ["docs/a.md"], ["a.md", "docs/deep/a.md", "x/docs/a.md"]),
        ("**/data", ["data", "a/data", "a/b/data"], ["database"]),
        ("data/**", ["data/a", "data/a/b"], ["data", "x/data/a"]),
        ("a?c[0-9].txt", ["abc1.txt"], ["abcx.txt", "a/c1.txt"]),
        ("x[!a]b", ["xcb"], ["xab", "x/b"]),
        (r"\#file", ["#file"], ["file"]),
        ("# comment", [], ["# comment", "comment"]),
        ("a.c", ["a.c"], ["abc"]),
    ],
)
def test_a_pattern_ignores_what_gitignore_would(pattern: str, ignored: list[str], kept: list[str]) -> None:
    rules = IgnoreRules([pattern])
    assert [path for path in ignored if not rules.ignores(path, is_directory=False)] == []
    assert [path for path in kept if rules.ignores(path, is_directory=False)] == []


def test_the_last_rule_that_matches_decides_and_a_slash_stands_for_directories() -> None:
    rules = IgnoreRules(["*.csv", "!keep.csv", "build/"])
    assert rules.ignores("a/b.csv", is_directory=False)
    assert not rules.ignores("a/keep.csv", is_directory=False)
    assert rules.ignores("a/build", is_directory=True)
    assert not rules.ignores("build", is_directory=False)


def test_the_image_gets_all_files_but_those_ignored_and_what_no_image_needs(project: Path) -> None:
    (project / ".funcignore").write_text("*.md\n")
    for path in (".git/config", ".lifl/job", ".func/built-hash", "functions/__pycache__/x.pyc", "data/set.bin"):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text("x")
    assert list(find_project_files(project)) == [
        ".funcignore",
        "data/set.bin",
        "func.yaml",
        "functions/my_fedavg.py",
    ]


def test_a_link_out_of_the_project_is_refused_and_one_within_it_kept(project: Path) -> None:
    (project / "link").symlink_to("functions/my_fedavg.py")
    assert "link" in find_project_files(project)
    for target in ("../secret", "/etc/passwd"):
        (project / "out").unlink(missing_ok=True)
        (project / "out").symlink_to(target)
        with pytest.raises(InvalidProject, match=r"out' is a link to .* would not be in the image"):
            find_project_files(project)


def test_the_hash_changes_with_every_file_path_and_permission(project: Path) -> None:
    hashes = [hash_files(find_project_files(project))]
    assert hash_files(find_project_files(project)) == hashes[0]

    def note_hash() -> None:
        hashes.append(hash_files(find_project_files(project)))

    (project / "data.bin").write_bytes(b"1")
    note_hash()
    (project / "data.bin").write_bytes(b"2")
    note_hash()
    (project / "data.bin").rename(project / "data2.bin")
    note_hash()
    (project / "data2.bin").chmod(0o755)
    note_hash()
    assert len(set(hashes)) == len(hashes)
    os.utime(project / "data2.bin", (1, 1))
    assert hash_files(find_project_files(project)) == hashes[-1]


def test_an_archive_is_the_same_whatever_the_order_times_and_owners(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("content")
    for number, order in enumerate((["/b/file", "/a/file"], ["/a/file", "/b/file"])):
        source.chmod(0o600 if number else 0o644)
        os.utime(source, (number, number))
        with Archive(tmp_path / f"{number}.tar") as archive:
            for path in order:
                archive.add_file(path, source)
            archive.add_bytes("/c", b"bytes", 0o755)
            archive.add_link("/d", "a/file")
    contents = [(tmp_path / f"{number}.tar").read_bytes() for number in (0, 1)]
    assert contents[0] == contents[1]
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert [(member.name, oct(member.mode), member.uid, member.mtime) for member in tar] == [
            ("a", "0o755", 0, 315532800),
            ("a/file", "0o644", 0, 315532800),
            ("b", "0o755", 0, 315532800),
            ("b/file", "0o644", 0, 315532800),
            ("c", "0o755", 0, 315532800),
            ("d", "0o777", 0, 315532800),
        ]


def test_the_image_gets_the_lifl_that_runs_and_no_bytecode_of_it() -> None:
    import lifl

    files = find_code(("lifl", "lifl_ebpf"), "/site")
    assert files["/site/lifl/function.py"] == Path(lifl.__file__).with_name("function.py")
    assert "/site/lifl_ebpf/router.bpf.c" in files
    assert not [path for path in files if "__pycache__" in path]


# --- packages ------------------------------------------------------------------------------------------------


def package(name: str, *depends: tuple[str, ...], provides: Sequence[str] = ()) -> Package:
    return Package(name, "amd64", "1", tuple(provides), depends)


def test_a_base_has_all_that_its_packages_depend_on_once() -> None:
    installed = {
        each.name: each
        for each in (
            package("python3", ("libc6",), ("absent", "awk"), ("debconf", "debconf-2.0")),
            package("libc6", ("libgcc-s1",)),
            package("libgcc-s1", ("libc6",)),
            package("original-awk", provides=["awk"]),
            package("debconf", ("perl-base",)),
            package("unrelated"),
        )
    }
    found = closure(["python3"], installed)
    assert [each.name for each in found] == ["libc6", "libgcc-s1", "original-awk", "python3"]
    assert key_of(found) != key_of(found[1:])


def test_requirements_come_from_the_project_and_from_lifl_which_is_not_asked_for(project: Path) -> None:
    (project / "pyproject.toml").write_text('[project]\ndependencies = ["lifl[torch]>=0.1", "scipy<2"]\n')
    (project / "requirements.txt").write_text("-r more.txt  # included\n\n# comment\nlifl\n./wheels/own.whl\n")
    (project / "more.txt").write_text("pandas==2.0\n")
    (project / "wheels").mkdir()
    (project / "wheels" / "own.whl").write_bytes(b"wheel")
    found = find_dependencies(["http"], project)
    names = {requirement_name(requirement) for requirement in found.requirements}
    assert {"scipy", "pandas", "torch", "numpy", "hypercorn"} <= names
    assert "lifl" not in names
    assert "./wheels/own.whl" in found.requirements
    assert [path for path, _ in found.local_files] == ["./wheels/own.whl"]
    (project / "wheels" / "own.whl").write_bytes(b"another")
    assert find_dependencies(["http"], project).key(PYTHON) != found.key(PYTHON)


def test_the_image_gets_the_versions_that_lifl_runs_with_here_and_torch_only_if_asked() -> None:
    import numpy

    found = find_dependencies()
    assert f"numpy=={numpy.__version__}" in found.pins
    assert not [
        each for each in (*found.pins, *found.requirements) if each.startswith(("torch", "pytest", "lifl"))
    ]
    assert "llvmlite" not in {
        requirement_name(each) for each in find_dependencies(without={"llvmlite"}).requirements
    }


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("pyproject.toml", "[project", "pyproject.toml' cannot be read"),
        ("pyproject.toml", "[project]\ndependencies = 3\n", "has to be a list of texts"),
        ("requirements.txt", "-e .\n", "cannot be part of an image"),
        ("requirements.txt", "-r missing.txt\n", "missing.txt' cannot be read"),
    ],
)
def test_requirements_that_cannot_be_used_are_named(project: Path, file: str, content: str, said: str) -> None:
    (project / file).write_text(content)
    with pytest.raises(InvalidProject) as caught:
        find_dependencies([], project)
    assert said in str(caught.value)


def test_pip_takes_only_wheels_for_another_python_and_no_newer_than_its_glibc() -> None:
    command = pip_command(PYTHON, Path("/t"), Path("/r"), None)
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("--python-version") + 1] == "3.12"
    platforms = [command[at + 1] for at, word in enumerate(command) if word == "--platform"]
    assert platforms[0] == "manylinux_2_36_x86_64"
    assert "manylinux_2_17_x86_64" in platforms
    assert "--only-binary" in command


# --- builders ------------------------------------------------------------------------------------------------


def test_command_lines_of_the_builders(tmp_path: Path) -> None:
    def build(builder: Builder) -> list[str]:
        return builder.build_command(tmp_path, "r/n:1", platform="linux/arm64", arguments={"A": "b"})

    common = ["--tag", "r/n:1", "--file", f"{tmp_path}/Containerfile"]
    rest = ["--platform", "linux/arm64", "--network", "none", "--build-arg", "A=b", str(tmp_path)]
    fixed = [
        "--layers=false",
        "--format=oci",
        "--pull=never",
        "--identity-label=false",
        "--timestamp",
        "315532800",
    ]
    assert build(Podman()) == ["podman", "build", *common, *fixed, *rest]
    assert build(Buildah()) == ["buildah", "build", *common, *fixed, *rest]
    assert build(Docker()) == ["docker", "build", *common, "--build-arg", "SOURCE_DATE_EPOCH=315532800", *rest]

    digest = tmp_path / "digest"
    assert Podman().push_command("r/n:1", digest, insecure=True) == [
        *("podman", "push", "--digestfile", str(digest), "--tls-verify=false", "r/n:1")
    ]
    assert Docker().push_command("r/n:1", digest, insecure=True) == ["docker", "push", "r/n:1"]
    assert Buildah().pull_command("r/n:1", None, insecure=False) == ["buildah", "pull", "--quiet", "r/n:1"]
    assert Buildah().inspect_command("r/n:1") == ["buildah", "inspect", "--type", "image", "r/n:1"]
    assert Docker().inspect_command("r/n:1") == ["docker", "image", "inspect", "r/n:1"]
    assert Docker().python_command("r/n:1", "code", "linux/arm64") == [
        *("docker", "run", "--rm", "--network", "none", "--platform", "linux/arm64", "--entrypoint", "python3"),
        *("r/n:1", "-I", "-c", "code"),
    ]


def test_a_containerfile_of_the_user_may_ask_registries_and_is_cached(tmp_path: Path) -> None:
    options = {"containerfile": tmp_path / "Dockerfile", "network": None, "is_own": False}
    command = Podman().build_command(tmp_path, "n", **options)
    assert "--layers" in command
    assert "--network" not in command
    assert "--pull=never" not in command
    assert Docker().build_command(tmp_path, "n", **options) == [
        *("docker", "build", "--tag", "n", "--file", f"{tmp_path}/Dockerfile", str(tmp_path))
    ]


def test_the_digest_that_docker_prints_is_found() -> None:
    output = f"v1: Pushed\n1.0: digest: sha256:{'a' * 64} size: 1234\n"
    assert Docker()._pushed_digest(Path("/nowhere"), output) == f"sha256:{'a' * 64}"


def fake_program(directory: Path, name: str, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


def test_the_first_builder_that_works_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    monkeypatch.setenv("PATH", str(programs))
    fake_program(programs, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    with pytest.raises(CommandError, match="no program that builds images was found") as caught:
        choose_builder(None)
    assert ("sudo apt-get install buildah", "on Debian and Ubuntu") in caught.value.hints
    with pytest.raises(CommandError, match="docker does not work here: Cannot connect to the Docker daemon"):
        choose_builder("docker")
    fake_program(programs, "docker", "echo 28.2.2")
    assert isinstance(choose_builder(None), Docker)
    fake_program(programs, "buildah", "exit 0")
    assert isinstance(choose_builder(None), Buildah)
    assert isinstance(choose_builder("docker"), Docker)
    with pytest.raises(CommandError, match="there is no podman on this machine"):
        choose_builder("podman")
    assert set(BUILDERS) == {"podman", "buildah", "docker"}


@pytest.mark.parametrize(
    ("output", "said", "hint"),
    [
        ("write /x: no space left on device", "no space is left", "podman system prune"),
        ("unauthorized: access to the resource is denied", "unauthorized", "podman login REGISTRY"),
        ("http: server gave HTTP response to HTTPS client", "HTTPS", "func build --registry-insecure"),
        ("dial tcp: lookup docker.io: no such host", "no such host", "func build --base-image debian-packages"),
        ("\n".join(f"line {number}" for number in range(40)), "line 39", "func build --verbose"),
    ],
)
def test_a_builders_failure_is_explained_with_its_last_lines(output: str, said: str, hint: str) -> None:
    error = Podman().explain(ProgramFailed(["podman", "build"], 125, output), "the image n could not be built")
    assert str(error).startswith("the image n could not be built")
    assert said in str(error)
    assert "line 3\n" not in str(error)
    assert hint in [command for command, _ in error.hints]


def test_another_base_is_no_advice_where_a_push_finds_no_registry() -> None:
    failed = ProgramFailed(["podman", "push"], 125, "dial tcp 10.0.0.1:443: connect: connection refused")
    error = Podman().explain(failed, "the image n could not be pushed")
    assert [command for command, _ in error.hints] == ["func build --verbose"]


def test_a_long_program_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lifl_knative.images.programs.STILL_AFTER_S", 0.05)
    command = [
        sys.executable,
        "-c",
        "import sys, time; print('out'); time.sleep(0.3); print('err', file=sys.stderr)",
    ]
    assert set(run_program(command, still="Still building").split()) == {"out", "err"}
    assert "Still building\nStill building\n" in capsys.readouterr().err
    with pytest.raises(ProgramFailed) as caught:
        run_program([sys.executable, "-c", "import sys; sys.exit('why')"], verbose=True)
    assert (caught.value.code, caught.value.last_lines()) == (1, "  why")
    assert "why" in capsys.readouterr().err


def test_values_in_a_containerfile_are_what_they_were() -> None:
    assert quoted(r'a "b" $HOME \n') == r'"a \"b\" \$HOME \\n"'
    with pytest.raises(CommandError, match="has to be one line"):
        quoted("a\nUSER 0")


# --- the command ---------------------------------------------------------------------------------------------


class Built:
    """Stands where the recipes are called, and notes with what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, BuildOptions]] = []
        self.pushed: list[tuple[str, bool]] = []
        monkeypatch.setattr(builders, "choose_builder", lambda name, verbose: Podman(verbose=verbose))
        monkeypatch.setattr(Podman, "push", self._push)
        monkeypatch.setattr(recipes, "build_function_image", lambda b, project, i, o: self._build(i, o))
        monkeypatch.setattr(recipes, "build_node_image", lambda b, i, o: self._build(i, o))

    def _build(self, image: str, options: BuildOptions) -> BuiltImage:
        self.calls.append((image, options))
        return BuiltImage(image, "1" * 64, "key", is_new=True)

    def _push(self, image: str, *, insecure: bool) -> str:
        self.pushed.append((image, insecure))
        return f"sha256:{'a' * 64}"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    return Built(monkeypatch)


def test_without_a_registry_the_image_stays_here_and_is_recorded(
    built: Built, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", "--path", str(project)]) == 0
    assert built.calls[0][0] == "localhost/my-fedavg:latest"
    assert read_record(project) == BuildRecord("localhost/my-fedavg:latest", "key")
    assert (project / "func.yaml").read_text() == FUNC_YAML
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "Building function image\nFunction built: localhost/my-fedavg:latest\n"


def test_registry_image_and_base_are_kept_in_func_yaml(built: Built, project: Path) -> None:
    base = ["--base-image", "python:3.12-slim"]
    assert cli.main(["build", "-p", str(project), "-i", "r.example.com/a/b:1", *base]) == 0
    config = Document.load(project).config
    assert (config.image, config.build.base_image) == ("r.example.com/a/b:1", "python:3.12-slim")
    assert cli.main(["build", "-p", str(project), "-r", "ghcr.io/ada/"]) == 0
    config = Document.load(project).config
    assert (config.image, config.registry) == (None, "ghcr.io/ada")
    assert cli.main(["build", "-p", str(project)]) == 0
    assert [image for image, _ in built.calls] == [
        "r.example.com/a/b:1",
        "ghcr.io/ada/my-fedavg:latest",
        "ghcr.io/ada/my-fedavg:latest",
    ]
    assert built.calls[-1][1].base_image == "python:3.12-slim"
    assert "# kept\n" in (project / "func.yaml").read_text()


def test_pushing_needs_a_registry_and_tells_the_digest(
    built: Built, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", "-p", str(project), "--push"]) == 1
    assert "there is neither an image nor a registry" in capsys.readouterr().err
    assert not built.calls
    words = ["-r", "localhost:5000/ada", "--registry-insecure", "--push", "-o", "json"]
    assert cli.main(["build", "-p", str(project), *words]) == 0
    assert built.pushed == [("localhost:5000/ada/my-fedavg:latest", True)]
    output = capsys.readouterr()
    assert f'"digest": "sha256:{"a" * 64}"' in output.out
    assert 'Pushing image to the registry "localhost:5000/ada"' in output.err


def test_the_node_image_needs_no_project_and_never_takes_the_functions_name(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUNC_IMAGE", "r.example.com/a/function:1")
    assert cli.main(["build", "-p", str(tmp_path), "--node-image"]) == 0
    assert cli.main(["build", "--node-image", "-r", "ghcr.io/ada"]) == 0
    assert cli.main(["build", "--node-image", "-i", "r.example.com/node:1"]) == 0
    images = [image for image, _ in built.calls]
    assert images[0].startswith("localhost/lifl-node:")
    assert images[1].startswith("ghcr.io/ada/lifl-node:")
    assert images[2] == "r.example.com/node:1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-i", "Upper/Case"], "'Upper/Case' has to be of the form"),
        (["-i", "a:b:c"], "'a:b:c' has to be of the form"),
        (["-r", "https://ghcr.io/ada"], "the registry 'https://ghcr.io/ada' has to be"),
        (["-i", "a/b", "-r", "c"], "exclude each other"),
        (["-b", "pack"], "'pack' is not one of 'podman', 'buildah', 'docker'"),
    ],
)
def test_bad_names_are_refused_before_anything_is_built(
    built: Built, project: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli.main(["build", "-p", str(project), *words]) == 1
    assert said in capsys.readouterr().err
    assert not built.calls


def test_a_function_that_is_ignored_is_an_error(project: Path) -> None:
    from lifl.project import load_project

    (project / ".funcignore").write_text("functions/\n")
    with pytest.raises(CommandError, match=r"my_fedavg.py' would not be in the image") as caught:
        recipes.build_function_image(Podman(), load_project(project), "n", BuildOptions())
    assert "!/functions/my_fedavg.py" in caught.value.hints[0][0]
