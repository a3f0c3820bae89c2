"""The tree of a func.yaml to a `FunctionConfig`: types are checked here, and fields that nobody knows are noted.

As with Knative's func a number or truth value where text is expected is taken as it is written. A value of the
wrong type is a problem, where Knative's func would go on as if it were not there.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from lifl.func_yaml.config import (
    Build,
    BuildMount,
    Deploy,
    EmptyDir,
    Env,
    FunctionConfig,
    Git,
    HealthEndpoints,
    Kafka,
    Label,
    Options,
    PersistentVolumeClaim,
    ResourceLimits,
    ResourceRequests,
    Resources,
    Run,
    Scale,
    Subscription,
    Volume,
)
from lifl.func_yaml.text import is_null, is_quoted, line_of

_Item = TypeVar("_Item")

_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_TRUTH = {"true": True, "false": False}
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ]+(\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)?\s*([Zz]|[-+]\d\d:\d\d)?", re.ASCII)
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass
class Findings:
    """What reading a file found, besides its content."""

    problems: list[str] = field(default_factory=list)
    """Why the file cannot be used."""
    warnings: list[tuple[int, str]] = field(default_factory=list)
    """What is ignored: line, and a sentence without it."""


def read_config(tree: Mapping[str, Any], findings: Findings) -> FunctionConfig:
    """The content of a func.yaml at specVersion 0.36.0; what is wrong with it goes to `findings`."""
    top = _Section(tree, "", findings)
    config = FunctionConfig(
        name=top.text("name"),
        runtime=top.text("runtime"),
        created=top.time("created"),
        spec_version=top.text("specVersion") or "",
        domain=top.text("domain"),
        registry=top.text("registry"),
        registry_insecure=top.truth("registryInsecure"),
        image=top.text("image"),
        namespace=top.text("namespace"),
        deployer=top.text("deployer"),
        invoke=top.text("invoke"),
        build=_read_build(top.section("build")),
        run=_read_run(top.section("run")),
        deploy=_read_deploy(top.section("deploy")),
    )
    top.close()
    return config


def suggest(word: object, known: Collection[str]) -> str:
    """A question that ends a message about an unknown word, if a known one is close; else nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


class _Section:
    """One mapping of the file; it remembers which fields it was asked for, and `close` notes all others."""

    def __init__(self, node: Mapping[str, Any], path: str, findings: Findings) -> None:
        self._node = node
        self._path = path
        self._findings = findings
        self._known: list[str] = []

    def close(self) -> None:
        for key in self._node:
            if key not in self._known:
                where = f'unknown field "{self._name(key)}" is ignored{suggest(key, self._known)}'
                self._findings.warnings.append((line_of(self._node, key), where))

    def text(self, key: str) -> str | None:
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self._refuse(key, value, "text")
            return None
        return str(value)

    def truth(self, key: str) -> bool:
        value = self._take(key)
        if value is None:
            return False
        if is_quoted(value) or str(value).lower() not in _TRUTH:
            self._refuse(key, value, "true or false")
            return False
        return _TRUTH[value.lower()]

    def integer(self, key: str) -> int | None:
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, str) and not is_quoted(value) and _INTEGER.fullmatch(value) and len(value) < 20:
            return int(value)
        self._refuse(key, value, "a whole number, without quotes")
        return None

    def number(self, key: str) -> float | None:
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, str) and not is_quoted(value) and _NUMBER.fullmatch(value):
            number = float(value)
            if math.isfinite(number):
                return number
        self._refuse(key, value, "a number, without quotes")
        return None

    def time(self, key: str) -> datetime | None:
        value = self._take(key)
        if value is None:
            return None
        try:
            return _parse_time(value)
        except (TypeError, ValueError):
            self._refuse(key, value, "a time, such as 2026-11-22T12:00:00Z")
            return None

    def duration(self, key: str) -> float | None:
        value = self._take(key)
        if value is None:
            return None
        try:
            return _parse_duration(value)
        except (TypeError, ValueError):
            self._refuse(key, value, "a duration, such as 90s or 1m30s")
            return None

    def texts(self, key: str) -> dict[str, str]:
        node = self._take(key)
        texts: dict[str, str] = {}
        if node is None:
            return texts
        if not isinstance(node, Mapping):
            self._refuse(key, node, "a mapping")
            return texts
        for name, value in node.items():
            if not isinstance(name, str) or not isinstance(value, str):
                self._problem(key, f"'{name}: {_show(value)}' has to be text; put it in quotes")
            else:
                texts[name] = "" if is_null(value) else str(value)
        return texts

    def section(self, key: str) -> _Section:
        node = self._take(key)
        if node is not None and not isinstance(node, Mapping):
            self._refuse(key, node, "a mapping")
            node = None
        return _Section(node or {}, f"{self._name(key)}.", self._findings)

    def has(self, key: str) -> bool:
        return self._take(key) is not None

    def items(self, key: str, read: Callable[[_Section], _Item]) -> tuple[_Item, ...]:
        """The items of a list of mappings, each read by `read`; the index of one that is none is left out."""
        items: list[_Item] = []
        for index, node in enumerate(self._list(key)):
            if isinstance(node, Mapping):
                section = _Section(node, f"{self._name(key)}[{index}].", self._findings)
                items.append(read(section))
                section.close()
            else:
                self._problem(f"{key}[{index}]", f"{_quote(node)} has to be a mapping")
        return tuple(items)

    def words(self, key: str) -> tuple[str, ...]:
        words: list[str] = []
        for index, node in enumerate(self._list(key)):
            if isinstance(node, str) and not is_null(node):
                words.append(str(node))
            else:
                self._problem(f"{key}[{index}]", f"{_quote(node)} has to be text")
        return tuple(words)

    def _list(self, key: str) -> list[Any]:
        node = self._take(key)
        if node is not None and not isinstance(node, list):
            self._refuse(key, node, "a list")
            return []
        return node or []

    def _take(self, key: str) -> Any:
        if key not in self._known:
            self._known.append(key)
        value = self._node.get(key)
        if is_null(value):
            return None
        return value

    def _refuse(self, key: str, value: object, wanted: str) -> None:
        self._problem(key, f"{_quote(value)} has to be {wanted}")

    def _problem(self, key: str, text: str) -> None:
        self._findings.problems.append(f"{self._name(key)}: {text}")

    def _name(self, key: object) -> str:
        return f"{self._path}{key}"


def _quote(value: object) -> str:
    return f"'{_show(value)}'"


def _show(value: object) -> str:
    """A value on one line, as short as a message needs it."""
    if isinstance(value, Mapping):
        return "{...}"
    if isinstance(value, list):
        return "[...]"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parse_time(text: str) -> datetime:
    match = _TIME.fullmatch(text)
    if match is None:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)
    day, time, fraction, zone = match.groups()
    zone = "+00:00" if zone is None or zone in "Zz" else zone
    return datetime.fromisoformat(f"{day}T{time}.{(fraction or '0'):0<6}{zone}")


def _parse_duration(text: str) -> float:
    """Seconds of a Go duration, or of a plain number of nanoseconds."""
    if _INTEGER.fullmatch(text):
        return int(text) * 1e-9
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(text)
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


# --- the parts -----------------------------------------------------------------------------------------------


def _read_env(item: _Section) -> Env:
    # An empty value is a value: `value:` without anything is none.
    return Env(item.text("name"), item.text("value"))


def _read_build(build: _Section) -> Build:
    git = build.section("git")
    read = Build(
        builder=build.text("builder"),
        builder_images=build.texts("builderImages"),
        buildpacks=build.words("buildpacks"),
        build_envs=build.items("buildEnvs", _read_env),
        base_image=build.text("baseImage"),
        pvc_size=build.text("pvcSize"),
        remote_storage_class=build.text("remoteStorageClass"),
        git=Git(git.text("url"), git.text("revision"), git.text("contextDir")),
        volumes=build.items("volumes", lambda item: BuildMount(item.text("hostPath"), item.text("path"))),
    )
    git.close()
    build.close()
    return read


def _read_run(run: _Section) -> Run:
    kafka = None
    if run.has("kafka"):
        section = run.section("kafka")
        kafka = Kafka(section.text("brokers"), section.text("topic"), section.text("consumerGroup"))
        section.close()
    read = Run(
        envs=run.items("envs", _read_env),
        volumes=run.items("volumes", _read_volume),
        start_timeout_s=run.duration("startTimeout"),
        kafka=kafka,
    )
    run.close()
    return read


def _read_volume(item: _Section) -> Volume:
    claim = empty_dir = None
    if item.has("persistentVolumeClaim"):
        section = item.section("persistentVolumeClaim")
        claim = PersistentVolumeClaim(section.text("claimName"), section.truth("readOnly"))
        section.close()
    if item.has("emptyDir"):
        section = item.section("emptyDir")
        empty_dir = EmptyDir(section.text("medium") or "", section.text("sizeLimit"))
        section.close()
    return Volume(item.text("path"), item.text("secret"), item.text("configMap"), claim, empty_dir)


def _read_deploy(deploy: _Section) -> Deploy:
    health = deploy.section("healthEndpoints")
    read = Deploy(
        namespace=deploy.text("namespace"),
        image=deploy.text("image"),
        annotations=deploy.texts("annotations"),
        labels=deploy.items("labels", lambda item: Label(item.text("key"), item.text("value"))),
        options=_read_options(deploy.section("options")),
        health_endpoints=HealthEndpoints(health.text("liveness"), health.text("readiness")),
        service_account_name=deploy.text("serviceAccountName"),
        image_pull_secret=deploy.text("imagePullSecret"),
        deployer=deploy.text("deployer"),
        subscriptions=deploy.items(
            "subscriptions", lambda item: Subscription(item.text("source"), item.texts("filters"))
        ),
        management_disabled=deploy.truth("managementDisabled"),
    )
    health.close()
    deploy.close()
    return read


def _read_options(options: _Section) -> Options:
    scale, resources = options.section("scale"), options.section("resources")
    requests, limits = resources.section("requests"), resources.section("limits")
    read = Options(
        Scale(
            min=scale.integer("min"),
            max=scale.integer("max"),
            metric=scale.text("metric"),
            target=scale.number("target"),
            utilization=scale.number("utilization"),
        ),
        Resources(
            ResourceRequests(requests.text("cpu"), requests.text("memory")),
            ResourceLimits(limits.text("cpu"), limits.text("memory"), limits.integer("concurrency")),
        ),
    )
    for section in (scale, requests, limits, resources, options):
        section.close()
    return read
