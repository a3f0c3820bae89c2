"""Editing func.yaml: comments and layout stay, the file is replaced at once, and nothing invalid is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lifl.errors import InvalidProject
from lifl.func_yaml.config import Env
from lifl.func_yaml.document import Document

TEXT = """\
# $schema: somewhere
specVersion: 0.36.0
name: mean  # as the Service
runtime: python
# when it was made
created: 2026-11-22T12:00:00.123456789+02:00

run:
  envs:
  # how many clients
  - name: GOAL
    value: 010  # octal to some
  # who asks
  - name: TOKEN
    value: '{{ secret:access:token }}'
  - name: NOTE
    value: |
      two
      lines

# Where it goes.
deploy:
  # ours
  annotations:
    lifl.dev/function: mean.py
  options: {scale: {min:   0}}
  # nothing else
# the end
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "func.yaml").write_text(TEXT, encoding="utf-8")
    return tmp_path


def content(project: Path) -> str:
    return (project / "func.yaml").read_text(encoding="utf-8")


def test_saving_without_edits_leaves_the_file_alone(project: Path) -> None:
    before = (project / "func.yaml").stat()

    assert Document.load(project).save() is False

    assert content(project) == TEXT
    assert (project / "func.yaml").stat().st_ino == before.st_ino


def test_what_a_deployment_writes_is_all_that_changes(project: Path) -> None:
    document = Document.load(project)
    image = "localhost:5000/mean@sha256:" + "0" * 64
    document.set("namespace", "team")
    document.set("image", "localhost:5000/mean:latest")
    document.set("deploy.namespace", "team")
    document.set("deploy.image", image)

    assert document.save() is True

    assert content(project) == TEXT.replace(
        "runtime: python\n", "runtime: python\nimage: localhost:5000/mean:latest\nnamespace: team\n"
    ).replace("min:   0}}\n", f"min: 0}}}}\n  namespace: team\n  image: {image}\n")
    assert document.config == Document.load(project).config
    assert (document.config.deploy.namespace, document.config.deploy.image) == ("team", image)


def test_what_is_cleared_leaves_no_trace(project: Path) -> None:
    document = Document.load(project)
    document.set("deploy.namespace", "team")
    document.set("build.builder", "pack")
    document.save()

    for field in ("deploy.namespace", "deploy.namespace", "build.builder", "nothing.at.all"):
        document.clear(field)
    document.save()

    assert content(project) == TEXT.replace("min:   0", "min: 0")


def test_items_come_and_go_between_comments(project: Path) -> None:
    document = Document.load(project)
    document.append("run.envs", {"name": "LAST", "value": "1"})
    document.remove("run.envs", {"name": "GOAL"})
    document.update("run.envs", {"name": "TOKEN"}, {"value": "yes"})
    document.append("deploy.labels", {"key": "a", "value": "b"})
    document.save()

    assert content(project).partition("run:")[2] == (
        '\n  envs:\n  # how many clients\n  # who asks\n  - name: TOKEN\n    value: "yes"\n'
        '  - name: NOTE\n    value: |\n      two\n      lines\n  - name: LAST\n    value: "1"\n\n'
        "# Where it goes.\ndeploy:\n  # ours\n  annotations:\n    lifl.dev/function: mean.py\n"
        "  options: {scale: {min: 0}}\n  labels:\n  - key: a\n    value: b\n  # nothing else\n# the end\n"
    )


def test_a_list_without_items_goes_with_the_section_that_held_it(project: Path) -> None:
    document = Document.load(project)
    for name in ("GOAL", "TOKEN", "NOTE", "NONE"):
        document.remove("run.envs", {"name": name})
    document.save()

    assert "run:" not in content(project)
    assert "# Where it goes.\ndeploy:" in content(project)
    assert document.config.run.envs == ()


def test_the_indentation_of_the_file_is_kept(tmp_path: Path) -> None:
    text = (
        "---\nspecVersion: 0.36.0\nname: a\nruntime: go\ncreated: 2026-11-22T12:00:00Z\n"
        "run:\n    envs:\n      - name: A\n        value: b\n"
    )
    (tmp_path / "func.yaml").write_text(text)
    document = Document.load(tmp_path)
    document.append("run.envs", {"name": "B", "value": "c"})
    document.set("deploy.namespace", "team")
    document.save()

    assert content(tmp_path) == text + ("      - name: B\n        value: c\ndeploy:\n    namespace: team\n")


def test_line_ends_are_kept(tmp_path: Path) -> None:
    text = TEXT.replace("\n", "\r\n").replace("  0}", " 0}")
    (tmp_path / "func.yaml").write_bytes(text.encode())
    document = Document.load(tmp_path)
    document.set("image", "a/b")
    document.save()

    data = (tmp_path / "func.yaml").read_bytes()
    assert data.count(b"\r\n") == data.count(b"\n") > 25


def test_an_invalid_edit_is_refused_and_the_file_stays(project: Path) -> None:
    document = Document.load(project)
    document.append("run.envs", {"name": "GOAL", "value": "{{ what }}"})

    with pytest.raises(InvalidProject, match=r"env entry #3.*\n\tenv name 'GOAL' is there 2 times"):
        document.save()

    assert content(project) == TEXT


def test_a_file_that_changed_meanwhile_keeps_the_change(project: Path) -> None:
    document = Document.load(project)
    document.append("run.envs", {"name": "MINE", "value": "1"})
    document.remove("run.envs", {"name": "GOAL"})
    (project / "func.yaml").write_text(TEXT.replace("runtime: python", "runtime: python\nregistry: ghcr.io/ada"))

    document.save()

    assert document.config.registry == Document.load(project).config.registry == "ghcr.io/ada"
    assert [env.name for env in document.config.run.envs] == ["TOKEN", "NOTE", "MINE"]


def test_the_mode_and_a_link_stay_and_no_other_file_is_left(project: Path) -> None:
    real = project / "real"
    real.mkdir()
    (project / "func.yaml").rename(real / "func.yaml")
    (project / "func.yaml").symlink_to(real / "func.yaml")
    (real / "func.yaml").chmod(0o640)
    document = Document.load(project)
    document.set("namespace", "team")

    document.save()

    assert (project / "func.yaml").is_symlink()
    assert (real / "func.yaml").stat().st_mode & 0o777 == 0o640
    assert os.listdir(real) == ["func.yaml"]


def test_a_project_that_cannot_be_written_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document.load(project)
    document.set("namespace", "team")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InvalidProject, match=r"func\.yaml' cannot be written: No space left on device"):
        document.save()

    assert os.listdir(project) == ["func.yaml"]
    assert content(project) == TEXT


def test_an_old_file_is_written_as_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "func.yaml").write_text(
        "specVersion: 0.30.0\nname: a  # mine\nruntime: python\ncreated: 2026-11-22T12:00:00Z\n"
        "# the cluster's\nnamespace: team\nenvs:\n- name: A  # first\n  value: b\noptions: {}\n"
    )
    document = Document.load(tmp_path)
    document.set("registry", "ghcr.io/ada")
    document.save()

    assert content(tmp_path) == (
        "specVersion: 0.36.0\nname: a  # mine\nruntime: python\nregistry: ghcr.io/ada\n"
        "created: 2026-11-22T12:00:00Z\n# the cluster's\n"
        "run:\n  envs:\n  - name: A # first\n    value: b\ndeploy:\n  namespace: team\n"
    )
    assert Document.load(tmp_path).warnings == ()


VALUES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    [
        "",
        "~",
        "null",
        "yes",
        "1",
        "0x1f",
        "1e3",
        "2026-11-22",
        "1:30",
        "- a",
        "a: b",
        "# c",
        "'",
        '"',
        "{{",
        "!t",
        "&a",
        "*a",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(VALUES, max_size=3),
    removed=st.lists(st.sampled_from(["GOAL", "TOKEN", "NOTE"]), max_size=2, unique=True),
)
def test_any_text_is_read_again_as_it_was_written(project: Path, values: list[str], removed: list[str]) -> None:
    (project / "func.yaml").write_text(TEXT, encoding="utf-8")
    document = Document.load(project)
    for index, value in enumerate(values):
        document.append("run.envs", {"name": f"V{index}", "value": value})
    for name in removed:
        document.remove("run.envs", {"name": name})
    if any(value.startswith("{{") for value in values):
        return

    document.save()

    written = Document.load(project)
    assert written.config == document.config
    assert written.config.run.envs[3 - len(removed) :] == tuple(
        Env(f"V{index}", value) for index, value in enumerate(values)
    )
    comments = [
        "# $schema",
        "# as the",
        "# when",
        "# how many",
        "# who asks",
        "# Where",
        "# ours",
        "# nothing",
        "# the end",
    ]
    places = [content(project).index(comment) for comment in comments]
    assert places == sorted(places)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, len(TEXT) - 1),
    removed=st.integers(0, 20),
    inserted=st.sampled_from(
        ["&x ", "*x", "<<: *x\n", "!t ", "? [a]\n: b\n", "[", "}", "- ", "\n---\n", "\x00", "~", ".inf"]
    ),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    project: Path, position: int, removed: int, inserted: str
) -> None:
    text = TEXT[:position] + inserted + TEXT[position + removed :]
    (project / "func.yaml").write_text(text, encoding="utf-8")
    try:
        document = Document.read(project)
        document.append("run.envs", {"name": "ADDED", "value": "1"})
        document.set("deploy.namespace", "team")
        document.remove("run.envs", {"name": "GOAL"})
        document.save()
    except InvalidProject:
        return

    assert Document.load(project).config == document.config
