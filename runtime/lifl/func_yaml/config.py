"""What a func.yaml says, as types: `FunctionConfig` and its parts, all frozen.

The fields are those of knative/func at specVersion 0.36.0, under their names in Python's spelling. A field that
the file leaves out is None (text, numbers) or empty (lists, mappings): then the cluster's own default holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from lifl.func_yaml.expressions import Source, parse_source

SPEC_VERSION = "0.36.0"
ANNOTATION_PREFIX = "lifl.dev/"
"""What begins the annotations that are settings of LIFL; Knative's tools keep them when they write the file."""
FUNCTION_ANNOTATION = "lifl.dev/function"
"""Path of the project's own function, relative to `func.yaml`."""
ROUTE_ANNOTATION = "lifl.dev/route"
"""How model updates reach the deployed function: `lifl` or `broker`."""


@dataclass(frozen=True)
class Env:
    """A variable of the function's environment, or, without a name, all keys of a Secret or ConfigMap."""

    name: str | None
    value: str | None
    """As written; None only in a file that is not valid."""

    @property
    def source(self) -> Source:
        """What the value stands for. Raises ValueError for a value that is no expression and begins with '{{'."""
        return parse_source(self.value or "")


@dataclass(frozen=True)
class PersistentVolumeClaim:
    """A claim of the function's namespace that is mounted."""

    claim_name: str | None
    read_only: bool = False


@dataclass(frozen=True)
class EmptyDir:
    """A directory that lives as long as its pod."""

    medium: str = ""
    """'' for the node's disk, 'Memory' for its memory."""
    size_limit: str | None = None
    """A quantity such as 256Mi."""


@dataclass(frozen=True)
class Volume:
    """What is mounted at `path`: exactly one of the other fields is set in a valid file."""

    path: str | None
    secret: str | None = None
    config_map: str | None = None
    persistent_volume_claim: PersistentVolumeClaim | None = None
    empty_dir: EmptyDir | None = None


@dataclass(frozen=True)
class Label:
    """A label of the deployed objects."""

    key: str | None
    value: str | None = None
    """Plain, or `{{ env:NAME }}` for a variable of whoever deploys; see `expressions.evaluate`."""


@dataclass(frozen=True)
class Subscription:
    """Events that the function is sent: those of the broker `source` whose attributes equal `filters`."""

    source: str | None
    filters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    """Bounds and target of the autoscaler."""

    min: int | None = None
    max: int | None = None
    """0: no bound."""
    metric: str | None = None
    """'concurrency' or 'rps'."""
    target: float | None = None
    utilization: float | None = None
    """Percent of the target to aim at."""


@dataclass(frozen=True)
class ResourceRequests:
    """What a pod is promised, as quantities."""

    cpu: str | None = None
    memory: str | None = None


@dataclass(frozen=True)
class ResourceLimits:
    """What a pod may use at most, as quantities."""

    cpu: str | None = None
    memory: str | None = None
    concurrency: int | None = None
    """Requests that a pod takes at once (containerConcurrency); 0: any number."""


@dataclass(frozen=True)
class Resources:
    """Requests and limits of a pod."""

    requests: ResourceRequests = ResourceRequests()
    limits: ResourceLimits = ResourceLimits()


@dataclass(frozen=True)
class Options:
    """How the deployed function scales and what it may use."""

    scale: Scale = Scale()
    resources: Resources = Resources()


@dataclass(frozen=True)
class HealthEndpoints:
    """Paths of the probes; None: those of Knative's function contract, /health/liveness and /health/readiness."""

    liveness: str | None = None
    readiness: str | None = None


@dataclass(frozen=True)
class Git:
    """Where a build on the cluster gets the source from."""

    url: str | None = None
    revision: str | None = None
    context_dir: str | None = None


@dataclass(frozen=True)
class BuildMount:
    """A directory of this machine that is seen while the image is built."""

    host_path: str | None
    path: str | None


@dataclass(frozen=True)
class Build:
    """How the image is made."""

    builder: str | None = None
    builder_images: Mapping[str, str] = field(default_factory=dict)
    buildpacks: tuple[str, ...] = ()
    build_envs: tuple[Env, ...] = ()
    base_image: str | None = None
    pvc_size: str | None = None
    remote_storage_class: str | None = None
    git: Git = Git()
    volumes: tuple[BuildMount, ...] = ()


@dataclass(frozen=True)
class Kafka:
    """A Kafka topic as source of events; only functions written in Go can have one."""

    brokers: str | None = None
    topic: str | None = None
    consumer_group: str | None = None


@dataclass(frozen=True)
class Run:
    """What the running function sees."""

    envs: tuple[Env, ...] = ()
    volumes: tuple[Volume, ...] = ()
    start_timeout_s: float | None = None
    """Written as a duration such as 90s, or as a number of nanoseconds."""
    kafka: Kafka | None = None


@dataclass(frozen=True)
class Deploy:
    """How the function is deployed, and, in `namespace`, `image` and `deployer`, how it is deployed now."""

    namespace: str | None = None
    """Where it is deployed; written after a deployment, cleared when it is deleted."""
    image: str | None = None
    """What is deployed, with its digest; written after a deployment."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[Label, ...] = ()
    options: Options = Options()
    health_endpoints: HealthEndpoints = HealthEndpoints()
    service_account_name: str | None = None
    image_pull_secret: str | None = None
    deployer: str | None = None
    """Cleared when it is deleted."""
    subscriptions: tuple[Subscription, ...] = ()
    management_disabled: bool = False


@dataclass(frozen=True)
class FunctionConfig:
    """A whole func.yaml."""

    name: str | None = None
    """A DNS label that starts with a letter."""
    runtime: str | None = None
    created: datetime | None = None
    """When the project was made; one without it counts as not made."""
    spec_version: str = SPEC_VERSION
    domain: str | None = None
    registry: str | None = None
    """Where images go that are not named in full: [registry]/[user]."""
    registry_insecure: bool = False
    image: str | None = None
    """The image in full; it comes before `registry` and name."""
    namespace: str | None = None
    """Where the function is to be deployed; it stays when the function is deleted."""
    deployer: str | None = None
    invoke: str | None = None
    """'http' or 'cloudevent'; None stands for 'http'."""
    build: Build = Build()
    run: Run = Run()
    deploy: Deploy = Deploy()

    @property
    def function_path(self) -> str | None:
        """Path of the project's own function relative to func.yaml, as `lifl.dev/function` says, or None."""
        return self.deploy.annotations.get(FUNCTION_ANNOTATION)
