"""What a deployment refers to: Secrets, ConfigMaps, claims, accounts and Brokers, which are looked up first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lifl.cli.common import note
from lifl.func_yaml.expressions import ConfigMapReference, SecretReference

from lifl_knative.api_errors import Forbidden
from lifl_knative.cluster import Cluster
from lifl_knative.service import Deployment
from lifl_knative.triggers import API_VERSION as EVENTING
from lifl_knative.triggers import BROKER, subscriptions_of


@dataclass(frozen=True)
class Reference:
    """An object that has to be there, with `key` in it if one is named; `field` of func.yaml asks for it."""

    kind: str
    name: str
    field: str
    key: str | None = None
    api_version: str = "v1"


def references_of(deployment: Deployment) -> Iterator[Reference]:
    """All that `deployment` refers to, in the order of func.yaml."""
    config = deployment.config
    for number, env in enumerate(config.run.envs):
        field = f"run.envs #{number}"
        match env.source:
            case SecretReference(name, key):
                yield Reference("Secret", name, field, key)
            case ConfigMapReference(name, key):
                yield Reference("ConfigMap", name, field, key)
    for number, volume in enumerate(config.run.volumes):
        field = f"run.volumes #{number}"
        if volume.secret:
            yield Reference("Secret", volume.secret, field)
        if volume.config_map:
            yield Reference("ConfigMap", volume.config_map, field)
        if volume.persistent_volume_claim:
            yield Reference("PersistentVolumeClaim", volume.persistent_volume_claim.claim_name or "", field)
    if config.deploy.service_account_name:
        yield Reference("ServiceAccount", config.deploy.service_account_name, "deploy.serviceAccountName")
    if config.deploy.image_pull_secret:
        yield Reference("Secret", config.deploy.image_pull_secret, "deploy.imagePullSecret")
    for number, subscription in enumerate(subscriptions_of(deployment)):
        # The broker's route makes its own.
        if not (deployment.route == "broker" and subscription.source == BROKER):
            field = f"deploy.subscriptions #{number}"
            yield Reference("Broker", subscription.source or "", field, api_version=EVENTING)


def missing_references(cluster: Cluster, deployment: Deployment) -> list[str]:
    """One sentence for each that is missing. What we may not look at is noted, and taken to be there."""
    problems: list[str] = []
    where = f'in namespace "{deployment.namespace}"'
    for reference in references_of(deployment):
        try:
            found = cluster.get(reference.api_version, reference.kind, reference.name, deployment.namespace)
        except Forbidden:
            note(f"Warning: {reference.kind} '{reference.name}' is not checked: there is no permission to get it")
            continue
        if found is None:
            problems.append(f"{reference.field}: there is no {reference.kind} '{reference.name}' {where}")
        elif reference.key and reference.key not in {**found.get("data", {}), **found.get("binaryData", {})}:
            problems.append(
                f"{reference.field}: {reference.kind} '{reference.name}' {where} has no key '{reference.key}'"
            )
    return problems
