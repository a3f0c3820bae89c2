"""What others see of the autoscaler: /healthz, /readyz and /metrics over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_TEXT_TYPE: Final = "text/plain; charset=utf-8"
_REQUEST_SECONDS: Final = 5.0


class Metrics:
    """The metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        place = ["namespace", "name", "function"]
        self.wanted = self._gauge(
            "wanted_pods", "Pods that the coordinator's plan has for a function", ["function"]
        )
        self.unserved = self._gauge(
            "unserved_pods", "Pods that the plan has for a function that no Service is there for", ["function"]
        )
        self.desired = self._gauge("desired_pods", "Pods that a PodAutoscaler is to have", place)
        self.ready = self._gauge("ready_pods", "Pods of a PodAutoscaler that are ready", place)
        self.is_plan_known = self._gauge("plan_known", "1 while the coordinator answers", [])
        self.scalings = self._counter("scalings", "Changes of a Deployment's scale", ["direction"])
        self.errors = self._counter("errors", "Writes that the API server did not take", [])
        self.passes = self._counter("passes", "Times that all PodAutoscalers were looked at", [])

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"lifl_autoscaler_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"lifl_autoscaler_{name}", text, labels, registry=self.registry)


class Monitor:
    """Serves HTTP in a thread. Constructing it binds the port, or raises OSError."""

    def __init__(self, host: str, port: int, metrics: Metrics, what_lacks: Callable[[], str]) -> None:
        """`what_lacks` says why the autoscaler does not work, and is empty when it does."""
        self._server = ThreadingHTTPServer((host, port), _handler(metrics, what_lacks))
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """HOST:PORT."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def start(self) -> None:
        """Start the thread; it ends with the process."""
        threading.Thread(target=self._server.serve_forever, name="monitor", daemon=True).start()


def _handler(metrics: Metrics, what_lacks: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_SECONDS

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/healthz":
                    self._answer(200, "ok\n")
                case "/readyz":
                    lacks = what_lacks()
                    self._answer(503 if lacks else 200, f"{lacks or 'ok'}\n")
                case "/metrics":
                    self._answer(200, generate_latest(metrics.registry), _METRICS_TYPE)
                case _:
                    self._answer(404, "there are /healthz, /readyz and /metrics\n")

        def _answer(self, status: int, body: str | bytes, kind: str = _TEXT_TYPE) -> None:
            data = body if isinstance(body, bytes) else body.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Probes come all the time."""

    return Handler
