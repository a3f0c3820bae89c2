"""What tests of every kind share: where the project is, and which data planes this machine can run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.containers import container_storage as container_storage
from tests.containers import images as images
from tests.hosts import make_hosts as make_hosts

ROOT = Path(__file__).resolve().parent.parent


def usable_data_planes() -> list[str]:
    """`unix` always; `ebpf` where the kernel lets us. Under CI=true eBPF is required."""
    from lifl_ebpf.preflight import ebpf_reason

    reason = ebpf_reason()
    if reason is None:
        return ["unix", "ebpf"]
    if os.environ.get("CI") == "true":
        raise pytest.UsageError(f"CI=true needs the eBPF data plane, but: {reason}")
    return ["unix"]


_BESIDE_NODES: Final = {
    "clusters": ("tests/e2e/test_cluster",),
    "commands": (
        "tests/e2e/test_bench",
        "tests/e2e/test_containers",
        "tests/e2e/test_function_projects",
        "tests/integration/test_autoscaler",
        "tests/integration/test_cluster_doctor",
        "tests/integration/test_deploy",
        "tests/integration/test_images",
        "tests/integration/test_kubernetes_",
        "tests/integration/test_platform",
    ),
}
"""Tests that run beside those of nodes, each kind in an order of its own."""


class _NodesInOneWorker(LoadScopeScheduling):
    """Runs tests of clusters, those of commands, and then unit tests, beside the others.

    No two of the others run at the same time: they start nodes, load eBPF, and look afterwards whether anything of
    that is left. Clusters, benchmarks and containers have network namespaces of their own. All wait most of the
    time, so three workers are not too many for two cores.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/unit/"):
            return nodeid.partition("::")[0]
        for scope, prefixes in _BESIDE_NODES.items():
            if nodeid.startswith(prefixes):
                return scope
        return "nodes"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """What `make test`, which has three workers, distributes tests with: each kind to one."""
    config.option.loadscopereorder = False
    return _NodesInOneWorker(config, log)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "data_plane" in metafunc.fixturenames:
        metafunc.parametrize("data_plane", usable_data_planes(), scope="session")
