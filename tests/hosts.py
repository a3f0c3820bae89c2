"""Hosts for tests of many nodes. The fixture is in `conftest`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import pytest
from lifl_bench.hosts import Hosts, why_no_clocks, why_not
from lifl_ebpf.preflight import ebpf_reason


def require_hosts() -> None:
    """Skip the test where there can be no hosts; under CI=true that is a failure."""
    require("hosts for the tests of many nodes", why_not())


def require_clocks() -> None:
    """Skip the test where hosts can have no clocks of their own; under CI=true that is a failure."""
    require("hosts with clocks of their own", why_no_clocks())


def require_ebpf() -> None:
    """Skip the test where eBPF is not permitted; under CI=true that is a failure."""
    require("the eBPF data plane", ebpf_reason())


def require(what: str, reason: str | None) -> None:
    """Skip the test for this reason, if there is one; under CI=true, where set-up has brought everything, fail."""
    if not reason:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true needs {what}, but: {reason}")
    pytest.skip(reason)


@pytest.fixture
def make_hosts() -> Iterator[Callable[[int | Sequence[str]], Hosts]]:
    """Makes hosts, which are closed with all that runs in them at the end of the test."""
    require_hosts()
    with contextlib.ExitStack() as stack:
        yield lambda names: stack.enter_context(Hosts(names))
