"""The proxy in front of a function, "queue-proxy-like": an nginx that streams requests and answers through."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lifl_bench.broker.parts import program
from lifl_bench.broker.tuning import Tuning
from lifl_bench.service import START_SECONDS, Service

_ATTEMPTS: Final = 5
_LOOK_EVERY_S: Final = 0.005
_CONFIGURATION: Final = """{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {directory}/client;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    client_max_body_size 0;
    {buffer}
    client_body_timeout 3600s;
    send_timeout 3600s;
    keepalive_timeout 3600s;
    keepalive_requests 1000000;
    upstream function {{
        server 127.0.0.1:{upstream};
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://function;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_read_timeout 3600s;
            proxy_send_timeout 3600s;
        }}
    }}
}}
"""


def configuration(directory: Path, tuning: Tuning, port: int, upstream: int) -> str:
    """nginx's configuration file."""
    return _CONFIGURATION.format(
        # Workers of a master that is root would become another user, who may not enter the directory.
        user="user root;" if os.geteuid() == 0 else "",
        directory=directory,
        buffer=f"client_body_buffer_size {tuning.sidecar_buffer};" if tuning.sidecar_buffer else "",
        port=port,
        upstream=upstream,
    )


class Sidecar:
    """nginx on a free port, in front of a function's port."""

    def __init__(
        self, name: str, directory: Path, tuning: Tuning, environment: Mapping[str, str], upstream: int
    ) -> None:
        """Start it and wait until it listens. Raises RuntimeError with its log."""
        home = directory.resolve() / name
        home.mkdir(exist_ok=True)
        for attempt in range(1, _ATTEMPTS + 1):
            self.port = _free_port()
            (home / "nginx.conf").write_text(configuration(home, tuning, self.port, upstream))
            nginx = program("nginx", environment)
            command = [nginx, "-p", str(home), "-e", "stderr", "-c", str(home / "nginx.conf")]
            self.service = Service(name, command, environment, directory / f"{name}.log")
            try:
                self._wait_ready()
                return
            except BaseException as error:
                self.service.stop()
                # Between choosing a port and listening on it somebody else may have taken it.
                taken = isinstance(error, RuntimeError) and "Address already in use" in self.service.tail()
                if not taken or attempt == _ATTEMPTS:
                    raise

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self.service.is_running:
                raise self.service.failed("ended")
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            except ConnectionRefusedError:
                time.sleep(_LOOK_EVERY_S)
        raise self.service.failed(f"was not ready within {START_SECONDS:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
