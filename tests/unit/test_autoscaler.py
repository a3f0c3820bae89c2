"""The autoscaler's decisions: from a PodAutoscaler, what is around it and the plan to what is written."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.cli.common import CommandError
from lifl_knative.autoscaler.conditions import PLAN_KNOWN, find, truth_of
from lifl_knative.autoscaler.decision import GRACE_SECONDS, Decision, Observed, decide
from lifl_knative.autoscaler.objects import (
    AUTOSCALER,
    CLASS,
    DELETION_COST,
    deletion_costs,
    function_of,
    is_ours,
    make_serverless_service,
    parse_duration,
    target_key,
)
from lifl_knative.autoscaler.plan import Need, Plan, parse_answer, read_token
from lifl_knative.autoscaler.roles import Role, roles_of

from tests import knative_schema

Object = dict[str, Any]
NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


def at(seconds: float) -> str:
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def autoscaler(name: str = "fedavg-00001", made: float = -1000.0, **options: Any) -> Object:
    """A PodAutoscaler as Knative makes it for a revision; `options` are annotations and `reachability`."""
    reachability = options.pop("reachability", "Reachable")
    service = options.pop("service", "fedavg")
    annotations = {f"autoscaling.knative.dev/{key.replace('_', '-')}": value for key, value in options.items()}
    return {
        "apiVersion": AUTOSCALER[0],
        "kind": AUTOSCALER[1],
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"uid-{name}",
            "generation": 3,
            "creationTimestamp": at(made),
            "labels": {"serving.knative.dev/service": service, "serving.knative.dev/revision": name},
            "annotations": {"autoscaling.knative.dev/class": CLASS, **annotations},
        },
        "spec": {
            "protocolType": "http1",
            "reachability": reachability,
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{name}-deployment"},
        },
    }


def deployment(replicas: int, ready: int) -> Object:
    return {
        "metadata": {"name": "fedavg-00001-deployment", "namespace": "default"},
        "spec": {"replicas": replicas},
        "status": {"readyReplicas": ready} if ready else {},
    }


def service_of(pa: Object, mode: str = "Serve", proxied: bool = False, ready: bool = True) -> Object:
    """The ServerlessService with the status that Knative gives it."""
    made = make_serverless_service(pa, mode)
    made["metadata"]["generation"] = 5
    conditions = [
        {"type": "ActivatorEndpointsPopulated", "status": str(proxied)},
        {"type": "Ready", "status": "True"}
        if ready
        else {"type": "Ready", "status": "Unknown", "message": "NoHealthyBackends"},
    ]
    name = pa["metadata"]["name"]
    made["status"] = {
        "observedGeneration": 5,
        "conditions": conditions,
        "serviceName": name,
        "privateServiceName": f"{name}-private",
    }
    return made


def with_status(
    pa: Object, active: str, since: float = -100.0, initialized: str = "True", reason: str = ""
) -> Object:
    pa = copy.deepcopy(pa)
    pa["status"] = {
        "conditions": [
            {"type": "Active", "status": active, "lastTransitionTime": at(since), "reason": reason},
            {"type": "ScaleTargetInitialized", "status": initialized, "lastTransitionTime": at(since)},
        ]
    }
    return pa


def scaled(
    pa: Object, need: Need | None, replicas: int, ready: int, service: Object | None = None, role: Role = "current"
) -> Decision:
    service = service or service_of(pa, "Serve" if ready else "Proxy", not ready, ready > 0)
    return decide(Observed(pa, service, deployment(replicas, ready), need, "" if need else "no answer", role), NOW)


def conditions(decision: Decision) -> dict[str, str]:
    assert decision.status is not None
    return {condition["type"]: condition["status"] for condition in decision.status["conditions"]}


READY = with_status(autoscaler(), "True")


def test_the_plan_sets_the_scale() -> None:
    for wanted in (1, 2, 7):
        decision = scaled(READY, Need(wanted), 3, 3)
        assert (decision.desired, decision.replicas) == (wanted, wanted)
        assert decision.serverless_service is None
    assert scaled(READY, Need(3), 3, 3).replicas is None


def test_a_revision_gets_its_initial_scale_first_whatever_the_plan_says() -> None:
    new = autoscaler()
    first = decide(Observed(new, None, deployment(1, 0), Need(0)), NOW)
    assert (first.desired, first.replicas) == (1, None)
    assert first.serverless_service is not None
    assert first.serverless_service["spec"]["mode"] == "Proxy"
    assert conditions(first) == {
        "Active": "Unknown",
        "PlanKnown": "True",
        "Ready": "Unknown",
        "SKSReady": "Unknown",
        "ScaleTargetInitialized": "Unknown",
    }
    up = scaled(with_status(new, "Unknown", -5, "Unknown"), Need(0), 1, 1)
    assert conditions(up) == dict.fromkeys(conditions(first), "True")
    assert scaled(autoscaler(initial_scale="3"), Need(2), 1, 0).replicas == 3
    assert scaled(autoscaler(initial_scale="0"), Need(0), 1, 0).desired == 0
    assert scaled(autoscaler(), Need(4), 1, 0).replicas == 4


def test_bounds_are_kept_in_both_spellings_but_no_minimum_where_no_route_leads() -> None:
    assert scaled(with_status(autoscaler(min_scale="2"), "True"), Need(0), 3, 3).replicas == 2
    assert scaled(with_status(autoscaler(maxScale="2"), "True"), Need(5), 1, 1).replicas == 2
    assert scaled(with_status(autoscaler(max_scale="0"), "True"), Need(5), 1, 1).replicas == 5
    lost = with_status(autoscaler(min_scale="2", reachability="Unreachable"), "True")
    assert scaled(lost, Need(1), 2, 2).replicas == 1


def test_the_last_pod_ends_when_the_activator_is_in_the_way_or_has_had_its_time() -> None:
    begun = scaled(READY, Need(0), 1, 1)
    assert (begun.desired, begun.replicas, begun.recheck_seconds) == (0, None, GRACE_SECONDS)
    assert begun.serverless_service is not None and begun.serverless_service["spec"]["mode"] == "Proxy"
    assert conditions(begun)["Active"] == conditions(begun)["Ready"] == "False"
    waiting = with_status(autoscaler(), "False", since=-10.0)
    not_yet = scaled(waiting, Need(0), 1, 1, service_of(waiting, "Proxy", proxied=False))
    assert (not_yet.replicas, not_yet.recheck_seconds) == (None, GRACE_SECONDS - 10.0)
    stale = service_of(waiting, "Proxy", proxied=True)
    stale["status"]["observedGeneration"] = 4
    assert scaled(waiting, Need(0), 1, 1, stale).replicas is None
    assert scaled(waiting, Need(0), 1, 1, service_of(waiting, "Proxy", proxied=True)).replicas == 0
    late = with_status(autoscaler(), "False", since=-GRACE_SECONDS)
    assert scaled(late, Need(0), 1, 1, service_of(late, "Proxy", proxied=False)).replicas == 0


def test_while_the_plan_is_not_known_the_scale_stays_and_the_condition_says_so() -> None:
    for replicas in (0, 1, 4):
        decision = scaled(READY, None, replicas, replicas)
        assert (decision.desired, decision.replicas) == (replicas, None)
        assert decision.status is not None
        found = find(decision.status, PLAN_KNOWN)
        assert (found["status"], found["reason"]) == ("False", "CoordinatorUnreachable")
        assert "no answer" in found["message"]
        assert conditions(decision)["Ready"] == ("True" if replicas else "False")
    # A revision that is deployed meanwhile is brought up all the same.
    assert scaled(autoscaler(), None, 0, 0).replicas == 1


def test_pods_that_nobody_needs_and_that_never_come_are_given_up() -> None:
    waiting = with_status(autoscaler(), "Unknown", since=-605.0, initialized="Unknown")
    early = scaled(waiting, Need(0), 1, 0)
    assert (early.desired, early.recheck_seconds) == (1, pytest.approx(5.0))
    late = with_status(autoscaler(), "Unknown", since=-611.0, initialized="Unknown")
    given_up = scaled(late, Need(0), 1, 0)
    assert (given_up.desired, given_up.replicas) == (0, 0)
    assert given_up.status is not None
    assert find(given_up.status, "Active")["reason"] == "TimedOut"
    assert conditions(given_up)["ScaleTargetInitialized"] == "Unknown"  # Knative: initial scale never achieved
    after = with_status(autoscaler(), "False", initialized="Unknown", reason="TimedOut")
    assert scaled(after, Need(0), 0, 0).desired == 0
    assert scaled(after, Need(2), 0, 0).replicas == 2
    assert scaled(late, Need(1), 1, 0).desired == 1
    short = with_status(autoscaler(), "Unknown", since=-45.0, initialized="Unknown")
    short["metadata"]["annotations"]["serving.knative.dev/progress-deadline"] = "30s"
    assert scaled(short, Need(0), 1, 0).replicas == 0


def test_a_service_object_of_somebody_else_is_left_alone() -> None:
    other = service_of(READY)
    other["metadata"]["ownerReferences"][0]["uid"] = "uid-of-another"
    decision = scaled(READY, Need(5), 1, 1, other)
    assert (decision.replicas, decision.serverless_service) == (None, None)
    assert decision.status is not None
    assert find(decision.status, "Ready")["reason"] == "NotOwned"


def test_what_is_as_it_should_be_is_not_written_again() -> None:
    pa = copy.deepcopy(READY)
    first = scaled(pa, Need(2), 2, 2)
    pa["status"] = first.status
    again = scaled(pa, Need(2), 2, 2)
    assert again == Decision(2)
    later = decide(Observed(pa, service_of(pa), deployment(2, 2), Need(2)), NOW + timedelta(hours=1))
    assert later == Decision(2)  # times of conditions that stay do not move


def test_without_its_deployment_nothing_is_decided_but_said() -> None:
    decision = decide(Observed(autoscaler(), None, None, Need(3)), NOW)
    assert (decision.desired, decision.replicas, decision.serverless_service) == (-1, None, None)
    assert conditions(decision)["Active"] == "Unknown"


def test_of_several_revisions_those_with_a_route_have_the_pods_and_of_services_the_oldest() -> None:
    old = autoscaler("fedavg-00001", -900, reachability="Unreachable")
    new = autoscaler("fedavg-00002", -100)
    coming = autoscaler("fedavg-00003", -1, reachability="")
    other = autoscaler("copy-00001", -500, service="copy")
    other["metadata"]["annotations"]["lifl.dev/function-name"] = "fedavg"
    median = autoscaler("median-00001", -1, service="median")
    assert function_of(other) == "fedavg"
    assert roles_of([old, new, coming, other, median]) == {
        ("default", "fedavg-00001"): "superseded",
        ("default", "fedavg-00002"): "current",
        ("default", "fedavg-00003"): "current",
        ("default", "copy-00001"): "rival",
        ("default", "median-00001"): "current",
    }
    broken = autoscaler("fedavg-00002", -100, reachability="Unreachable")
    assert roles_of([old, broken])["default", "fedavg-00002"] == "current"
    assert scaled(with_status(old, "True"), Need(3), 3, 3, role="superseded").desired == 0
    rival = scaled(with_status(other, "True"), Need(3), 1, 1, role="rival")
    assert rival.desired == 0 and rival.status is not None
    assert find(rival.status, "Active")["reason"] == "FunctionTaken"
    assert scaled(other, Need(3), 1, 0, role="rival").desired == 1  # a proof that it can start


def test_when_pods_end_those_of_nodes_with_updates_are_the_last() -> None:
    decision = scaled(READY, Need(1, frozenset({"n2"})), 3, 3)
    assert (decision.replicas, decision.keep) == (1, {"n2"})
    assert scaled(READY, Need(4, frozenset({"n2"})), 3, 3).keep == frozenset()
    pods = [
        {"metadata": {"name": "a"}, "spec": {"nodeName": "n1"}},
        {"metadata": {"name": "b"}, "spec": {"nodeName": "n2"}},
        {"metadata": {"name": "c", "annotations": {DELETION_COST: "100"}}, "spec": {"nodeName": "n3"}},
        {"metadata": {"name": "d"}, "spec": {}},
    ]
    changes = [(pod["metadata"]["name"], cost) for pod, cost in deletion_costs(pods, decision.keep)]
    assert changes == [("b", "100"), ("c", "0")]


def test_only_our_class_is_ours_and_nothing_that_is_being_deleted() -> None:
    assert is_ours(READY)
    assert not is_ours({"metadata": {"name": "x"}})
    deleted = copy.deepcopy(READY)
    deleted["metadata"]["deletionTimestamp"] = at(0)
    assert not is_ours(deleted)
    assert target_key(READY) == ("default", "fedavg-00001-deployment")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("600s", 600), ("1m30s", 90), ("1.5h", 5400), ("100ms", 0.1), ("", 0), ("10", 0), ("s", 0), ("1m x", 0)],
)
def test_durations_are_read_as_go_writes_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


# --- whatever comes ------------------------------------------------------------------------------------------

_numbers = st.integers(0, 9)
_texts = st.sampled_from(["", "True", "False", "Unknown"])
_scales = st.none() | st.sampled_from(["0", "1", "2", "5", "-1", "x", ""])


@st.composite
def observations(draw: st.DrawFn) -> Observed:
    bounds = {name: draw(_scales) for name in ("min_scale", "max_scale", "initial_scale")}
    reachability = draw(st.sampled_from(["", "Reachable", "Unreachable"]))
    pa = autoscaler(reachability=reachability, **{name: text for name, text in bounds.items() if text is not None})
    if draw(st.booleans()):
        reason = draw(st.sampled_from(["", "TimedOut", "NoTraffic"]))
        pa = with_status(pa, draw(_texts), -draw(st.floats(0, 1000)), draw(_texts), reason)
    mode = draw(st.sampled_from(["Serve", "Proxy"]))
    service = draw(st.none() | st.just(service_of(pa, mode, draw(st.booleans()), draw(st.booleans()))))
    replicas = draw(_numbers)
    ready = draw(st.integers(0, replicas))
    need = draw(st.none() | st.builds(Need, _numbers))
    role = draw(st.sampled_from(["current", "superseded", "rival"]))
    return Observed(pa, service, deployment(replicas, ready), need, "no answer", role)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(observations(), st.booleans())
def test_whatever_is_seen_the_decision_is_valid_within_bounds_and_comes_to_rest(
    seen: Observed, acts: bool
) -> None:
    now, present = NOW, seen
    for _ in range(8):
        decision = decide(present, now)
        _check(present, decision)
        if decision == Decision(decision.desired):
            break
        now += timedelta(seconds=decision.recheck_seconds or 0.0)
        present = _world(present, decision, acts)
    else:
        raise AssertionError(f"it is never content: {decision}")


def _check(seen: Observed, decision: Decision) -> None:
    annotations = seen.autoscaler["metadata"]["annotations"]
    most = annotations.get("autoscaling.knative.dev/max-scale", "0")
    if most.isdigit() and int(most) and (seen.need is not None or decision.replicas is not None):
        assert decision.desired <= int(most)
    if seen.need is None and seen.role == "current":
        assert decision.replicas != 0  # a plan that is not known is no reason to stop anything
    if decision.desired == 0:
        mode = decision.serverless_service or seen.serverless_service
        assert mode is not None and mode["spec"]["mode"] == "Proxy"
    if decision.status is not None:
        found = {**seen.autoscaler, "status": decision.status}
        if (found["apiVersion"], found["kind"]) in knative_schema.schemas():
            assert knative_schema.problems(found) == []
        assert truth_of(decision.status, "Ready") in ("True", "False", "Unknown")
        names = [condition["type"] for condition in decision.status["conditions"]]
        assert names == sorted(set(names))


def _world(seen: Observed, decision: Decision, acts: bool) -> Observed:
    """What was decided is written; Knative and the kubelets do their part, or nothing."""
    pa, service = seen.autoscaler, seen.serverless_service
    if decision.status is not None:
        pa = {**pa, "status": decision.status}
    assert seen.deployment is not None
    replicas = seen.deployment["spec"]["replicas"] if decision.replicas is None else decision.replicas
    ready = replicas if acts else min(replicas, seen.deployment.get("status", {}).get("readyReplicas", 0))
    if decision.serverless_service is not None:
        mode = decision.serverless_service["spec"]["mode"]
        service = service_of(pa, mode, acts and mode == "Proxy", acts and ready > 0)
    return Observed(pa, service, deployment(replicas, ready), seen.need, seen.problem, seen.role)


# --- the coordinator's answers -------------------------------------------------------------------------------


def test_an_answer_of_the_coordinator_becomes_needs() -> None:
    entry = {
        "function": "fedavg",
        "wanted": 2,
        "needed_on": ["n1", "n2"],
        "nodes": ["n1"],
        "busy": [],
        "jobs": ["digits"],
        "failures": {},
    }
    data = json.dumps(
        {"version": 7, "functions": [entry, entry | {"function": "median", "busy": ["n2"]}]}
    ).encode()
    version, needs = parse_answer(data)
    assert version == 7
    assert needs["fedavg"] == Need(2, frozenset({"n1", "n2"}), ("digits",))
    assert needs["median"].keep == {"n2"}
    plan = Plan(needs, "")
    assert plan.need_of("fedavg") == needs["fedavg"]
    assert plan.need_of("unheard-of") == Need(0)
    assert Plan(needs, "no answer").need_of("fedavg") is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"version": 1, "functions": [{"function": "f"}]}', b"\xff"])
def test_an_answer_that_makes_no_sense_is_no_plan(data: bytes) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        parse_answer(data)
    negative = {"function": "f", "wanted": -1, "needed_on": [], "busy": [], "jobs": []}
    with pytest.raises(ValueError, match="makes no sense"):
        parse_answer(json.dumps({"version": 1, "functions": [negative]}).encode())


def test_the_operators_token_is_read_from_a_token_file_or_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    assert read_token(None) == ""
    for text in ("# who\n\nclient-1 one\n* secret\n", "secret\n"):
        file.write_text(text)
        assert read_token(file) == "secret"
    for text in ("client-1 one\n", "", "a b c\n"):
        file.write_text(text)
        with pytest.raises(CommandError, match="no operator's token"):
            read_token(file)
    with pytest.raises(CommandError, match="cannot be read"):
        read_token(tmp_path / "none")
