"""The objects made of func.yaml: valid by Knative's own schemas, by its webhook's rules, and always the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lifl.errors import InvalidInput
from lifl.func_yaml.document import Document
from lifl_knative.features import flag_command, flag_for_refusal
from lifl_knative.references import Reference, references_of
from lifl_knative.rollout import manifests
from lifl_knative.rules import broken_rules
from lifl_knative.service import Deployment, Route, make_service
from lifl_knative.triggers import make_triggers, trigger_selector

from tests import knative_schema

HEAD = """\
specVersion: 0.36.0
name: fedavg
runtime: python
created: 2026-11-22T12:00:00Z
invoke: cloudevent
"""
FULL = f"""{HEAD}domain: example.com
run:
  envs:
    - name: ROUNDS
      value: "20"
    - name: HERE
      value: '{{{{ env:FROM_HERE }}}}'
    - name: PASSWORD
      value: '{{{{ secret:database:password }}}}'
    - name: LEVEL
      value: '{{{{ configMap:settings:level }}}}'
    - value: '{{{{ secret:all-of-it }}}}'
    - value: '{{{{ configMap:more }}}}'
  volumes:
    - secret: database
      path: /secrets/database
    - configMap: settings
      path: /etc/settings
    - persistentVolumeClaim:
        claimName: models
      path: /models
    - persistentVolumeClaim:
        claimName: models
        readOnly: true
      path: /old-models
    - emptyDir:
        medium: Memory
        sizeLimit: 256Mi
      path: /scratch
deploy:
  annotations:
    lifl.dev/function: functions/fedavg.py
    example.com/team: learning
    autoscaling.knative.dev/target-burst-capacity: "0"
  labels:
    - key: team
      value: '{{{{ env:TEAM }}}}'
  options:
    scale:
      min: 1
      max: 4
      metric: concurrency
      target: 1.5
      utilization: 70
    resources:
      requests:
        cpu: 500m
        memory: 256Mi
      limits:
        cpu: 1
        memory: 1Gi
        concurrency: 10
  healthEndpoints:
    liveness: /alive
    readiness: /ready
  serviceAccountName: aggregator
  imagePullSecret: registry
  subscriptions:
    - source: default
      filters:
        type: com.example.update
        site: a
    - source: other
"""
ENVIRONMENT = {"FROM_HERE": "yes", "TEAM": "fl"}
IMAGE = "registry.example.com/fedavg@sha256:" + "0" * 64
ALL_FLAGS = {
    "kubernetes.podspec-volumes-hostpath": "enabled",
    "kubernetes.podspec-persistent-volume-claim": "enabled",
    "kubernetes.podspec-persistent-volume-write": "enabled",
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Deployment]:
    def make_deployment(text: str = FULL, route: Route = "lifl", **rest: Any) -> Deployment:
        (tmp_path / "func.yaml").write_text(text)
        config = Document.load(tmp_path).config
        return Deployment(config, IMAGE, "learning", route, "fedavg", environment=ENVIRONMENT, **rest)

    return make_deployment


@pytest.mark.parametrize("route", ["lifl", "broker"])
@pytest.mark.parametrize("text", [HEAD, FULL])
def test_every_object_is_valid_by_knatives_schemas_and_rules(
    make: Callable[..., Deployment], text: str, route: Route
) -> None:
    knative_schema.need_fixtures()
    deployment = make(text, route, is_plan_scaled=route == "lifl")
    owner = {"metadata": {"uid": "1234"}}
    for obj in [*manifests(deployment), *make_triggers(deployment, owner)]:
        assert knative_schema.problems(obj) == [], obj["kind"]
    assert broken_rules(make_service(deployment), ALL_FLAGS) == []


def test_the_schema_check_finds_unknown_and_wrong_fields(make: Callable[..., Deployment]) -> None:
    knative_schema.need_fixtures()
    service = make_service(make())
    service["spec"]["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    service["spec"]["template"]["spec"]["timeoutSeconds"] = "300"
    service["spec"]["tempalte"] = {}
    assert {place for place, _ in knative_schema.problems(service)} == {
        "spec.template.spec.containers[0].imagePullpolicy",
        "spec.template.spec.timeoutSeconds",
        "spec.tempalte",
    }


def test_service_has_all_that_func_yaml_says(make: Callable[..., Deployment]) -> None:
    service = make_service(make())
    template = service["spec"]["template"]
    spec, (container,) = template["spec"], template["spec"]["containers"]
    assert service["metadata"]["labels"]["team"] == "fl"
    assert service["metadata"]["labels"]["func.domain"] == "example.com"
    assert container["image"] == IMAGE
    assert container["env"][:4] == [
        {"name": "ROUNDS", "value": "20"},
        {"name": "HERE", "value": "yes"},
        {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "database", "key": "password"}}},
        {"name": "LEVEL", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "level"}}},
    ]
    assert container["envFrom"] == [{"secretRef": {"name": "all-of-it"}}, {"configMapRef": {"name": "more"}}]
    assert container["resources"] == {
        "requests": {"cpu": "500m", "memory": "256Mi"},
        "limits": {"cpu": "1", "memory": "1Gi"},
    }
    assert container["livenessProbe"]["httpGet"] == {"path": "/alive", "port": 8080}
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": 8080}
    assert spec["containerConcurrency"] == 10
    assert spec["serviceAccountName"] == "aggregator"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]


def test_function_has_no_privileges(make: Callable[..., Deployment]) -> None:
    spec = make_service(make(HEAD))["spec"]["template"]["spec"]
    assert spec["containers"][0]["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert spec["automountServiceAccountToken"] is False


def test_settings_of_autoscaling_are_on_the_template_alone(make: Callable[..., Deployment]) -> None:
    service = make_service(make(is_plan_scaled=True))
    own, revision = service["metadata"]["annotations"], service["spec"]["template"]["metadata"]["annotations"]
    prefix = "autoscaling.knative.dev/"
    assert not [name for name in own if name.startswith(prefix)]
    assert {name.removeprefix(prefix): v for name, v in revision.items() if name.startswith(prefix)} == {
        "class": "plan.autoscaling.lifl.dev",
        "min-scale": "1",
        "max-scale": "4",
        "metric": "concurrency",
        "target": "1.5",
        "target-utilization-percentage": "70",
        "target-burst-capacity": "0",
    }
    assert revision["lifl.dev/function-name"] == "fedavg"
    assert own["example.com/team"] == revision["example.com/team"] == "learning"


def test_routes_differ_in_the_agents_directory_and_the_broker(make: Callable[..., Deployment]) -> None:
    direct, brokered = manifests(make(HEAD)), manifests(make(HEAD, "broker"))
    spec = direct[0]["spec"]["template"]["spec"]
    assert spec["volumes"] == [{"name": "lifl-agent", "hostPath": {"path": "/run/lifl", "type": "Directory"}}]
    assert spec["containers"][0]["volumeMounts"] == [
        {"name": "lifl-agent", "mountPath": "/run/lifl", "readOnly": True}
    ]
    assert {"name": "LIFL_AGENT_DIRECTORY", "value": "/run/lifl"} in spec["containers"][0]["env"]
    assert [obj["kind"] for obj in direct] == ["Service"]
    assert [obj["kind"] for obj in brokered] == ["Service", "Broker", "Trigger"]
    assert "volumes" not in brokered[0]["spec"]["template"]["spec"]
    assert brokered[1]["metadata"]["annotations"]["eventing.knative.dev/broker.class"] == "NatsJetStreamBroker"
    assert brokered[2]["spec"]["filter"] == {"attributes": {"type": "dev.lifl.update.v1"}}


def test_same_file_makes_the_same_objects(make: Callable[..., Deployment]) -> None:
    assert manifests(make()) == manifests(make())


def test_other_content_under_the_same_tag_makes_a_new_revision(make: Callable[..., Deployment]) -> None:
    def template(content: str) -> Any:
        return make_service(make(image_content=content))["spec"]["template"]

    assert template("sha256:1") == template("sha256:1") != template("sha256:2")


def test_names_of_volumes_stay_when_others_come_and_go(make: Callable[..., Deployment]) -> None:
    def names(text: str) -> dict[str, str]:
        container = make_service(make(text))["spec"]["template"]["spec"]["containers"][0]
        return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}

    before = names(FULL)
    assert before["/secrets/database"] == "secret-database"
    assert before["/models"] != before["/old-models"], "one may be written and one may not"
    less = names(FULL.replace("    - secret: database\n      path: /secrets/database\n", ""))
    assert less == {path: name for path, name in before.items() if path != "/secrets/database"}
    dotted = names(
        f"{HEAD}run:\n  volumes:\n    - secret: a.b\n      path: /x\n    - secret: a-b\n      path: /y\n"
    )
    assert dotted["/x"] != dotted["/y"] == "secret-a-b"
    long = names(f"{HEAD}run:\n  volumes:\n    - secret: {'s' * 200}\n      path: /x\n")
    assert len(long["/x"]) <= 63


def test_names_of_triggers_come_from_broker_and_filters(make: Callable[..., Deployment]) -> None:
    first, second = make_triggers(make())
    assert first["spec"]["broker"] == "default" and second["spec"]["broker"] == "other"
    assert "filter" not in second["spec"]
    (moved,) = make_triggers(
        make(FULL.replace("    - source: default\n", "    - source: new\n").split("    - source: other")[0])
    )
    assert moved["metadata"]["name"] not in (first["metadata"]["name"], second["metadata"]["name"])
    assert trigger_selector("fedavg") == "function.knative.dev/name=fedavg,app.kubernetes.io/managed-by=lifl-func"
    assert first["metadata"]["labels"]["function.knative.dev/name"] == "fedavg"
    (owned, _) = make_triggers(make(), {"metadata": {"uid": "1234"}})
    assert owned["metadata"]["ownerReferences"][0]["uid"] == "1234"


def test_missing_local_variable_is_named(make: Callable[..., Deployment]) -> None:
    deployment = make(f"{HEAD}run:\n  envs:\n    - name: A\n      value: '{{{{ env:NOT_THERE }}}}'\n")
    with pytest.raises(InvalidInput, match="'NOT_THERE'"):
        make_service(deployment)


def test_everything_that_is_referred_to_is_found(make: Callable[..., Deployment]) -> None:
    found = [(r.kind, r.name, r.key) for r in references_of(make())]
    assert found == [
        ("Secret", "database", "password"),
        ("ConfigMap", "settings", "level"),
        ("Secret", "all-of-it", None),
        ("ConfigMap", "more", None),
        ("Secret", "database", None),
        ("ConfigMap", "settings", None),
        ("PersistentVolumeClaim", "models", None),
        ("PersistentVolumeClaim", "models", None),
        ("ServiceAccount", "aggregator", None),
        ("Secret", "registry", None),
        ("Broker", "default", None),
        ("Broker", "other", None),
    ]
    assert Reference("Secret", "database", "run.envs #2", "password") in references_of(make())


# --- the webhook's rules -------------------------------------------------------------------------------------


def _spec(service: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = service["spec"]["template"]["spec"]
    return spec


def _container(service: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = _spec(service)["containers"][0]
    return container


RULES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "scale on the Service",
        lambda s: s["metadata"]["annotations"].update({"autoscaling.knative.dev/min-scale": "1"}),
        "has to stand in the revision's template",
    ),
    (
        "bounds that cross",
        lambda s: s["spec"]["template"]["metadata"]["annotations"].update(
            {"autoscaling.knative.dev/min-scale": "9"}
        ),
        "min-scale 9 is more than max-scale 4",
    ),
    (
        "a scale that is no number",
        lambda s: s["spec"]["template"]["metadata"]["annotations"].update(
            {"autoscaling.knative.dev/max-scale": "x"}
        ),
        "has to be a number",
    ),
    (
        "a mount that may be written",
        lambda s: _container(s)["volumeMounts"][0].pop("readOnly"),
        "has to be readOnly",
    ),
    (
        "a reserved path",
        lambda s: _container(s)["volumeMounts"][0].update(mountPath="/dev/log"),
        "nothing can be mounted at '/dev/log'",
    ),
    (
        "the same path twice",
        lambda s: _container(s)["volumeMounts"][0].update(mountPath="/models"),
        "two volumes are mounted at '/models'",
    ),
    (
        "an unknown volume",
        lambda s: _container(s)["volumeMounts"][0].update(name="x"),
        "'x', which does not exist",
    ),
    ("a volume not mounted", lambda s: _container(s)["volumeMounts"].pop(), "volume 'lifl-agent' is not mounted"),
    ("a reserved port", lambda s: _container(s).update(ports=[{"containerPort": 8012}]), "port 8012 is taken"),
    (
        "two ports",
        lambda s: _container(s).update(ports=[{"containerPort": 1}, {"containerPort": 2}]),
        "one port at most",
    ),
    (
        "Knative's own variable",
        lambda s: _container(s)["env"].append({"name": "PORT"}),
        "'PORT' is set by Knative",
    ),
    ("Knative's own container", lambda s: _container(s).update(name="queue-proxy"), "'queue-proxy'"),
    (
        "privileges",
        lambda s: _container(s)["securityContext"].update(privileged=True),
        "a privileged container is never allowed",
    ),
    ("a life cycle hook", lambda s: _container(s).update(lifecycle={}), "'lifecycle' is never allowed"),
    ("a node's name", lambda s: _spec(s).update(nodeName="a"), "'nodeName' is never allowed"),
    ("a long request", lambda s: _spec(s).update(timeoutSeconds=601), "timeoutSeconds 601 is more than 600"),
    ("many requests", lambda s: _spec(s).update(containerConcurrency=1001), "not from 0 to 1000"),
]


@pytest.mark.parametrize(("change", "said"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_rule_of_the_webhook_is_found(
    make: Callable[..., Deployment], change: Callable[[dict[str, Any]], object], said: str
) -> None:
    service = copy.deepcopy(make_service(make()))
    change(service)
    assert said in "\n".join(broken.text for broken in broken_rules(service, ALL_FLAGS))


FLAGGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda s: None, "kubernetes.podspec-volumes-hostpath"),
    (lambda s: None, "kubernetes.podspec-persistent-volume-claim"),
    (lambda s: None, "kubernetes.podspec-persistent-volume-write"),
    (lambda s: _spec(s).update(nodeSelector={"gpu": "yes"}), "kubernetes.podspec-nodeselector"),
    (lambda s: _spec(s).update(hostIPC=True), "kubernetes.podspec-hostipc"),
    (lambda s: _spec(s).update(initContainers=[{"name": "a"}]), "kubernetes.podspec-init-containers"),
    (
        lambda s: _container(s)["securityContext"]["capabilities"].update(add=["BPF"]),
        "kubernetes.containerspec-addcapabilities",
    ),
    (
        lambda s: _container(s)["env"].append({"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}),
        "kubernetes.podspec-fieldref",
    ),
]


@pytest.mark.parametrize(("change", "flag"), FLAGGED, ids=[flag for _, flag in FLAGGED])
def test_feature_that_is_needed_is_named_unless_it_is_set_or_unknown(
    make: Callable[..., Deployment], change: Callable[[dict[str, Any]], object], flag: str
) -> None:
    service = make_service(make())
    change(service)
    assert flag in {broken.flag for broken in broken_rules(service, {})}
    assert flag not in {broken.flag for broken in broken_rules(service, {flag: "Enabled"})}
    assert flag not in {broken.flag for broken in broken_rules(service, None)}


def test_directory_in_memory_needs_no_feature(make: Callable[..., Deployment]) -> None:
    text = f"{HEAD}run:\n  volumes:\n    - emptyDir:\n        medium: Memory\n      path: /dev/shm\n"
    service = make_service(make(text, "broker"))
    assert broken_rules(service, {}) == []
    assert broken_rules(service, {"kubernetes.podspec-volumes-emptydir": "disabled"})


def test_flags_are_those_that_knative_publishes() -> None:
    from lifl_knative import features
    from lifl_knative.rules import _VOLUME_FLAGS

    text = (knative_schema.need_fixtures() / "config-features.yaml").read_text()
    flags = {*features.POD_FIELDS.values(), *_VOLUME_FLAGS.values(), features.CLAIM_WRITE}
    flags |= {"kubernetes.containerspec-addcapabilities", "kubernetes.podspec-fieldref"}
    assert {flag for flag in flags if f"    {flag}: " not in text} == set()
    for flag in flags:
        is_on = f'    {flag}: "enabled"' in text
        assert is_on == (flag in features.ENABLED_BY_DEFAULT), flag


@pytest.mark.parametrize(
    ("message", "flag"),
    [
        (
            "HostPath volume support is disabled, but found HostPath volume x",
            "kubernetes.podspec-volumes-hostpath",
        ),
        ("must not set the field(s): spec.template.spec.nodeSelector", "kubernetes.podspec-nodeselector"),
        (
            "Persistent volume write support is disabled, but found persistent volume claim m that is not",
            "kubernetes.podspec-persistent-volume-write",
        ),
        ("missing field(s): spec.template.spec.containers", None),
    ],
)
def test_flag_is_found_for_what_the_webhook_says(message: str, flag: str | None) -> None:
    assert flag_for_refusal(message) == flag


def test_command_that_sets_a_flag_can_be_pasted() -> None:
    assert flag_command("a.b", "kubectl --context c") == (
        "kubectl --context c patch configmap config-features -n knative-serving --type merge "
        """-p '{"data":{"a.b":"enabled"}}'"""
    )
