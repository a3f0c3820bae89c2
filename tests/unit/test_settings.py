"""Which of several places a setting is taken from."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from lifl.cli.common import CommandError
from lifl.cli.settings import (
    Setting,
    UserConfig,
    choose_image,
    choose_namespace,
    read_user_config,
    user_config_file,
)
from lifl.func_yaml.config import Deploy, FunctionConfig

NONE = UserConfig(Path("/none"))
USER = UserConfig(Path("/user"), namespace="user", registry="ghcr.io/user")


def config(**fields: object) -> FunctionConfig:
    return FunctionConfig("mean", "python", datetime(2026, 11, 22, tzinfo=UTC), **fields)  # type: ignore[arg-type]


def test_a_namespace_comes_from_the_first_that_names_one() -> None:
    project = config(namespace="intended", deploy=Deploy(namespace="deployed"))
    deployed = config(deploy=Deploy(namespace="deployed"))

    assert choose_namespace("given", project, "active", USER).value == "given"
    assert choose_namespace(None, project, "active", USER).value == "intended"
    assert choose_namespace(None, deployed, "active", USER).value == "deployed"
    assert choose_namespace(None, config(), "active", USER) == Setting("active", "the kubeconfig's context")
    assert choose_namespace(None, None, None, USER) == Setting("user", "/user")
    assert choose_namespace(None, None, None, NONE) == Setting("default", "the default")


def test_a_namespace_that_cannot_be_says_where_it_came_from() -> None:
    with pytest.raises(CommandError, match=r"'My_Team' has to be .* \(from --namespace\)"):
        choose_namespace("My_Team", None, None, NONE)


def test_an_image_comes_before_a_registry_and_what_is_nearer_before_both() -> None:
    project = config(image="file/image:1", registry="file")
    registry = config(registry="file")
    none: dict[str, str] = {}

    assert choose_image("a/b", None, project, USER, {"FUNC_IMAGE": "x/y"}).value == "a/b"
    assert choose_image(None, "a/", project, USER, {"FUNC_IMAGE": "x/y"}).value == "a/mean:latest"
    assert choose_image(None, None, project, USER, {"FUNC_IMAGE": "x/y", "FUNC_REGISTRY": "z"}).value == "x/y"
    assert choose_image(None, None, project, USER, {"FUNC_REGISTRY": "z"}).value == "z/mean:latest"
    assert choose_image(None, None, project, USER, none) == Setting("file/image:1", "func.yaml")
    assert choose_image(None, None, registry, USER, none).value == "file/mean:latest"
    assert choose_image(None, None, config(), USER, none) == Setting("ghcr.io/user/mean:latest", "/user")


def test_an_image_that_nobody_names_is_asked_for() -> None:
    with pytest.raises(CommandError) as caught:
        choose_image(None, None, config(), NONE, {})

    assert [hint[0] for hint in caught.value.hints] == [
        "func --registry REGISTRY/USER",
        "func --image REGISTRY/USER/NAME:TAG",
        "export FUNC_REGISTRY=REGISTRY/USER",
    ]


def test_wrong_images_are_refused_with_their_origin() -> None:
    with pytest.raises(CommandError, match="exclude each other"):
        choose_image("a/b", "c", config(), NONE, {})
    with pytest.raises(CommandError, match=r"the registry 'https://c' .* \(from the environment\)"):
        choose_image(None, None, config(), NONE, {"FUNC_REGISTRY": "https://c"})
    with pytest.raises(CommandError, match=r"the image 'A' .* \(from the command line\)"):
        choose_image("A", None, config(), NONE, {})


def test_the_users_configuration_is_where_knatives_func_has_it(tmp_path: Path) -> None:
    assert user_config_file({"HOME": "/home/ada"}) == Path("/home/ada/.config/func/config.yaml")
    assert user_config_file({"HOME": "/home/ada", "XDG_CONFIG_HOME": "/x"}) == Path("/x/func/config.yaml")
    assert user_config_file({"XDG_CONFIG_HOME": "/x", "FUNC_CONFIG_FILE": "/y.yaml"}) == Path("/y.yaml")
    assert read_user_config({"FUNC_CONFIG_FILE": str(tmp_path / "none")}).registry is None


def test_the_users_configuration_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("registry: localhost:5000\nregistryInsecure: true\nlanguage: python\nunknown: 1\nnamespace:\n")

    assert read_user_config({"FUNC_CONFIG_FILE": str(file)}) == UserConfig(
        file, registry="localhost:5000", registry_insecure=True, language="python"
    )
    file.write_text("")
    assert read_user_config({"FUNC_CONFIG_FILE": str(file)}) == UserConfig(file)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: [", "is not valid YAML: line 1"),
        ("- a", "has to be a mapping"),
        ("registry: [a]", "has a registry that is no text"),
        ("confirm: perhaps", "has 'confirm: perhaps'; it is true or false"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_an_error(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)

    with pytest.raises(CommandError, match=f"^the configuration file '{file}' {cause}".replace("[", "\\[")):
        read_user_config({"FUNC_CONFIG_FILE": str(file)})
