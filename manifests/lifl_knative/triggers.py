"""Triggers and the Broker of a function: how events reach its Service through Knative Eventing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lifl.func_yaml.config import Subscription

from lifl_knative.service import API_VERSION as SERVING
from lifl_knative.service import NAME_LABEL, Deployment, Object, make_labels

API_VERSION = "eventing.knative.dev/v1"
BROKER = "default"
BROKER_CLASS = "NatsJetStreamBroker"
CLASS_ANNOTATION = "eventing.knative.dev/broker.class"
UPDATE_TYPE = "dev.lifl.update.v1"


def subscriptions_of(deployment: Deployment) -> tuple[Subscription, ...]:
    """Those of func.yaml, and for the broker's route that to model updates, unless it is there."""
    given = deployment.config.deploy.subscriptions
    updates = Subscription(BROKER, {"type": UPDATE_TYPE})
    if deployment.route == "broker" and all(s.filters.get("type") != UPDATE_TYPE for s in given):
        return (*given, updates)
    return tuple(given)


def make_triggers(deployment: Deployment, service: Mapping[str, Any] | None = None) -> list[Object]:
    """One Trigger for each subscription, owned by `service` as the cluster has it (None: not applied yet).

    Their names come from broker and filters, because Knative lets no Trigger change its Broker.
    """
    return [_trigger(deployment, subscription, service) for subscription in subscriptions_of(deployment)]


def trigger_selector(name: str) -> str:
    """Labels by which the Triggers of a function are found."""
    return f"{NAME_LABEL}={name},app.kubernetes.io/managed-by=lifl-func"


def make_broker(deployment: Deployment) -> Object:
    """The Broker of the function's namespace, for events over NATS JetStream."""
    return {
        "apiVersion": API_VERSION,
        "kind": "Broker",
        "metadata": {
            "name": BROKER,
            "namespace": deployment.namespace,
            "labels": {
                "app.kubernetes.io/name": "lifl-broker",
                "app.kubernetes.io/part-of": "lifl",
                "app.kubernetes.io/managed-by": "lifl-func",
            },
            "annotations": {CLASS_ANNOTATION: BROKER_CLASS},
        },
        "spec": {
            # A model takes longer than the 30 s after which JetStream delivers again.
            "delivery": {"timeout": "PT5M", "retry": 3, "backoffPolicy": "exponential", "backoffDelay": "PT1S"}
        },
    }


def _trigger(deployment: Deployment, subscription: Subscription, service: Mapping[str, Any] | None) -> Object:
    filters = dict(subscription.filters)
    identity = json.dumps([subscription.source, filters], sort_keys=True).encode()
    metadata: Object = {
        "name": f"{deployment.name}-trigger-{hashlib.sha256(identity).hexdigest()[:8]}",
        "namespace": deployment.namespace,
        "labels": make_labels(deployment),
    }
    if service and service["metadata"].get("uid"):
        metadata["ownerReferences"] = [
            {
                "apiVersion": SERVING,
                "kind": "Service",
                "name": deployment.name,
                "uid": service["metadata"]["uid"],
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    reference = {
        "apiVersion": SERVING,
        "kind": "Service",
        "name": deployment.name,
        "namespace": deployment.namespace,
    }
    spec: Object = {"broker": subscription.source, "subscriber": {"ref": reference}}
    if filters:
        spec["filter"] = {"attributes": filters}
    return {"apiVersion": API_VERSION, "kind": "Trigger", "metadata": metadata, "spec": spec}
