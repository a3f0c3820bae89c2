"""Finding the cluster: the kubeconfig files, the context in them, and the account of the pod this runs in."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifl.cli.common import command_path

from lifl_knative.api_errors import NoCluster

if TYPE_CHECKING:
    from kubernetes.client import Configuration

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
IN_CLUSTER = "in-cluster"
"""Name of the context of a pod's own account."""


@dataclass(frozen=True)
class Access:
    """How to reach a cluster."""

    configuration: Configuration
    """The client's: address, TLS, credentials."""
    context: str
    namespace: str | None
    """That of the context, if it names one."""
    kubectl: str
    """`kubectl` with the options that make it use the same cluster, for messages."""


def find_access(kubeconfig: Path | None, context: str | None) -> Access:
    """Access to the cluster of `context` (default: the current one).

    Looks into `kubeconfig`, else the files KUBECONFIG names (the first that has a name wins), else ~/.kube/config,
    else takes the account of the pod this runs in. Raises NoCluster, with what to do.
    """
    if importlib.util.find_spec("kubernetes") is None:
        raise NoCluster(
            "the Python package 'kubernetes', by which clusters are asked, is not installed",
            [("pip install 'lifl[knative]'", "install LIFL with it")],
        )
    files = _kubeconfig_files(kubeconfig)
    existing = [file for file in files if file.is_file()]
    if existing:
        return _from_files(existing, kubeconfig, context)
    if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        return _from_pod(context)
    where = ", ".join(f"'{file}'" for file in files)
    raise NoCluster(
        f"no cluster is known: there is no kubeconfig at {where}",
        [
            ("export KUBECONFIG=FILE", "name the kubeconfig of your cluster"),
            (f"{command_path()} --kubeconfig FILE", "or give it with the command"),
            ("kubectl config get-contexts", "the clusters that kubectl knows"),
        ],
    )


def _kubeconfig_files(kubeconfig: Path | None) -> list[Path]:
    if kubeconfig is not None:
        return [kubeconfig]
    named = [Path(part).expanduser() for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    return named or [Path("~/.kube/config").expanduser()]


def _from_files(files: list[Path], kubeconfig: Path | None, context: str | None) -> Access:
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    where = ", ".join(f"'{file}'" for file in files)
    documents = [_read(file) for file in files]
    contexts = _contexts(documents)
    chosen = context or next((str(name) for d in documents if (name := d.get("current-context"))), None)
    if chosen is None:
        raise NoCluster(
            f"no context is chosen in the kubeconfig {where}",
            [
                ("kubectl config use-context NAME", f"choose one of: {', '.join(contexts) or 'none'}"),
                (f"{command_path()} --context NAME", "or give it with the command"),
            ],
        )
    if chosen not in contexts:
        said = f"it has {', '.join(contexts)}" if contexts else "it has none"
        raise NoCluster(
            f'there is no context "{chosen}" in the kubeconfig {where}; {said}',
            [("kubectl config get-contexts", "the contexts with their clusters")],
        )
    configuration = Configuration()
    try:
        merged = KubeConfigMerger(os.pathsep.join(map(str, files))).config
        loader = KubeConfigLoader(merged, active_context=chosen, config_base_path=None)
        with _credential_errors(chosen):
            loader.load_and_set(configuration)
    except (ConfigException, OSError, ValueError, TypeError, KeyError) as error:
        raise NoCluster(
            f'the kubeconfig {where} cannot be used for context "{chosen}": {error}',
            [(f"kubectl config view --minify --context {chosen}", "what it says")],
        ) from None
    options = f" --kubeconfig {kubeconfig}" if kubeconfig else ""
    options += f" --context {context}" if context else ""
    namespace = contexts[chosen].get("namespace")
    return Access(configuration, chosen, str(namespace) if namespace else None, f"kubectl{options}")


def _read(file: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise NoCluster(f"the kubeconfig '{file}' cannot be read: {error}") from None
    except YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f" (line {line + 1})" if line is not None else ""
        raise NoCluster(f"the kubeconfig '{file}' is not valid YAML{place}") from None
    if not isinstance(document, Mapping):
        raise NoCluster(f"the kubeconfig '{file}' is no mapping with clusters, contexts and users")
    return document


def _contexts(documents: list[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    contexts: dict[str, Mapping[str, Any]] = {}
    for document in documents:
        for entry in document.get("contexts") or ():
            if isinstance(entry, Mapping) and isinstance(entry.get("context"), Mapping):
                contexts.setdefault(str(entry.get("name")), entry["context"])
    return contexts


@contextmanager
def _credential_errors(context: str) -> Iterator[None]:
    """Raise what the client only logs: a credential plug-in that fails."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    root, listener = logging.getLogger(), Listener(logging.ERROR)
    root.addHandler(listener)
    try:
        yield
    finally:
        root.removeHandler(listener)
    if messages:
        raise NoCluster(
            f'the credentials of context "{context}" cannot be had: {messages[0]}',
            [(f"kubectl config view --minify --context {context}", "the credential plug-in that is used")],
        )


def _from_pod(context: str | None) -> Access:
    from kubernetes.client import Configuration
    from kubernetes.config import ConfigException, load_incluster_config

    if context not in (None, IN_CLUSTER):
        raise NoCluster(
            f'there is no kubeconfig with a context "{context}"; in a pod there is "{IN_CLUSTER}" alone'
        )
    configuration = Configuration()
    try:
        load_incluster_config(client_configuration=configuration)
        namespace = (_SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
    except (ConfigException, OSError) as error:
        raise NoCluster(
            f"the service account of this pod cannot be used: {error}",
            [("kubectl get pod NAME -o yaml", "whether automountServiceAccountToken is off")],
        ) from None
    return Access(configuration, IN_CLUSTER, namespace or None, "kubectl")
