"""`python -m lifl_knative.autoscaler`: scales the pods of functions to the coordinator's plan until SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import click
from lifl.cli.common import CommandError
from lifl.logs import configure_logging
from lifl.process import end_with_supervisor

from lifl_knative.autoscaler.controller import Controller
from lifl_knative.autoscaler.monitor import Monitor
from lifl_knative.autoscaler.plan import PlanFeed
from lifl_knative.cluster import Cluster

_CANNOT_START = 2
_PORT = 9090

log = logging.getLogger("lifl.autoscaler")


def _default_address() -> str:
    """Where a kubelet can reach it, in a pod; else loopback."""
    return f"{'0.0.0.0' if os.environ.get('KUBERNETES_SERVICE_HOST') else '127.0.0.1'}:{_PORT}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--coordinator",
    required=True,
    metavar="URL",
    envvar="FUNC_COORDINATOR",
    help="The cluster's coordinator, such as http://lifl-coordinator.lifl-system:7070.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FUNC_TOKEN_FILE",
    help="An operator's token: a line '* TOKEN' of a token file, or a file with the token alone.",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    default=_default_address,
    envvar="FUNC_ADDRESS",
    help=f"Where /healthz, /readyz and /metrics are. [default: port {_PORT} of the pod, else of loopback]",
)
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FUNC_KUBECONFIG",
    help="Kubeconfig file. [default: those in KUBECONFIG, ~/.kube/config, else the pod's account]",
)
@click.option("--context", metavar="NAME", envvar="FUNC_CONTEXT", help="Context of the kubeconfig.")
def main(
    coordinator: str, token_file: Path | None, address: str, kubeconfig: Path | None, context: str | None
) -> None:
    """Scale PodAutoscalers of class plan.autoscaling.lifl.dev to what the coordinator has planned.

    \b
    Examples:
      python -m lifl_knative.autoscaler --coordinator http://lifl-coordinator.lifl-system:7070
      python -m lifl_knative.autoscaler --coordinator http://127.0.0.1:7070 --context kind-kind
    """
    configure_logging("autoscaler", "autoscaler: %(levelname)s %(message)s")
    try:
        sys.exit(_run(coordinator, token_file, address, kubeconfig, context))
    except CommandError as error:
        log.error("%s", error)
        sys.exit(_CANNOT_START)


def _run(
    coordinator: str, token_file: Path | None, address: str, kubeconfig: Path | None, context: str | None
) -> int:
    controller = Controller(lambda: Cluster.connect(kubeconfig, context))
    # What is wrong with any of these is said before anything is started.
    feed = PlanFeed(coordinator, token_file, controller.take_plan)
    host, port = _host_port(address)
    Cluster.connect(kubeconfig, context).close()
    monitor = _monitor(host, port, controller)
    stopped = threading.Event()
    failures = _note_failures(stopped)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    monitor.start()
    feed.start()
    log.info("scaling to the plan of %s; metrics at http://%s/metrics", coordinator, monitor.address)
    threading.Thread(target=controller.run, name="controller", daemon=True).start()
    stopped.wait()
    controller.stop()
    return 1 if failures else 0


def _note_failures(stopped: threading.Event) -> list[BaseException | None]:
    """End the process when a thread has failed, without which nothing is scaled: it will be started anew."""
    failures: list[BaseException | None] = []

    def fail(failure: threading.ExceptHookArgs) -> None:
        log.critical("failed: %s", failure.exc_value, exc_info=failure.exc_value)
        failures.append(failure.exc_value)
        stopped.set()

    threading.excepthook = fail
    return failures


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise CommandError(f"'{address}' is no HOST:PORT to listen on, such as 127.0.0.1:{_PORT}")
    return host.strip("[]"), int(port)


def _monitor(host: str, port: int, controller: Controller) -> Monitor:
    try:
        return Monitor(host, port, controller.metrics, controller.what_lacks)
    except OSError as error:
        raise CommandError(f"cannot listen on {host}:{port}: {error}") from None


if __name__ == "__main__":
    end_with_supervisor()
    main()
