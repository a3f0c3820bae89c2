"""Nodes for end-to-end tests: one that a module's tests share, and one for each test that kills its parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lifl_bench.cluster import Cluster

from tests.e2e.node_harness import LiveNode, Watch
from tests.hosts import require_hosts


@pytest.fixture(autouse=True)
def _no_stray_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FUNC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Fails the test if it leaves anything behind."""
    with Watch() as watch:
        yield watch


@pytest.fixture
def make_node(watch: Watch, tmp_path: Path, data_plane: str) -> Iterator[Callable[..., LiveNode]]:
    """Start nodes on one state directory; what still runs at the end is stopped."""
    started: list[LiveNode] = []

    def make(**options: object) -> LiveNode:
        node = LiveNode(watch, tmp_path / "state", data_plane, **options).start()  # type: ignore[arg-type]
        started.append(node)
        return node

    yield make
    for node in started:
        node.stop()


@pytest.fixture
def node(make_node: Callable[..., LiveNode]) -> LiveNode:
    """A node of the test's own."""
    return make_node()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start clusters, of network namespaces as hosts, which are ended with the test. Leases are short."""
    require_hosts()
    started: list[Cluster] = []

    def make(nodes: int, **options: Any) -> Cluster:
        cluster = Cluster(nodes, tmp_path / "cluster", **{"lease": 1.5, **options})
        cluster.__enter__()
        started.append(cluster)
        return cluster

    yield make
    for cluster in started:
        cluster.close()


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory: pytest.TempPathFactory, data_plane: str) -> Iterator[LiveNode]:
    """A node for all tests of a module that do it no harm; nothing may be left of it at the end."""
    directory = tmp_path_factory.mktemp("node")
    with Watch() as watch, LiveNode(watch, directory, data_plane) as node:
        yield node
