"""The content of func.yaml: types, every problem at once, earlier versions, and Knative's published schema."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from lifl.errors import InvalidInput, InvalidProject
from lifl.func_yaml.config import (
    EmptyDir,
    Env,
    FunctionConfig,
    HealthEndpoints,
    Label,
    Options,
    PersistentVolumeClaim,
    ResourceLimits,
    ResourceRequests,
    Resources,
    Scale,
    Subscription,
    Volume,
)
from lifl.func_yaml.document import Document
from lifl.func_yaml.expressions import (
    ConfigMapReference,
    LocalVariable,
    Plain,
    SecretReference,
    evaluate_labels,
    local_environment,
    parse_source,
)
from lifl.func_yaml.names import image_problem, parse_quantity, qualified_name_problem, registry_problem
from ruamel.yaml import YAML

from tests.knative_schema import need_fixtures

HEAD = "specVersion: 0.36.0\nname: mean\nruntime: python\ncreated: 2026-11-22T12:00:00Z\ninvoke: cloudevent\n"
FULL = (
    HEAD
    + """\
registry: ghcr.io/ada
registryInsecure: true
namespace: team
build:
  builder: pack
  baseImage: localhost/base:1
  buildEnvs:
  - {name: PIP_INDEX, value: '{{ env:PIP_INDEX }}'}
run:
  startTimeout: 1m30s
  envs:
  - name: GOAL
    value: 8
  - name: HOME
    value: '{{env:HOME}}'
  - name: TOKEN
    value: '{{ secret:access:token }}'
  - name: LEVEL
    value: '{{ configMap:logging:level }}'
  - value: '{{ secret:all-of-it }}'
  volumes:
  - secret: certificates
    path: /etc/certificates
  - configMap: settings
    path: /etc/settings
  - persistentVolumeClaim: {claimName: data, readOnly: true}
    path: /data
  - emptyDir: {medium: Memory, sizeLimit: 256Mi}
    path: /scratch
deploy:
  namespace: before
  annotations: {example.com/owner: ada}
  labels:
  - key: example.com/team
    value: fl
  - key: user
    value: '{{ env:USER }}'
  options:
    scale: {min: 0, max: 4, metric: rps, target: 12.5, utilization: 70}
    resources:
      requests: {cpu: 250m, memory: 128Mi}
      limits: {cpu: 1, memory: 1Gi, concurrency: 3}
  healthEndpoints: {liveness: /live, readiness: /ready}
  serviceAccountName: mean
  imagePullSecret: pull
  subscriptions:
  - source: default
    filters: {type: dev.lifl.update.v1}
"""
)


def read(directory: Path, text: str) -> Document:
    (directory / "func.yaml").write_text(text, encoding="utf-8")
    return Document.read(directory)


def problems_of(directory: Path, text: str) -> tuple[str, ...]:
    return read(directory, HEAD + text).problems


def test_every_field_is_read_with_its_type(tmp_path: Path) -> None:
    document = read(tmp_path, FULL)

    config = document.config
    assert document.problems == () and document.warnings == ()
    assert (config.name, config.runtime, config.invoke) == ("mean", "python", "cloudevent")
    assert config.created == datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert (config.registry, config.registry_insecure, config.namespace) == ("ghcr.io/ada", True, "team")
    assert (config.build.builder, config.build.base_image) == ("pack", "localhost/base:1")
    assert config.build.build_envs == (Env("PIP_INDEX", "{{ env:PIP_INDEX }}"),)
    assert config.run.start_timeout_s == 90
    assert [env.source for env in config.run.envs] == [
        Plain("8"),
        LocalVariable("HOME"),
        SecretReference("access", "token"),
        ConfigMapReference("logging", "level"),
        SecretReference("all-of-it", None),
    ]
    assert config.run.volumes == (
        Volume("/etc/certificates", secret="certificates"),
        Volume("/etc/settings", config_map="settings"),
        Volume("/data", persistent_volume_claim=PersistentVolumeClaim("data", read_only=True)),
        Volume("/scratch", empty_dir=EmptyDir("Memory", "256Mi")),
    )
    assert config.deploy.labels == (Label("example.com/team", "fl"), Label("user", "{{ env:USER }}"))
    assert config.deploy.options == Options(
        Scale(0, 4, "rps", 12.5, 70), Resources(ResourceRequests("250m", "128Mi"), ResourceLimits("1", "1Gi", 3))
    )
    assert config.deploy.health_endpoints == HealthEndpoints("/live", "/ready")
    assert (config.deploy.service_account_name, config.deploy.image_pull_secret) == ("mean", "pull")
    assert config.deploy.subscriptions == (Subscription("default", {"type": "dev.lifl.update.v1"}),)


def test_what_is_left_out_is_none_or_empty(tmp_path: Path) -> None:
    config = read(tmp_path, HEAD + "image:\nnamespace: ~\nrun: {}\ndeploy: null\n").config

    assert config == FunctionConfig("mean", "python", datetime(2026, 11, 22, 12, tzinfo=UTC), invoke="cloudevent")


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ("{}", "env entry #0 has neither name nor value"),
        ("{name: A}", "env entry #0 with name 'A' has no value"),
        ("{name: 1A, value: b}", "env entry #0 has an invalid name: '1A'"),
        ("{value: b}", "env entry #0 has no name and the value 'b'"),
        ("{value: '{{ env:A }}'}", "but without a name allowed is only"),
        ("{value: '{{ secret:a:b }}'}", "but without a name allowed is only"),
        ("{name: A, value: '{{ secret:a }}'}", "but allowed is only text, '{{ env:LOCAL_NAME }}'"),
        ("{name: A, value: '{{ Secret:a:b }}'}", "has the value '{{ Secret:a:b }}'"),
        ("{name: A, value: '{{ configmap:a:b }}'}", "has the value '{{ configmap:a:b }}'"),
        ("{name: A, value: '{{ env:A-B }}'}", "has the value"),
        ("{name: A, value: '{{ env:A }} more'}", "has the value"),
        ("{name: A, value: [b]}", "run.envs[0].value: '[...]' has to be text"),
        ("just text", "run.envs[0]: 'just text' has to be a mapping"),
    ],
)
def test_an_env_that_no_form_fits_is_a_problem(tmp_path: Path, env: str, problem: str) -> None:
    assert problem in problems_of(tmp_path, f"run:\n  envs:\n  - {env}\n")[0]


@pytest.mark.parametrize(
    "value", ["", "plain", "{ not: an expression }", "a {{ env:X }}", "{{env:X}}", "{{ env:_9}}"]
)
def test_an_env_of_a_known_form_is_none(tmp_path: Path, value: str) -> None:
    assert problems_of(tmp_path, f"run:\n  envs:\n  - name: -a.B_9\n    value: {json.dumps(value)}\n") == ()


@pytest.mark.parametrize(
    ("volume", "problem"),
    [
        ("{path: /a}", "volume entry #0 has nothing to mount"),
        ("{path: /a, secret: s, configMap: c}", "volume entry #0 has secret and configMap together"),
        ("{secret: s}", "volume entry #0 (secret s) has no path"),
        ("{secret: s, path: relative}", "volume entry #0 (secret s) has the path 'relative'"),
        ("{secret: No_Name, path: /a}", "has an invalid secret: 'No_Name'"),
        ("{persistentVolumeClaim: {}, path: /a}", "volume entry #0 (persistentVolumeClaim) has no claimName"),
        ("{emptyDir: {medium: Disk}, path: /a}", "volume entry #0 (emptyDir) has the medium 'Disk'"),
        ("{emptyDir: {sizeLimit: much}, path: /a}", "has an invalid sizeLimit: 'much' is no quantity"),
    ],
)
def test_a_volume_has_a_path_and_exactly_one_source(tmp_path: Path, volume: str, problem: str) -> None:
    (found,) = problems_of(tmp_path, f"run:\n  volumes:\n  - {volume}\n")

    assert problem in found


@pytest.mark.parametrize(
    ("deploy", "problem"),
    [
        ("labels: [{value: a}]", "label entry #0 has no key"),
        ("labels: [{key: -a}]", "label entry #0 has an invalid key"),
        ("labels: [{key: a, value: 'b c'}]", "label entry #0 with key 'a' has an invalid value: 'b c'"),
        ("labels: [{key: a, value: '{{ secret:a:b }}'}]", "allowed is only text or '{{ env:LOCAL_NAME }}'"),
        ("labels: [{key: a}, {key: a}]", "label key 'a' is there 2 times"),
        ("options: {scale: {min: -1}}", 'options field "scale.min" has the value -1'),
        ("options: {scale: {min: 3, max: 2}}", 'options field "scale.max" has the value 2, which is less than'),
        ("options: {scale: {metric: cpu}}", "options field \"scale.metric\" has the value 'cpu'"),
        ("options: {scale: {target: 0.001}}", 'options field "scale.target" has the value 0.001'),
        ("options: {scale: {utilization: 101}}", 'options field "scale.utilization" has the value 101'),
        ("options: {scale: {min: '1'}}", "deploy.options.scale.min: '1' has to be a whole number, without quotes"),
        ("options: {scale: {max: 1.5}}", "deploy.options.scale.max: '1.5' has to be a whole number"),
        ("options: {scale: {target: .nan}}", "deploy.options.scale.target: '.nan' has to be a number"),
        ("options: {resources: {limits: {cpu: much}}}", 'options field "resources.limits.cpu" is invalid'),
        ("options: {resources: {requests: {memory: -1Mi}}}", "'-1Mi' is less than 0"),
        (
            "options: {resources: {requests: {memory: 2Gi}, limits: {memory: 1G}}}",
            'options field "resources.requests.memory" has the value 2Gi, which is more than the limit, 1G',
        ),
        ("options: {resources: {limits: {concurrency: -1}}}", 'options field "resources.limits.concurrency"'),
        ("healthEndpoints: {liveness: live}", "deploy.healthEndpoints.liveness: 'live' has to start with '/'"),
        ("serviceAccountName: A", "deploy.serviceAccountName: 'A'"),
        ("imagePullSecret: a b", "deploy.imagePullSecret: 'a b'"),
        ("deployer: helm", "deploy.deployer: 'helm' is not supported; it is one of knative, raw, keda"),
        ("subscriptions: [{filters: {type: a}}]", "subscription entry #0 has no source"),
        ("subscriptions: [{source: a, filters: {Type: a}}]", "subscription entry #0 has the filter 'Type'"),
        ("annotations: {not a key: b}", "deploy.annotations: 'not a key'"),
        ("managementDisabled: perhaps", "deploy.managementDisabled: 'perhaps' has to be true or false"),
        ("namespace: My_Team", "deploy.namespace: 'My_Team'"),
    ],
)
def test_what_a_cluster_would_refuse_is_a_problem(tmp_path: Path, deploy: str, problem: str) -> None:
    (found,) = problems_of(tmp_path, f"deploy:\n  {deploy}\n")

    assert problem in found


def test_all_problems_of_all_parts_are_reported_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "func.yaml").write_text(
        "specVersion: 0.36.0\nname: 1st\nruntime: python\ncreated: 2026-11-22T12:00:00Z\n"
        "registry: https://ghcr.io\ndeployer: [x]\n"
        "run:\n  startTimeout: soon\n"
        "  envs: [{name: A, value: '{{ A }}'}, {name: B, value: b}, {name: B, value: c}]\n"
        "  volumes: [{path: /a/, secret: s}, {path: /a, secret: s}]\n"
        "deploy: {options: {scale: {min: 2, max: 1}}}\n"
    )

    with pytest.raises(InvalidProject) as caught:
        Document.load(tmp_path)

    header, *lines = str(caught.value).splitlines()
    assert header == f"'{tmp_path / 'func.yaml'}' contains errors:"
    assert all(line.startswith("\t") for line in lines)
    assert [line.strip()[:20] for line in lines] == [
        "deployer: '[...]' ha",
        "run.startTimeout: 's",
        "name: '1st' has to b",
        "registry: 'https://g",
        "env entry #0 with na",
        "env name 'B' is ther",
        "volume path '/a' is ",
        'options field "scale',
    ]


def test_numbers_and_truth_values_are_text_where_text_is_expected(tmp_path: Path) -> None:
    document = read(
        tmp_path,
        HEAD
        + "run:\n  envs: [{name: A, value: 010}, {name: B, value: yes}, {name: C, value: 1.50}]\n"
        + "deploy: {annotations: {example.com/count: 1}}\n",
    )

    assert document.problems == ()
    assert [env.value for env in document.config.run.envs] == ["010", "yes", "1.50"]
    assert document.config.deploy.annotations == {"example.com/count": "1"}


# --- other versions ------------------------------------------------------------------------------------------


def test_a_file_of_another_runtime_is_read(tmp_path: Path) -> None:
    document = Document.load(
        read(
            tmp_path,
            HEAD.replace("python", "go").replace("2026-11-22T12:00:00Z", "2024-05-01T10:00:00.123456789+02:00")
            + "run:\n  startTimeout: 90000000000\n  kafka: {brokers: 'b:9092', topic: t, consumerGroup: g}\n",
        ).file
    )

    assert document.config.runtime == "go"
    assert document.config.run.start_timeout_s == 90
    assert document.config.created is not None and document.config.created.microsecond == 123456


def test_a_file_of_before_the_sections_is_read_with_its_fields_in_their_places(tmp_path: Path) -> None:
    document = read(
        tmp_path,
        """\
version: 0.19.0
name: old
namespace: team
runtime: python
image: quay.io/ada/old:latest
builder: quay.io/ada/builder:1
builders: {default: x}
buildpacks: []
build: local
git: {}
envs:
- name: A
  value: b
volumes:
- secret: s
  path: /s
annotations: {a: b}
options: {scale: {max: 2}}
labels:
- key: a
  value: b
healthEndpoints:
  liveness: /live
created: 2021-11-22T12:00:00+01:00
invocation:
  format: cloudevent
""",
    )

    config = document.config
    assert document.problems == ()
    assert document.warnings == (
        "specVersion is missing, so the file is read as one of before 0.25 (now: 0.36.0)",
    )
    assert config.invoke == "cloudevent"
    assert config.build.builder_images == {"pack": "quay.io/ada/builder:1"}
    assert config.run.envs == (Env("A", "b"),)
    assert config.run.volumes == (Volume("/s", secret="s"),)
    assert config.namespace is None and config.deploy.namespace == "team"
    assert config.deploy.annotations == {"a": "b"}
    assert config.deploy.options.scale.max == 2
    assert config.deploy.labels == (Label("a", "b"),)
    assert config.deploy.health_endpoints.liveness == "/live"


def test_a_claim_of_before_0_36_is_spelled_right(tmp_path: Path) -> None:
    text = HEAD.replace("0.36.0", "0.35.0")
    document = read(
        tmp_path, text + "run:\n  volumes:\n  - presistentVolumeClaim: {claimName: data}\n    path: /data\n"
    )

    assert document.warnings == ("specVersion 0.35.0 is read as 0.36.0",)
    assert document.config.run.volumes[0].persistent_volume_claim == PersistentVolumeClaim("data")


def test_a_file_without_time_of_creation_is_new_only_if_it_is_old(tmp_path: Path) -> None:
    assert "created: is missing" in read(tmp_path, "specVersion: 0.36.0\nname: a\nruntime: go\n").problems[0]

    document = read(tmp_path, "name: a\nruntime: go\n")
    written = datetime.fromtimestamp(os.stat(document.file).st_mtime, UTC)
    assert document.problems == ()
    assert document.config.created is not None and abs((document.config.created - written).total_seconds()) < 2


def test_a_later_version_is_read_with_a_warning(tmp_path: Path) -> None:
    document = read(tmp_path, HEAD.replace("0.36.0", "0.38.0") + "scale: {max: 2}\n")

    assert document.problems == ()
    assert document.warnings == (
        "specVersion 0.38.0 is read as 0.36.0",
        'line 6: unknown field "scale" is ignored',
    )


# --- Knative's schema ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema of func.yaml that Knative publishes."""
    return dict(json.loads((need_fixtures() / "func_yaml-schema.json").read_bytes()))


def conforms(schema: dict[str, Any], text: str) -> None:
    from jsonschema import Draft4Validator

    document = YAML(typ="safe", pure=True).load(text)
    document["created"] = str(document["created"])
    Draft4Validator(schema).validate(document)


def every_field(schema: dict[str, Any], node: dict[str, Any]) -> Any:
    """A value that has every field the schema knows, apart from alternatives."""
    if "$ref" in node:
        node = schema["definitions"][node["$ref"].rpartition("/")[2]]
    if "enum" in node:
        return node["enum"][-1]
    match node.get("type"):
        case "object" if "oneOf" in node:
            return {"secret": "a", "path": "/a"}
        case "object" if "patternProperties" in node:
            return {"type": "a"}
        case "object":
            return {name: every_field(schema, child) for name, child in node["properties"].items()}
        case "array":
            return [every_field(schema, node["items"])]
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case _:
            return "1"


def test_no_field_of_the_schema_is_unknown_to_us(schema: dict[str, Any], tmp_path: Path) -> None:
    fields = every_field(schema, schema)
    fields |= {"specVersion": "0.36.0", "name": "a", "created": "2026-11-22T12:00:00Z", "runtime": "go"}
    fields["deploy"]["healthEndpoints"] = {"liveness": "/a", "readiness": "/b"}
    fields["run"]["volumes"] += [
        {"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}, "path": "/b"},
        {"persistentVolumeClaim": {"claimName": "a", "readOnly": False}, "path": "/c"},
        {"configMap": "a", "path": "/d"},
    ]
    for part in ("buildEnvs", "envs"):
        section = fields["build" if part == "buildEnvs" else "run"]
        section[part] = [{"name": "A", "value": "b"}]
    text = json.dumps(fields)
    conforms(schema, text)

    document = read(tmp_path, text)

    assert document.warnings == ()
    assert document.problems == ()


def test_what_is_read_without_problems_conforms_to_the_schema(schema: dict[str, Any], tmp_path: Path) -> None:
    text = FULL.replace("value: 8", "value: '8'").replace("cpu: 1,", "cpu: '1',")
    # The two that Knative's func takes, too, and its own schema does not.
    text = text.replace("startTimeout: 1m30s", "startTimeout: 90000000000").replace("'{{ env:USER }}'", "ada")

    assert read(tmp_path, text).problems == ()
    conforms(schema, text)


@pytest.mark.parametrize(
    "wrong",
    [
        "name: Upper",
        "invoke: grpc",
        "deployer: helm",
        "build: {builder: magic}",
        "build: {volumes: [{path: /a}]}",
        "run: {envs: [{name: 'a b', value: c}]}",
        "run: {volumes: [{path: /a}]}",
        "run: {volumes: [{path: /a, secret: a, configMap: b}]}",
        "run: {kafka: {topic: a}}",
        "deploy: {labels: [{value: a}]}",
        "deploy: {labels: [{key: a, value: '-'}]}",
        "deploy: {subscriptions: [{}]}",
        "deploy: {options: {scale: {min: -1}}}",
        "deploy: {options: {scale: {utilization: 0}}}",
        "deploy: {options: {resources: {limits: {cpu: lots}}}}",
        "deploy: {managementDisabled: 3}",
    ],
)
def test_what_the_schema_refuses_is_a_problem(schema: dict[str, Any], tmp_path: Path, wrong: str) -> None:
    from jsonschema import ValidationError

    key = wrong.partition(":")[0]
    text = "".join(line for line in HEAD.splitlines(True) if not line.startswith(f"{key}:")) + wrong + "\n"
    with pytest.raises(ValidationError):
        conforms(schema, text)

    assert read(tmp_path, text).problems != ()


# --- expressions and names -----------------------------------------------------------------------------------


def test_a_run_on_this_machine_gets_variables_and_leaves_references_as_they_are() -> None:
    envs = [Env("A", "1"), Env("B", "{{ env:X }}"), Env("C", "{{ secret:s:k }}"), Env(None, "{{ secret:s }}")]

    assert local_environment(envs, {"X": "2"}) == {"A": "1", "B": "2", "C": "{{ secret:s:k }}"}


def test_all_missing_variables_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"'X'.*; .*'Y'"):
        local_environment([Env("A", "{{ env:X }}"), Env("B", "{{ env:Y }}")], {})


def test_the_value_of_a_label_is_checked_when_it_is_known() -> None:
    labels = [Label("a", "{{ env:X }}"), Label("b")]

    assert evaluate_labels(labels, {"X": "y"}) == {"a": "y", "b": ""}
    with pytest.raises(InvalidInput, match="label 'a'"):
        evaluate_labels(labels, {"X": "y z"})


def test_an_expression_has_one_form() -> None:
    assert parse_source("{{configMap:a-b.c}}".replace(".c", "")) == ConfigMapReference("a-b", None)
    for text in ("{{ }}", "{{ env: X }}", "{{ secret: }}", "{{ secret:a: }}", "{{ secret:a:b:c }}"):
        with pytest.raises(ValueError, match="no expression"):
            parse_source(text)


def test_quantities_are_numbers_with_suffixes() -> None:
    assert parse_quantity("500m") * 2 == 1
    assert parse_quantity("1.5Gi") == 1.5 * 2**30
    assert parse_quantity("2e3") == parse_quantity("2k") == 2000
    for text in ("", "1 Gi", "1GiB", "0x1", "e3", "1,5", "Gi"):
        with pytest.raises(ValueError, match="no quantity"):
            parse_quantity(text)


def test_names_of_images_registries_and_keys() -> None:
    digest = "@sha256:" + "0" * 64
    for image in ("ada/mean", "localhost:5000/mean:latest", f"ghcr.io/ada/mean:1{digest}", "a.b_c-d/e"):
        assert image_problem(image) is None
    for image in ("", "Ada/mean", "https://ghcr.io/a", "a b", "a@sha256:1", "a:"):
        assert image_problem(image) is not None
    assert registry_problem("localhost:5000") is None
    assert registry_problem("docker.io/ada/") is None
    assert registry_problem("https://docker.io/ada") is not None
    assert qualified_name_problem("serving.knative.dev/a.b_C") is None
    assert qualified_name_problem("a" * 64) is not None
    assert qualified_name_problem("A.b/c") is not None
