"""LIFL: a lightweight, event-driven serverless platform for federated-learning aggregation.

Everything a function or a client needs is a name of this package. Names are imported when they are first used
(PEP 562), so that `import lifl` costs nothing to a process that needs only one part, and no numpy to most.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifl.aggregate import Aggregate, GatheredUpdates, ModelUpdate
    from lifl.client import Client, GlobalModel, Submission
    from lifl.errors import (
        Busy,
        InvalidFunction,
        InvalidInput,
        InvalidModel,
        InvalidProject,
        LiflError,
        ProtocolError,
        Refused,
        Unavailable,
    )
    from lifl.function import AggregatorFunction, aggregator, load_function
    from lifl.server_optimizer import FedAdagrad, FedAdam, FedAvgM, FedYogi, ServerOptimizer

__version__ = "0.1.0"

__all__ = [
    "Aggregate",
    "AggregatorFunction",
    "Busy",
    "Client",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "GatheredUpdates",
    "GlobalModel",
    "InvalidFunction",
    "InvalidInput",
    "InvalidModel",
    "InvalidProject",
    "LiflError",
    "ModelUpdate",
    "ProtocolError",
    "Refused",
    "ServerOptimizer",
    "Submission",
    "Unavailable",
    "__version__",
    "aggregator",
    "load_function",
]

_MODULES = {
    "lifl.aggregate": ("Aggregate", "GatheredUpdates", "ModelUpdate"),
    "lifl.client": ("Client", "GlobalModel", "Submission"),
    "lifl.errors": (
        "Busy",
        "InvalidFunction",
        "InvalidInput",
        "InvalidModel",
        "InvalidProject",
        "LiflError",
        "ProtocolError",
        "Refused",
        "Unavailable",
    ),
    "lifl.function": ("AggregatorFunction", "aggregator", "load_function"),
    "lifl.server_optimizer": ("FedAdagrad", "FedAdam", "FedAvgM", "FedYogi", "ServerOptimizer"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'lifl' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
