"""What things cost on a node: seconds of CPU, rates and delays, from measurements.

Every cost says where it comes from. The defaults are those of `docs/performance.md` (2 cores of an AMD EPYC,
Zen 5); `calibration` measures the cheap ones anew, and a JSON file keeps them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from lifl.cli.common import CommandError

FORMAT: Final = "lifl-simulation-costs/1"
_LARGEST: Final = 1e6


_CALIBRATED: Final = (
    "func simulate --calibrate on 2 cores of an AMD EPYC: lifl_gateway.coordinator over loopback, caches cold"
)


def _cost(default: float, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Costs:
    """Costs of one kind of machine; GB are 10^9 bytes of model updates."""

    receive_s_per_gb: float = _cost(
        0.113, "CPU s/GB", "docs/performance.md, A round: gateway 100 ms for 16 x 44.7 MB, less 1.2 ms an upload"
    )
    """The gateway receives an update into its slot."""
    upload_s: float = _cost(0.0012, "CPU s", "docs/performance.md: Flask, two questions, one descriptor")
    """The gateway's work for each upload, whatever its size; one after another, for it is one Python process."""
    send_s_per_gb: float = _cost(
        0.12, "CPU s/GB", "docs/performance.md, A round: clients 90 ms for 16 x 44.7 MB, less 0.27 ms for each"
    )
    """A client sends an update; counts only where clients share the nodes' cores."""
    flow_gb_per_s: float = _cost(4.7, "GB/s", "docs/performance.md: 233 MB in 50 ms, one sendall, one recv_into")
    """One connection with nothing else running."""
    peer_send_s_per_gb: float = _cost(0.036, "CPU s/GB", "sendfile over loopback, prototypes; not of this release")
    """A gateway sends a partial aggregate or a model to another node."""
    peer_receive_s_per_gb: float = _cost(
        0.2, "CPU s/GB", "recv_into over loopback, prototypes; not of this release"
    )
    """A gateway receives it, and checks its sum."""
    fold_s_per_gb: float = _cost(
        0.045, "CPU s/GB read", "docs/performance.md, A round: workers 40 ms for 16 updates in 20 reads of 44.7 MB"
    )
    """A worker reads an update, a partial aggregate or its own old sums in a pass."""
    start_s: float = _cost(0.004, "CPU s", "docs/performance.md, Starting: 2.5 ms to the first line, then joining")
    """A zygote forks a worker and it joins."""
    hop_s: float = _cost(0.00006, "s", "docs/performance.md, The descriptor: round trip 57.6 us on two cores")
    """A descriptor reaches a worker that sleeps."""
    request_s: float = _cost(0.0005, "CPU s", _CALIBRATED)
    """The coordinator answers one HTTP request of a node: Flask, a commit, a long poll."""
    message_s: float = _cost(0.000012, "CPU s", _CALIBRATED)
    """The coordinator deals with one of the messages in a request."""
    node_request_s: float = _cost(0.00022, "CPU s", _CALIBRATED)
    """A node asks the coordinator and hears the answer, over HTTP."""
    redirect_s: float = _cost(0.00078, "CPU s", _CALIBRATED)
    """A gateway sends a client that has just connected on to another node, where it asks again (`client_s`)."""
    client_s: float = _cost(0.00027, "CPU s", _CALIBRATED)
    """A client connects and sends a request, but for its bytes; counts only where it shares the nodes' cores."""
    latency_s: float = _cost(0.0002, "s", "assumed: there and back on a local network")
    """A question to the coordinator and its answer, apart from the work."""
    checkpoint_s_per_gb: float = _cost(
        0.2, "CPU s/GB", "docs/performance.md, A round: coordinator 11 ms, mostly this"
    )
    """The model is written to disk behind the round; costs CPU, delays nothing."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where costs come from that are not the defaults."""

    def __post_init__(self) -> None:
        for each in _cost_fields():
            value = getattr(self, each)
            if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= _LARGEST):
                raise ValueError(f"{each} has to be a number from 0 to {_LARGEST:g}, not {value!r}")
        if not self.flow_gb_per_s:
            raise ValueError("flow_gb_per_s has to be more than 0")

    def measured(self, source: str, **values: float) -> Costs:
        """The same with other values, which come from `source`."""
        return replace(self, **values, sources={**self.sources, **dict.fromkeys(values, source)})

    def source(self, name: str) -> str:
        """Where a cost comes from."""
        return self.sources.get(name) or str(_metadata(name)["source"])


def _cost_fields() -> list[str]:
    return [each.name for each in fields(Costs) if "unit" in each.metadata]


def _metadata(name: str) -> Mapping[str, Any]:
    return next(each.metadata for each in fields(Costs) if each.name == name)


def to_document(costs: Costs) -> dict[str, Any]:
    """The costs for a JSON file: of each its value, unit and source."""
    return {
        "format": FORMAT,
        "costs": {
            name: {"value": getattr(costs, name), "unit": _metadata(name)["unit"], "source": costs.source(name)}
            for name in _cost_fields()
        },
    }


def of_document(document: Any) -> Costs:
    """The inverse of `to_document`; costs that are not named keep their defaults. Raises ValueError."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    given = document.get("costs")
    if not isinstance(given, dict) or not all(isinstance(one, dict) and "value" in one for one in given.values()):
        raise ValueError("its costs are no objects with a value")
    unknown = sorted(set(given) - set(_cost_fields()))
    if unknown:
        raise ValueError(f"it has costs that are not known: {', '.join(unknown)}")
    sources = {name: str(one.get("source", "")) for name, one in given.items()}
    return Costs(**{name: one["value"] for name, one in given.items()}, sources=sources)


def read_costs(path: Path) -> Costs:
    """The costs of a JSON file. Raises CommandError if it cannot be read or used."""
    hint = ("func simulate --calibrate costs.json", "measures costs and writes such a file")
    try:
        return of_document(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CommandError(
            f"the costs '{path}' cannot be read: {(error.strerror or str(error)).lower()}", [hint]
        ) from None
    except (ValueError, TypeError) as error:
        raise CommandError(f"the costs '{path}' cannot be used: {error}", [hint]) from None


def write_costs(costs: Costs, path: Path) -> None:
    """Write the costs as a JSON file. Raises CommandError if that fails."""
    try:
        path.write_text(json.dumps(to_document(costs), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"the costs cannot be written to '{path}': {(error.strerror or '').lower()}") from None
