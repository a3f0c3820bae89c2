"""Reading func.yaml: what is accepted, what is a warning, and that every problem is reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from lifl.errors import InvalidProject
from lifl.project import load_project

GOOD = """\
specVersion: 0.36.0
name: my-fedavg
runtime: python
created: 2026-11-22T12:00:00Z
invoke: cloudevent
deploy:
  annotations:
    lifl.dev/function: functions/fedavg.py
"""
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "functions").mkdir()
    for name in ("fedavg", "median"):
        (tmp_path / "functions" / f"{name}.py").write_text("# an aggregator\n")
    write(tmp_path, GOOD)
    return tmp_path


def write(project: Path, text: str) -> None:
    (project / "func.yaml").write_text(text, encoding="utf-8")


def problems_of(project: Path) -> list[str]:
    with pytest.raises(InvalidProject) as caught:
        load_project(project)
    return str(caught.value).splitlines()


def test_a_project_names_its_function_and_serves_every_file_of_functions(project: Path) -> None:
    loaded = load_project(project)

    assert loaded.name == "my-fedavg"
    assert loaded.function == "fedavg"
    assert loaded.function_file == project.resolve() / "functions/fedavg.py"
    assert list(loaded.functions) == ["fedavg", "median"]
    assert loaded.warnings == ()


def test_the_path_of_func_yaml_itself_is_as_good_as_its_directory(project: Path) -> None:
    assert load_project(project / "func.yaml") == load_project(project)


def test_this_repository_is_a_project_itself() -> None:
    loaded = load_project(REPOSITORY)

    assert loaded.name == loaded.function == "fedavg"
    assert loaded.warnings == ()


def test_a_function_outside_of_functions_is_served_too(project: Path) -> None:
    (project / "mine.py").write_text("")
    write(project, GOOD.replace("functions/fedavg.py", "mine.py"))

    loaded = load_project(project)

    assert loaded.function == "mine"
    assert list(loaded.functions) == ["fedavg", "median", "mine"]


def test_helpers_and_files_that_are_no_identifiers_are_not_served(project: Path) -> None:
    for name in ("_shared.py", "__init__.py", "not-a-name.py", "class.py", "notes.txt"):
        (project / "functions" / name).write_text("")

    loaded = load_project(project)

    assert list(loaded.functions) == ["fedavg", "median"]
    assert [warning.split()[0] for warning in loaded.warnings] == ["functions/class.py", "functions/not-a-name.py"]


def test_without_annotation_the_function_of_the_same_name_is_taken(project: Path) -> None:
    write(project, GOOD.split("deploy:")[0].replace("my-fedavg", "median"))

    assert load_project(project).function == "median"


def test_without_annotation_an_only_function_is_taken(project: Path) -> None:
    (project / "functions/median.py").unlink()
    write(project, GOOD.split("deploy:")[0])

    assert load_project(project).function == "fedavg"


def test_without_annotation_several_functions_are_offered_for_choice(project: Path) -> None:
    write(project, GOOD.split("deploy:")[0])

    assert problems_of(project)[1:] == [
        "\tdeploy.annotations: 'lifl.dev/function' is missing; "
        "name one of functions/fedavg.py, functions/median.py"
    ]


def test_unknown_fields_are_warnings_with_their_line_and_a_suggestion(project: Path) -> None:
    write(project, GOOD + "    lifl.dev/funktion: x\n  option: {}\n  options: {scale: {minimum: 1}}\nimag: x\n")

    assert load_project(project).warnings == (
        'line 10: unknown field "deploy.option" is ignored; did you mean "options"?',
        'line 11: unknown field "deploy.options.scale.minimum" is ignored; did you mean "min"?',
        'line 12: unknown field "imag" is ignored; did you mean "image"?',
        'line 9: unknown annotation "lifl.dev/funktion" is ignored; did you mean "lifl.dev/function"?',
    )


def test_items_of_lists_are_looked_into(project: Path) -> None:
    write(project, GOOD + "run:\n  envs:\n  - name: A\n    value: c\n    valu: b\n")

    assert load_project(project).warnings == (
        'line 13: unknown field "run.envs[0].valu" is ignored; did you mean "value"?',
    )


def test_annotations_of_others_are_nobodys_business(project: Path) -> None:
    write(project, GOOD + "    example.com/owner: me\n")

    assert load_project(project).warnings == ()


def test_all_problems_are_reported_at_once(project: Path) -> None:
    write(
        project,
        "specVersion: new\nname: My_Function\nruntime: go\ninvoke: grpc\n"
        "deploy: {annotations: {lifl.dev/function: functions/none.py, example.com/owners: [a]}}\n",
    )

    lines = problems_of(project)

    assert lines[0] == f"'{project / 'func.yaml'}' contains errors:"
    assert sorted(line.strip().split(":")[0] for line in lines[1:]) == [
        "created",
        "deploy.annotations",
        "deploy.annotations",
        "invoke",
        "name",
        "runtime",
        "specVersion",
    ]


def test_another_spec_version_is_read_with_a_warning(project: Path) -> None:
    write(project, GOOD.replace("0.36.0", "0.35.0"))

    assert load_project(project).warnings == ("specVersion 0.35.0 is read as 0.36.0",)


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("../outside.py", "lies outside of the project"),
        ("/etc/passwd", "lies outside of the project"),
        ("functions/none.py", "there is no file"),
        ("functions", "there is no file"),
        ("readme.txt", "no Python file"),
        ("fedavg.py", "rename one"),
    ],
)
def test_an_unusable_function_is_a_problem(project: Path, target: str, cause: str) -> None:
    (project.parent / "outside.py").write_text("")
    (project / "readme.txt").write_text("")
    (project / "fedavg.py").write_text("")
    write(project, GOOD.replace("functions/fedavg.py", target))

    (problem,) = problems_of(project)[1:]

    assert cause in problem


def test_a_link_out_of_the_project_is_outside(project: Path) -> None:
    (project.parent / "elsewhere.py").write_text("")
    (project / "link.py").symlink_to(project.parent / "elsewhere.py")
    write(project, GOOD.replace("functions/fedavg.py", "link.py"))

    assert "outside" in problems_of(project)[1]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("name: [", "line 1"),
        ("name: a\nname: b\n", 'found duplicate key "name"'),
        ("- a\n", "has to be a mapping"),
        ("", "has to be a mapping"),
        ("42", "has to be a mapping"),
        ("\x00", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("x" * (1 << 20) + "y", "larger than"),
    ],
)
def test_what_is_no_func_yaml_is_refused_with_the_cause(project: Path, text: str, cause: str) -> None:
    write(project, text)

    assert cause in "\n".join(problems_of(project))


def test_wrong_types_are_problems_and_no_crash(project: Path) -> None:
    write(project, "specVersion: [1]\nname: {a: b}\nruntime: 3\ncreated: soon\ninvoke: [x]\ndeploy: 7\n")

    assert len(problems_of(project)) == 8


def test_a_directory_without_func_yaml_says_so(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == [f"no function project in '{tmp_path}': there is no func.yaml"]
    assert "no function project" in problems_of(tmp_path / "nowhere")[0]


def test_a_project_without_functions_says_which_file_to_write(tmp_path: Path) -> None:
    write(tmp_path, GOOD.split("deploy:")[0])

    assert problems_of(tmp_path)[1] == "\tthere is no function: write functions/my_fedavg.py"
