"""Watches the objects and the plan, and writes what `decision` says.

A thread watches each kind of object, another asks the coordinator; all only note what they hear and ring for the
loop, which then looks at every PodAutoscaler anew. What is decided depends on the state of things alone and not on
what has changed, so nothing is lost by hearing of it late, or twice. While nothing happens all of them sleep.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from lifl.cli.common import CommandError

from lifl_knative.api_errors import NotFound
from lifl_knative.autoscaler.decision import Decision, Observed, decide
from lifl_knative.autoscaler.monitor import Metrics
from lifl_knative.autoscaler.objects import (
    AUTOSCALER,
    CLASS,
    DELETION_COST,
    DEPLOYMENT,
    REVISION_LABEL,
    SERVERLESS_SERVICE,
    Key,
    Object,
    deletion_costs,
    function_of,
    is_ours,
    key_of,
    labels_of,
    ready_of,
    replicas_of,
    target_key,
)
from lifl_knative.autoscaler.plan import Plan
from lifl_knative.autoscaler.roles import roles_of

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster

_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 60.0

log = logging.getLogger("lifl.autoscaler")


class Bell:
    """A lock for what the threads share, and a bell by which they tell the loop that something has changed."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self._has_rung = True

    def ring(self) -> None:
        """Have the loop look, now or when it is done with what it does; called with the lock."""
        self._has_rung = True
        self.lock.notify_all()

    def wait(self, seconds: float | None) -> None:
        """Sleep until it rings, or has rung since the last time; called with the lock."""
        if not self._has_rung:
            self.lock.wait(seconds)
        self._has_rung = False


class Watched:
    """The objects of one kind in all namespaces, kept up to date by a thread."""

    def __init__(self, kind: tuple[str, str], connect: Callable[[], Cluster], selector: str = "") -> None:
        """`connect` makes a connection of the thread's own."""
        self._api_version, self.kind = kind
        self._connect = connect
        self._selector = selector
        self.objects: dict[Key, Object] = {}
        """By namespace and name; whoever looks holds the bell's lock."""
        self.problem = "it has not been listed yet"
        """Why what is known may be old; empty while it is not."""

    def follow(self, bell: Bell) -> None:
        """Watch for ever; rings whenever something has changed."""
        cluster = self._connect()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                listed = cluster.list(self._api_version, self.kind, "*", self._selector)
                with bell.lock:
                    self.objects = {key_of(obj): obj for obj in listed}
                    self.problem, pause = "", _FIRST_PAUSE_SECONDS
                    bell.ring()
                for event in cluster.watch(self._api_version, self.kind, "*", selector=self._selector):
                    self._take(event, bell)
            except CommandError as error:
                with bell.lock:
                    if self.problem != str(error):
                        log.warning("%ss cannot be watched: %s", self.kind, error)
                    self.problem = str(error)
                    bell.ring()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _take(self, event: Object, bell: Bell) -> None:
        obj = event["object"]
        key = key_of(obj)
        with bell.lock:
            if event["type"] == "DELETED":
                known = self.objects.pop(key, None)
            else:
                known = self.objects.get(key)
                self.objects[key] = obj
            if event["type"] == "DELETED" or known is None or _version(known) != _version(obj):
                bell.ring()


def _version(obj: Object) -> str:
    return str(obj["metadata"].get("resourceVersion", ""))


@dataclass
class _Trouble:
    """What the API server did not take, and when to try again."""

    until: float
    """Monotonic seconds."""
    pause: float = _FIRST_PAUSE_SECONDS
    message: str = ""


@dataclass
class Controller:
    """The loop. `metrics` and `what_lacks` may be used from any thread."""

    connect: Callable[[], Cluster]
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self._bell = Bell()
        self._is_stopping = False
        self._plan: Plan | None = None
        """None before the coordinator has answered, or could not be asked, for the first time."""
        self._autoscalers = Watched(AUTOSCALER, self.connect)
        self._services = Watched(SERVERLESS_SERVICE, self.connect)
        self._deployments = Watched(DEPLOYMENT, self.connect, selector=REVISION_LABEL)
        self._watched = (self._autoscalers, self._services, self._deployments)
        self._troubles: dict[Key, _Trouble] = {}
        self._unserved: set[str] = set()

    # --- from other threads ----------------------------------------------------------------------------------

    def take_plan(self, plan: Plan) -> None:
        """Note what the coordinator says."""
        with self._bell.lock:
            self._plan = plan
            self._bell.ring()

    def stop(self) -> None:
        """Let `run` return; not from a signal handler, which may interrupt the loop with the lock held."""
        with self._bell.lock:
            self._is_stopping = True
            self._bell.ring()

    def what_lacks(self) -> str:
        """Why the autoscaler does not work; empty when it does. That the plan is not known is not among it."""
        with self._bell.lock:
            lacks = [f"{watched.kind}s: {watched.problem}" for watched in self._watched if watched.problem]
        return "; ".join(lacks)

    # --- the loop --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Scale until `stop`."""
        for watched in self._watched:
            threading.Thread(target=watched.follow, args=(self._bell,), name=watched.kind, daemon=True).start()
        cluster = self.connect()
        recheck: float | None = None
        while True:
            with self._bell.lock:
                self._bell.wait(recheck)
                if self._is_stopping:
                    return
                seen = list(self._observe()) if self._is_ready() else []
            recheck = self._pass(cluster, seen)

    def _is_ready(self) -> bool:
        """Whether there is enough known to decide: half a picture would look like deleted objects."""
        return self._plan is not None and all(w.objects or not w.problem for w in self._watched)

    def _observe(self) -> Iterator[Observed]:
        """Every PodAutoscaler of ours with what is around it; called with the lock."""
        assert self._plan is not None
        ours = {key: obj for key, obj in self._autoscalers.objects.items() if is_ours(obj)}
        roles = roles_of(ours.values())
        for key, autoscaler in ours.items():
            yield Observed(
                autoscaler,
                self._services.objects.get(key),
                self._deployments.objects.get(target_key(autoscaler)),
                self._plan.need_of(function_of(autoscaler)),
                self._plan.problem,
                roles[key],
            )

    def _pass(self, cluster: Cluster, seen: list[Observed]) -> float | None:
        """Bring every PodAutoscaler to where it shall be; seconds until somebody has to look again."""
        now, moment = time.monotonic(), datetime.now(UTC)
        decided = {key_of(observed.autoscaler): (observed, decide(observed, moment)) for observed in seen}
        self._troubles = {key: trouble for key, trouble in self._troubles.items() if key in decided}
        self._show(list(decided.values()))
        times: list[float] = []
        for key, (observed, decision) in decided.items():
            trouble = self._troubles.get(key)
            if trouble is not None and now < trouble.until:
                times.append(trouble.until - now)
                continue
            try:
                self._write(cluster, observed, decision)
                self._troubles.pop(key, None)
            except NotFound as error:
                self._forget(cluster, key, observed)
                times.append(self._note_trouble(key, str(error)))
            except CommandError as error:
                times.append(self._note_trouble(key, str(error)))
            if decision.recheck_seconds is not None:
                times.append(decision.recheck_seconds)
        return min(times, default=None)

    def _forget(self, cluster: Cluster, key: Key, seen: Observed) -> None:
        """What was to be written is gone. If it is the PodAutoscaler, it went while the watch of it began."""
        try:
            is_gone = cluster.get(*AUTOSCALER, key[1], key[0]) is None
        except CommandError:
            return
        with self._bell.lock:
            if is_gone and self._autoscalers.objects.get(key) is seen.autoscaler:
                del self._autoscalers.objects[key]

    def _note_trouble(self, key: Key, message: str) -> float:
        self.metrics.errors.inc()
        before = self._troubles.get(key)
        pause = min(2 * before.pause, _LONGEST_PAUSE_SECONDS) if before is not None else _FIRST_PAUSE_SECONDS
        if before is None or before.message != message:
            log.warning("PodAutoscaler %s/%s: %s", *key, message)
        self._troubles[key] = _Trouble(time.monotonic() + pause, pause, message)
        return pause

    # --- writing ---------------------------------------------------------------------------------------------

    def _write(self, cluster: Cluster, seen: Observed, decision: Decision) -> None:
        """Write what was decided, and what came of it into what is known; raises CommandError."""
        if decision.serverless_service is not None:
            applied = cluster.apply(decision.serverless_service, force=True)
            self._know(self._services, seen.serverless_service, applied)
        if decision.replicas is not None:
            self._scale(cluster, seen, decision)
        if decision.status is not None:
            status = {**seen.autoscaler, "status": decision.status}
            self._know(self._autoscalers, seen.autoscaler, cluster.patch_status(status))

    def _scale(self, cluster: Cluster, seen: Observed, decision: Decision) -> None:
        assert decision.replicas is not None and seen.deployment is not None
        namespace, name = key_of(seen.deployment)
        before = replicas_of(seen.deployment)
        if decision.keep and decision.replicas < before:
            self._mark_pods(cluster, seen, decision.keep)
        cluster.patch_scale(*DEPLOYMENT, name, decision.replicas, namespace)
        log.info(
            "function %s: Deployment %s/%s scaled from %d to %d",
            *(function_of(seen.autoscaler), namespace, name, before, decision.replicas),
        )
        self.metrics.scalings.labels("up" if decision.replicas > before else "down").inc()
        spec = {**seen.deployment["spec"], "replicas": decision.replicas}
        self._know(self._deployments, seen.deployment, {**seen.deployment, "spec": spec})

    @staticmethod
    def _mark_pods(cluster: Cluster, seen: Observed, keep: frozenset[str]) -> None:
        """Have the pods end first that are on nodes without updates. If that cannot be, others may."""
        revision = labels_of(seen.autoscaler).get(REVISION_LABEL)
        namespace, _ = key_of(seen.autoscaler)
        if not revision:
            return
        try:
            pods = cluster.list("v1", "Pod", namespace, f"{REVISION_LABEL}={revision}")
            for pod, cost in deletion_costs(pods, keep):
                patch = {"metadata": {"annotations": {DELETION_COST: cost}}}
                cluster.patch("v1", "Pod", pod["metadata"]["name"], patch, namespace)
        except CommandError as error:
            log.warning("pods of %s are not marked, and the wrong ones may end: %s", revision, error)

    def _know(self, watched: Watched, before: Object | None, obj: Object) -> None:
        """Take in what a write has made of `before`, unless the watch has told of that, or of more, already.

        What follows from it is decided next: the watch will tell nothing new.
        """
        key = key_of(obj)
        with self._bell.lock:
            if watched.objects.get(key) is before:
                watched.objects[key] = obj
                self._bell.ring()

    # --- metrics ---------------------------------------------------------------------------------------------

    def _show(self, decided: list[tuple[Observed, Decision]]) -> None:
        metrics, plan = self.metrics, self._plan
        metrics.passes.inc()
        for gauge in (metrics.wanted, metrics.unserved, metrics.desired, metrics.ready):
            gauge.clear()
        for seen, decision in decided:
            place = (*key_of(seen.autoscaler), function_of(seen.autoscaler))
            metrics.desired.labels(*place).set(max(0, decision.desired))
            metrics.ready.labels(*place).set(ready_of(seen.deployment))
        if plan is not None:
            metrics.is_plan_known.set(plan.is_current)
            self._show_plan(plan, {function_of(seen.autoscaler) for seen, _ in decided})

    def _show_plan(self, plan: Plan, served: set[str]) -> None:
        unserved = {function for function, need in plan.needs.items() if need.wanted and function not in served}
        for function, need in plan.needs.items():
            self.metrics.wanted.labels(function).set(need.wanted)
            if function in unserved:
                self.metrics.unserved.labels(function).set(need.wanted)
        for function in sorted(unserved - self._unserved):
            jobs = ", ".join(plan.needs[function].jobs)
            log.warning("no Service of class %s has function %s of job %s", CLASS, function, jobs)
        self._unserved = unserved
