"""The commands that make and change a project: create, config, subscribe, languages, templates, version."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lifl import cli
from lifl.func_yaml.config import FunctionConfig
from lifl.func_yaml.document import Document
from lifl.function import load_function
from lifl.project import load_project
from lifl.templates import NAMES, function_stem
from ruamel.yaml import YAML

FUNC = [sys.executable, "-m", "lifl.cli"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FUNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    monkeypatch.setattr(sys, "argv", ["func"])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert cli.main(arguments) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


@pytest.fixture
def config(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The content of the func.yaml of a new project, which becomes the working directory."""
    run("create", "mean")
    monkeypatch.chdir("mean")

    def read() -> FunctionConfig:
        return Document.load(Path()).config

    return read


# --- create --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", NAMES)
def test_every_template_makes_a_project_that_lifl_and_knative_find_the_function_in(
    run: Any, template: str
) -> None:
    out, err = run("create", "-t", template, "sub/my-mean")

    directory = Path.cwd() / "sub/my-mean"
    assert (out, err) == ("", f"Created python function in {directory}\n")
    project = load_project(directory)
    assert project.warnings == ()
    assert (project.name, project.function) == ("my-mean", "my_mean")
    assert project.function_file == directory / "function/my_mean.py"
    assert load_function(project.function_file).name == "my_mean"
    code = "import function; assert function.new.__name__ == 'new'; function.new().handle"
    subprocess.run([sys.executable, "-c", code], cwd=directory, check=True)
    assert not [
        path for path in directory.rglob("*") if path.is_file() and "$" in path.read_text().replace("$schema", "")
    ]


def test_what_is_made_is_said_as_json_too(run: Any) -> None:
    out, _ = run("init", "-o", "json", "mean")

    assert json.loads(out) == {
        "name": "mean",
        "path": str(Path.cwd() / "mean"),
        "language": "python",
        "template": "fedavg",
        "function": "function/mean.py",
    }


def test_a_project_can_be_made_in_this_directory_beside_hidden_files(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mean/.git").mkdir(parents=True)
    monkeypatch.chdir("mean")

    run("create")

    assert sorted(os.listdir()) == [
        ".funcignore",
        ".git",
        ".gitignore",
        "README.md",
        "func.yaml",
        "function",
        "pyproject.toml",
        "tests",
    ]


@pytest.mark.parametrize("name", ["class", "new", "aggregator", "import-this"])
def test_a_name_that_python_needs_is_no_problem(run: Any, name: str) -> None:
    run("create", name)

    project = load_project(Path(name))
    assert project.function == function_stem(name)
    assert load_function(project.function_file).name == project.function
    subprocess.run([sys.executable, "-c", "from function import new; new()"], cwd=name, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["My_Mean"], "the last element of the path is the function's name, and the name 'My_Mean' has to be"),
        (["a" * 64], "has 64 characters, but may have 63"),
        (["-t", "http", "mean"], "there is no template 'http' for python; the templates are fedavg, fedadam,"),
        (["-l", "go", "mean"], "there is no language 'go'; functions are written in python"),
        (["full"], "is not empty: it has 'note'"),
        (["hidden"], "is not empty: it has '.gitignore'"),
        (["project"], "is a function project already: it has a func.yaml"),
        (["full/note.txt"], "has to be lower-case letters"),
        (["full/note"], "is no directory"),
    ],
)
def test_what_cannot_be_made_is_refused_and_nothing_is_left(run: Any, arguments: list[str], message: str) -> None:
    for name in ("full/note.txt", "full/note", "hidden/.gitignore", "project/func.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
    before = sorted(str(path) for path in Path().rglob("*"))

    _, err = run("create", *arguments, code=1)

    assert message in err
    assert "\n\nTry this:\n  func create " in err
    assert sorted(str(path) for path in Path().rglob("*")) == before


def test_a_name_that_cannot_be_comes_with_one_that_can(run: Any) -> None:
    assert "func create sub/my-mean" in run("create", "sub/My_Mean", code=1)[1]
    assert "func create sub/my-function" in run("create", "sub/42", code=1)[1]


def test_a_project_that_cannot_be_written_whole_is_not_written(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if source.name == "pyproject.toml" and ".func-create-" in str(source):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)

    _, err = run("create", "sub/mean", code=1)

    assert "the project cannot be written: [Errno 28] No space left on device" in err
    assert os.listdir() == []


def test_values_are_asked_for_on_a_terminal_when_that_is_wanted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = io.StringIO("mine\n\nmedian\n")
    monkeypatch.setattr(answers, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", answers)

    run("create", "--confirm")

    assert "gather=True" in Path("mine/function/mine.py").read_text()


def test_the_language_comes_from_the_users_configuration_and_before_that_the_environment(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "configuration/func").mkdir(parents=True)
    (tmp_path / "configuration/func/config.yaml").write_text("language: go\n")
    assert "there is no language 'go'" in run("create", "mean", code=1)[1]

    monkeypatch.setenv("FUNC_LANGUAGE", "rust")
    assert "there is no language 'rust'" in run("create", "mean", code=1)[1]

    run("create", "-l", "python", "mean")


# --- config --------------------------------------------------------------------------------------------------


def test_environment_variables_come_change_and_go(run: Any, config: Any) -> None:
    assert run("config", "envs") == ("", "The function has no environment variables of its own\n")

    run("config", "envs", "add", "--name", "GOAL", "--value", "8")
    assert run("config", "envs", "add", "--name", "GOAL", "--value", "9")[1].startswith("Changed the environment")
    run("config", "envs", "add", "--name", "TOKEN", "--value", "{{ secret:access:token }}")
    run("config", "envs", "add", "--value", "{{ configMap:settings }}")

    assert run("config", "envs")[0] == (
        "NAME        VALUE\n"
        "GOAL        9\n"
        "TOKEN       {{ secret:access:token }}\n"
        "(all keys)  {{ configMap:settings }}\n"
    )
    assert json.loads(run("config", "envs", "-o", "json")[0])[::2] == [
        {"name": "GOAL", "value": "9"},
        {"value": "{{ configMap:settings }}"},
    ]

    run("config", "envs", "remove", "--name", "GOAL")
    run("config", "envs", "remove", "--value", "{{ configMap:settings }}")
    assert [env.name for env in config().run.envs] == ["TOKEN"]


def test_labels_come_and_go(run: Any, config: Any) -> None:
    run("config", "labels", "add", "--name", "example.com/team", "--value", "research")
    run("config", "labels", "add", "--name", "marked")

    assert run("config", "labels")[0] == "KEY               VALUE\nexample.com/team  research\nmarked\n"
    assert json.loads(run("config", "labels", "-o", "json")[0])[1] == {"key": "marked"}

    run("config", "labels", "remove", "--name", "marked")
    assert [label.key for label in config().deploy.labels] == ["example.com/team"]


def test_volumes_come_and_go(run: Any, config: Any) -> None:
    add = ("config", "volumes", "add", "--type")
    run(*add, "configmap", "--source", "settings", "-m", "/settings")
    run(*add, "secret", "--source", "keys", "-m", "/keys")
    run(*add, "pvc", "--source", "data", "-m", "/data", "--read-only")
    run(*add, "emptydir", "--medium", "Memory", "--size", "1Gi", "-m", "/scratch")

    assert run("config", "volumes")[0].splitlines()[1:] == [
        "/settings  configmap  settings",
        "/keys      secret     keys",
        "/data      pvc        data (read only)",
        "/scratch   emptydir   Memory, at most 1Gi",
    ]
    assert json.loads(run("config", "volumes", "-o", "json")[0])[2:] == [
        {"persistentVolumeClaim": {"claimName": "data", "readOnly": True}, "path": "/data"},
        {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}, "path": "/scratch"},
    ]

    run("config", "volumes", "remove", "-m", "/keys")
    assert [volume.path for volume in config().run.volumes] == ["/settings", "/data", "/scratch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["envs", "add", "--name", "A", "--value", "{{ b }}"],
            "env entry #0 with name 'A' has the value '{{ b }}'",
        ),
        (["envs", "add", "--value", "b"], "env entry #0 has no name and the value 'b'"),
        (["envs", "add", "--name", "A"], "Missing option '--value'."),
        (["envs", "remove", "--name", "A"], "there is no environment variable 'A'"),
        (["envs", "remove"], "give either --name or --value"),
        (["labels", "add", "--name", "-", "--value", "b"], "label entry #0 has an invalid key"),
        (["labels", "remove", "--name", "a"], "there is no label 'a'"),
        (["volumes", "add", "--type", "secret", "-m", "/a"], "a volume of type secret needs --source"),
        (["volumes", "add", "--type", "pvc", "-s", "a", "-m", "/a", "--size", "1"], "--size cannot be given for"),
        (["volumes", "add", "--type", "emptydir", "-m", "a"], "has the path 'a', which has to start with '/'"),
        (["volumes", "add", "--type", "emptydir", "-m", "/a", "--size", "big"], "'big' is no quantity"),
        (["volumes", "remove", "-m", "/a"], "there is no volume at '/a'"),
    ],
)
def test_what_func_yaml_must_not_say_is_refused_and_the_file_stays(
    run: Any, config: Any, arguments: list[str], message: str
) -> None:
    before = Path("func.yaml").read_bytes()

    assert message in run("config", *arguments, code=1)[1]

    assert Path("func.yaml").read_bytes() == before
    assert config().run.envs == ()


def test_the_project_is_found_by_the_path_of_either_the_group_or_the_command(
    run: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("..")

    run("config", "envs", "add", "-p", "mean", "--name", "A", "--value", "1")
    run("config", "envs", "-p", "mean", "add", "--name", "B", "--value", "2")
    monkeypatch.setenv("FUNC_PATH", "mean")
    run("config", "envs", "add", "--name", "C", "--value", "3")

    assert [env.name for env in Document.load(Path("mean")).config.run.envs] == ["A", "B", "C"]
    monkeypatch.delenv("FUNC_PATH")
    assert "func create PATH" in run("config", "envs", code=1)[1]


def test_a_run_asks_for_every_variable_that_is_missing(run: Any, config: Any) -> None:
    for name in ("A", "B"):
        run("config", "envs", "add", "--name", name, "--value", f"{{{{ env:LIFL_TEST_{name} }}}}")

    _, err = run("run", code=1)

    assert "the environment variable 'LIFL_TEST_A', which func.yaml asks for" in err
    assert "the environment variable 'LIFL_TEST_B', which func.yaml asks for" in err


def test_a_project_in_another_language_can_be_changed_but_not_run(run: Any, config: Any) -> None:
    text = Path("func.yaml").read_text()
    Path("func.yaml").write_text(text.replace("runtime: python", "runtime: go"))

    run("config", "envs", "add", "--name", "A", "--value", "1")

    assert config().runtime == "go"
    assert "\truntime: 'go' is not supported; LIFL runs 'python'" in run("run", code=1)[1]


# --- subscribe -----------------------------------------------------------------------------------------------


def test_subscriptions_are_one_for_each_broker_with_filters_that_add_up(run: Any, config: Any) -> None:
    assert run("subscribe")[1] == "Subscribed to all events of the broker 'default'\n"
    run("subscribe", "-f", "type=a", "-f", "source=b=c")
    run("subscribe", "--source", "other", "--filter", "type=d")
    run("subscribe", "-f", "type=e")

    found = [(item.source, dict(item.filters)) for item in config().deploy.subscriptions]
    assert found == [("default", {"type": "e", "source": "b=c"}), ("other", {"type": "d"})]


@pytest.mark.parametrize("wrong", ["type", "=a", "type=", ""])
def test_a_malformed_filter_is_an_error_and_nothing_is_subscribed_to(run: Any, config: Any, wrong: str) -> None:
    _, err = run("subscribe", "-f", "source=a", "-f", wrong, code=1)

    assert f"the filter '{wrong}' is not of the form NAME=VALUE" in err
    assert config().deploy.subscriptions == ()


def test_a_filter_of_what_is_no_attribute_is_an_error(run: Any, config: Any) -> None:
    assert "has the filter 'Type'" in run("subscribe", "-f", "Type=a", code=1)[1]
    assert config().deploy.subscriptions == ()


# --- the rest ------------------------------------------------------------------------------------------------


def test_languages_and_templates_are_listed(run: Any) -> None:
    assert run("languages") == ("python\n", "")
    assert json.loads(run("languages", "--json")[0]) == ["python"]
    assert run("templates")[0].split() == ["LANGUAGE", "TEMPLATE"] + [
        word for name in NAMES for word in ("python", name)
    ]
    assert run("templates", "python")[0].split() == list(NAMES)
    assert json.loads(run("templates", "--json")[0]) == {"python": list(NAMES)}
    assert "there is no language 'go'" in run("templates", "go", code=1)[1]


def test_the_version_is_the_same_in_every_format(run: Any) -> None:
    plain = run("version")[0].strip()

    facts = json.loads(run("version", "-o", "json")[0])
    assert facts["version"] == plain and facts["func_yaml"] == "0.36.0"
    assert YAML(typ="safe", pure=True).load(run("version", "-o", "yaml")[0]) == facts


def test_other_names_of_a_command_are_the_command(run: Any) -> None:
    assert run("init", "--help")[0].startswith("Usage: func init ")
    for alias, name in cli.ALIASES.items():
        assert cli.main([alias, "--help"]) == (0 if name in cli.SUMMARIES else 1)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_asks_the_program(shell: str) -> None:
    # For bash, click looks at the version of the one that is installed.
    script = subprocess.run([*FUNC, "completion", shell], capture_output=True, text=True, check=True).stdout

    assert f"_FUNC_COMPLETE={shell}_complete" in script


def test_commands_are_completed() -> None:
    environment = os.environ | {"_FUNC_COMPLETE": "bash_complete", "COMP_WORDS": "func cre", "COMP_CWORD": "1"}
    result = subprocess.run(FUNC, env=environment, capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["plain,create"]


def test_commands_on_projects_import_nothing_that_only_nodes_need(tmp_path: Path) -> None:
    program = (
        "import sys; from lifl.cli import main; assert main(['create', 'mean']) == 0;"
        "assert main(['config', 'envs', '-p', 'mean', 'add', '--name', 'A', '--value', 'b']) == 0;"
        "print(sorted({'numpy', 'torch', 'kubernetes', 'flask', 'rich', 'msgspec'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout == "[]\n"
