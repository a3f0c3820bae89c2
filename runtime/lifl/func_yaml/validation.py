"""What is wrong with the content of a func.yaml: one sentence for each problem, in the style of Knative's func."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from lifl.func_yaml import names
from lifl.func_yaml.config import (
    Build,
    Deploy,
    Env,
    FunctionConfig,
    Label,
    Options,
    ResourceLimits,
    ResourceRequests,
    Resources,
    Run,
    Scale,
    Subscription,
    Volume,
)
from lifl.func_yaml.expressions import ConfigMapReference, LocalVariable, Plain, SecretReference, Source

_DEPLOYERS = ("knative", "raw", "keda")
_INVOKES = ("http", "cloudevent")
_BUILDERS = ("pack", "s2i", "host")
_METRICS = ("concurrency", "rps")
_LEAST_TARGET = 0.01
_EVENT_ATTRIBUTE = re.compile(r"[a-z0-9]+")
_ENV_FORMS = "'{{ env:LOCAL_NAME }}', '{{ secret:NAME:KEY }}' or '{{ configMap:NAME:KEY }}'"


def problems_of(config: FunctionConfig) -> Iterator[str]:
    """The problems, in the order of the fields of `config`."""
    yield from _identity(config)
    yield from _choice("invoke", config.invoke, _INVOKES)
    yield from _build(config.build)
    yield from _run(config)
    yield from _deploy(config.deploy)


def _identity(config: FunctionConfig) -> Iterator[str]:
    if config.name is None:
        yield "name: is missing"
    else:
        yield from _field("name", names.function_name_problem(config.name))
    if config.runtime is None:
        yield "runtime: is missing; LIFL runs 'python'"
    if config.registry is not None:
        yield from _field("registry", names.registry_problem(config.registry))
    if config.image is not None:
        yield from _field("image", names.image_problem(config.image))
    if config.namespace is not None:
        yield from _field("namespace", names.namespace_problem(config.namespace))
    if config.domain is not None:
        yield from _field("domain", names.object_name_problem(config.domain))
    yield from _choice("deployer", config.deployer, _DEPLOYERS)


def _field(path: str, problem: str | None) -> Iterator[str]:
    if problem:
        yield f"{path}: {problem}"


def _choice(path: str, value: str | None, choices: tuple[str, ...]) -> Iterator[str]:
    if value is not None and value not in choices:
        yield f"{path}: '{value}' is not supported; it is one of {', '.join(choices)}"


# --- build and run -------------------------------------------------------------------------------------------


def _build(build: Build) -> Iterator[str]:
    yield from _choice("build.builder", build.builder, _BUILDERS)
    if build.base_image is not None:
        yield from _field("build.baseImage", names.image_problem(build.base_image))
    for index, env in enumerate(build.build_envs):
        yield from _build_env(f"build env entry #{index}", env)
    yield from _duplicates("build env", (env.name for env in build.build_envs))
    for index, mount in enumerate(build.volumes):
        for name, value in (("hostPath", mount.host_path), ("path", mount.path)):
            if value is None:
                yield f"build volume entry #{index} has no {name}"


def _build_env(where: str, env: Env) -> Iterator[str]:
    if env.name is None:
        yield f"{where} has no name"
        return
    yield from _named(where, env)
    if env.value is None:
        yield f"{where} with name '{env.name}' has no value"
    elif not isinstance(_source(env), Plain | LocalVariable):
        yield (
            f"{where} with name '{env.name}' has the value '{env.value}', "
            "but allowed is only text or '{{ env:LOCAL_NAME }}'"
        )


def _run(config: FunctionConfig) -> Iterator[str]:
    run: Run = config.run
    for index, env in enumerate(run.envs):
        yield from _env(f"env entry #{index}", env)
    yield from _duplicates("env", (env.name for env in run.envs))
    for index, volume in enumerate(run.volumes):
        yield from _volume(f"volume entry #{index}", volume)
    paths = (posixpath.normpath(volume.path) for volume in run.volumes if volume.path)
    yield from _duplicates("volume", paths, "path")
    if run.start_timeout_s is not None and run.start_timeout_s < 0:
        yield "run.startTimeout: has to be at least 0"
    if run.kafka is None:
        return
    if config.runtime != "go" or config.invoke != "cloudevent":
        yield "run.kafka: is for functions with 'runtime: go' and 'invoke: cloudevent' only"
    parts = {"brokers": run.kafka.brokers, "topic": run.kafka.topic, "consumerGroup": run.kafka.consumer_group}
    yield from (f"run.kafka.{name}: is missing" for name, value in parts.items() if value is None)


def _env(where: str, env: Env) -> Iterator[str]:
    if env.name is None and env.value is None:
        yield f"{where} has neither name nor value"
    elif env.name is None:
        match _source(env):
            case SecretReference(key=None) | ConfigMapReference(key=None):
                pass
            case _:
                yield (
                    f"{where} has no name and the value '{env.value}', "
                    "but without a name allowed is only '{{ secret:NAME }}' or '{{ configMap:NAME }}'"
                )
    else:
        yield from _named(where, env)
        if env.value is None:
            yield f"{where} with name '{env.name}' has no value"
            return
        match _source(env):
            case None | SecretReference(key=None) | ConfigMapReference(key=None):
                yield (
                    f"{where} with name '{env.name}' has the value '{env.value}', "
                    f"but allowed is only text, {_ENV_FORMS}"
                )
            case _:
                pass


def _source(env: Env) -> Source | None:
    try:
        return env.source
    except ValueError:
        return None


def _named(where: str, env: Env) -> Iterator[str]:
    if env.name is not None and (problem := names.env_name_problem(env.name)):
        yield f"{where} has an invalid name: {problem}"


def _duplicates(what: str, values: Iterable[str | None], part: str = "name") -> Iterator[str]:
    counts = Counter(value for value in values if value is not None)
    yield from (f"{what} {part} '{value}' is there {count} times" for value, count in counts.items() if count > 1)


def _volume(where: str, volume: Volume) -> Iterator[str]:
    claim = volume.persistent_volume_claim
    parts = {
        "secret": volume.secret,
        "configMap": volume.config_map,
        "persistentVolumeClaim": None if claim is None else claim.claim_name or "",
        "emptyDir": None if volume.empty_dir is None else "",
    }
    given = {kind: name for kind, name in parts.items() if name is not None}
    if len(given) == 1:
        where = f"{where} ({' '.join(filter(None, next(iter(given.items()))))})"
    else:
        what = f"{' and '.join(given)} together" if given else "nothing to mount"
        yield f"{where} has {what}; it has to be exactly one of {', '.join(parts)}"
    if volume.path is None:
        yield f"{where} has no path"
    elif not volume.path.startswith("/") or ":" in volume.path:
        yield f"{where} has the path '{volume.path}', which has to start with '/' and contain no ':'"
    for kind, name in given.items():
        if kind != "emptyDir" and (problem := names.object_name_problem(name)):
            yield f"{where} has no claimName" if not name else f"{where} has an invalid {kind}: {problem}"
    if volume.empty_dir is not None:
        if volume.empty_dir.medium not in ("", "Memory"):
            yield f"{where} has the medium '{volume.empty_dir.medium}', but allowed is only '' or 'Memory'"
        if volume.empty_dir.size_limit is not None and (problem := _quantity(volume.empty_dir.size_limit)):
            yield f"{where} has an invalid sizeLimit: {problem}"


# --- deploy --------------------------------------------------------------------------------------------------


def _deploy(deploy: Deploy) -> Iterator[str]:
    if deploy.namespace is not None:
        yield from _field("deploy.namespace", names.namespace_problem(deploy.namespace))
    if deploy.image is not None:
        yield from _field("deploy.image", names.image_problem(deploy.image))
    for key in deploy.annotations:
        yield from _field("deploy.annotations", names.qualified_name_problem(key.lower()))
    for index, label in enumerate(deploy.labels):
        yield from _label(f"label entry #{index}", label)
    yield from _duplicates("label", (label.key for label in deploy.labels), "key")
    yield from _options(deploy.options)
    for part in ("liveness", "readiness"):
        path = getattr(deploy.health_endpoints, part)
        if path is not None and not path.startswith("/"):
            yield f"deploy.healthEndpoints.{part}: '{path}' has to start with '/'"
    if deploy.service_account_name is not None:
        yield from _field("deploy.serviceAccountName", names.object_name_problem(deploy.service_account_name))
    if deploy.image_pull_secret is not None:
        yield from _field("deploy.imagePullSecret", names.object_name_problem(deploy.image_pull_secret))
    yield from _choice("deploy.deployer", deploy.deployer, _DEPLOYERS)
    for index, subscription in enumerate(deploy.subscriptions):
        yield from _subscription(f"subscription entry #{index}", subscription)


def _label(where: str, label: Label) -> Iterator[str]:
    if label.key is None:
        yield f"{where} has no key"
        return
    if problem := names.qualified_name_problem(label.key):
        yield f"{where} has an invalid key: {problem}"
    value = label.value or ""
    source = _source(Env(None, value))
    if value.startswith("{{"):
        if not isinstance(source, LocalVariable):
            yield (
                f"{where} with key '{label.key}' has the value '{value}', "
                "but allowed is only text or '{{ env:LOCAL_NAME }}'"
            )
    elif problem := names.label_value_problem(value):
        yield f"{where} with key '{label.key}' has an invalid value: {problem}"


def _subscription(where: str, subscription: Subscription) -> Iterator[str]:
    if subscription.source is None:
        yield f"{where} has no source; it is the name of a broker, such as default"
    elif problem := names.object_name_problem(subscription.source):
        yield f"{where} has an invalid source: {problem}"
    for attribute in subscription.filters:
        if not _EVENT_ATTRIBUTE.fullmatch(attribute):
            yield f"{where} has the filter '{attribute}', but an attribute is lower-case letters and digits"


def _options(options: Options) -> Iterator[str]:
    for field, problem in (*_scale(options.scale), *_resources(options.resources)):
        yield f'options field "{field}" {problem}'


def _scale(scale: Scale) -> Iterator[tuple[str, str]]:
    for field, bound in (("scale.min", scale.min), ("scale.max", scale.max)):
        if bound is not None and bound < 0:
            yield field, f"has the value {bound}, but it has to be at least 0"
    if scale.min is not None and scale.max is not None and 0 <= scale.max < scale.min:
        yield "scale.max", f"has the value {scale.max}, which is less than scale.min, {scale.min}"
    if scale.metric is not None and scale.metric not in _METRICS:
        yield "scale.metric", f"has the value '{scale.metric}', but allowed is only {' or '.join(_METRICS)}"
    if scale.target is not None and scale.target < _LEAST_TARGET:
        yield "scale.target", f"has the value {scale.target:g}, but it has to be at least {_LEAST_TARGET}"
    if scale.utilization is not None and not 1 <= scale.utilization <= 100:
        yield "scale.utilization", f"has the value {scale.utilization:g}, but it has to be from 1 to 100"


def _resources(resources: Resources) -> Iterator[tuple[str, str]]:
    sides: tuple[tuple[str, ResourceRequests | ResourceLimits], ...] = (
        ("requests", resources.requests),
        ("limits", resources.limits),
    )
    valid = True
    for side, values in sides:
        for part in ("cpu", "memory"):
            text = getattr(values, part)
            if text is not None and (problem := _quantity(text)):
                valid = False
                yield f"resources.{side}.{part}", f"is invalid: {problem}"
    for part in ("cpu", "memory") if valid else ():
        request, limit = getattr(resources.requests, part), getattr(resources.limits, part)
        if request and limit and names.parse_quantity(request) > names.parse_quantity(limit):
            yield f"resources.requests.{part}", f"has the value {request}, which is more than the limit, {limit}"
    concurrency = resources.limits.concurrency
    if concurrency is not None and concurrency < 0:
        yield "resources.limits.concurrency", f"has the value {concurrency}, but it has to be at least 0"


def _quantity(text: str) -> str | None:
    try:
        return None if names.parse_quantity(text) >= 0 else f"'{text}' is less than 0"
    except ValueError as error:
        return str(error)
