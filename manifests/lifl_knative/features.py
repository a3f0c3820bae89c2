"""Knative Serving's feature flags: which one permits what, and the command that sets one.

They are keys of ConfigMap `config-features` in namespace `knative-serving`. What none of them allows is refused by
Knative's webhook, whose words name no flag.
"""

from __future__ import annotations

import re

NAMESPACE = "knative-serving"
CONFIG_MAP = "config-features"

HOST_PATH = "kubernetes.podspec-volumes-hostpath"
EMPTY_DIR = "kubernetes.podspec-volumes-emptydir"
CLAIM = "kubernetes.podspec-persistent-volume-claim"
CLAIM_WRITE = "kubernetes.podspec-persistent-volume-write"

ENABLED_BY_DEFAULT = frozenset({EMPTY_DIR})

POD_FIELDS = {
    "affinity": "kubernetes.podspec-affinity",
    "topologySpreadConstraints": "kubernetes.podspec-topologyspreadconstraints",
    "hostAliases": "kubernetes.podspec-hostaliases",
    "nodeSelector": "kubernetes.podspec-nodeselector",
    "tolerations": "kubernetes.podspec-tolerations",
    "runtimeClassName": "kubernetes.podspec-runtimeclassname",
    "dnsPolicy": "kubernetes.podspec-dnspolicy",
    "dnsConfig": "kubernetes.podspec-dnsconfig",
    "securityContext": "kubernetes.podspec-securitycontext",
    "shareProcessNamespace": "kubernetes.podspec-shareprocessnamespace",
    "hostIPC": "kubernetes.podspec-hostipc",
    "hostPID": "kubernetes.podspec-hostpid",
    "hostNetwork": "kubernetes.podspec-hostnetwork",
    "priorityClassName": "kubernetes.podspec-priorityclassname",
    "schedulerName": "kubernetes.podspec-schedulername",
    "initContainers": "kubernetes.podspec-init-containers",
}
"""Fields of a revision's pod that need a flag."""

_REFUSALS = (
    (r"hostpath volume support is (disabled|off)", HOST_PATH),
    (r"emptydir volume support is (disabled|off)", EMPTY_DIR),
    (r"persistent volume write support is (disabled|off)", CLAIM_WRITE),
    (r"persistent volume claim support is (disabled|off)", CLAIM),
    (r"csi volume support is (disabled|off)", "kubernetes.podspec-volumes-csi"),
    (r"image volume support is (disabled|off)", "kubernetes.podspec-volumes-image"),
    (r"ephemeral volume support is (disabled|off)", "kubernetes.podspec-volumes-ephemeral"),
    (r"capabilities\.add", "kubernetes.containerspec-addcapabilities"),
    (r"valuefrom\.(resource)?fieldref", "kubernetes.podspec-fieldref"),
)


def flag_command(flag: str, kubectl: str = "kubectl") -> str:
    """The command that sets `flag`."""
    patch = f'{{"data":{{"{flag}":"enabled"}}}}'
    return f"{kubectl} patch configmap {CONFIG_MAP} -n {NAMESPACE} --type merge -p '{patch}'"


def flag_for_refusal(message: str) -> str | None:
    """The flag that would permit what Knative's webhook refuses with `message`; None if no flag is about that."""
    lowered = message.lower()
    for pattern, flag in _REFUSALS:
        if re.search(pattern, lowered):
            return flag
    if "must not set the field" in lowered:
        for field, flag in POD_FIELDS.items():
            if re.search(rf"spec\.{re.escape(field)}\b", message):
                return flag
    return None
