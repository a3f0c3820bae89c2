"""The `@aggregator` decorator, and loading the files that use it.

A function file is the unit of deployment: the zygote of a node loads it to fold from shared memory, and Knative's
Python scaffolding imports `new` from it to answer CloudEvents over HTTP. Nothing in the file says which.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import update_wrapper
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast, overload

from lifl.errors import InvalidFunction
from lifl.server_optimizer import ServerOptimizer

if TYPE_CHECKING:
    import os

    from lifl.aggregate import Aggregate, GatheredUpdates, ModelUpdate

    StreamingFunction = Callable[[Aggregate, ModelUpdate], None]
    GatheringFunction = Callable[[GatheredUpdates], None]
    AnyFunction = StreamingFunction | GatheringFunction
    Scope = Mapping[str, Any]
    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]


class FunctionInstance(Protocol):
    """An instance in Knative's Python function contract, as `new()` returns it."""

    async def handle(
        self, scope: Mapping[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        """Answer one ASGI request."""
        ...

    def start(self, cfg: Mapping[str, str]) -> None:
        """Take the settings from a copy of the environment, once, before the first request."""
        ...

    def stop(self) -> None:
        """Let go of everything; no request comes after it."""
        ...

    def alive(self) -> tuple[bool, str]:
        """Whether the instance works, and what to say about it."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether the instance takes requests, and what to say about it."""
        ...


class AggregatorFunction:
    """A function that `@aggregator` has marked; call it as the function it wraps.

    `name` is what jobs and the command line call it, `gather` tells whether it wants all updates at once, and
    `server_optimizer` the step at the top, or None. `doc` is the first paragraph of its docstring.
    """

    def __init__(
        self,
        function: AnyFunction,
        *,
        gather: bool = False,
        server_optimizer: ServerOptimizer | None = None,
        name: str | None = None,
    ) -> None:
        _check_signature(function, gather)
        if server_optimizer is not None and not isinstance(server_optimizer, ServerOptimizer):
            raise TypeError(
                f"server_optimizer must have state_names, step and describe, which {server_optimizer!r} has not"
            )
        update_wrapper(self, function)
        self.function = function
        self.name: str = name or function.__name__
        self.gather = gather
        self.server_optimizer = server_optimizer
        self.doc: str = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())

    def __call__(self, *arguments: Any) -> None:
        cast(Callable[..., None], self.function)(*arguments)

    def __repr__(self) -> str:
        optimizer = f" with {self.server_optimizer.describe()}" if self.server_optimizer else ""
        return f"<{'gathering' if self.gather else 'streaming'} aggregator {self.name}{optimizer}>"

    def new(self) -> FunctionInstance:
        """Return a fresh instance that answers this function over HTTP, without any state of other instances."""
        from lifl.http_function import HttpFunction

        return HttpFunction(self)


def _check_signature(function: AnyFunction, gather: bool) -> None:
    """Raise TypeError unless `function` can be called as the platform will call it."""
    wanted = ("updates",) if gather else ("total", "update")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"@aggregator functions are plain functions, but {function.__name__} is async")
    try:
        inspect.signature(function).bind(*wanted)
    except TypeError:
        form = f"@aggregator(gather=True) needs {function.__name__}(updates)"
        if not gather:
            form = f"@aggregator needs {function.__name__}(total, update); with gather=True it is one argument"
        raise TypeError(f"{form}, not {function.__name__}{inspect.signature(function)}") from None


@overload
def aggregator(function: StreamingFunction, /) -> AggregatorFunction: ...


@overload
def aggregator(
    *, gather: bool = False, server_optimizer: ServerOptimizer | None = None, name: str | None = None
) -> Callable[[AnyFunction], AggregatorFunction]: ...


def aggregator(
    function: AnyFunction | None = None,
    /,
    *,
    gather: bool = False,
    server_optimizer: ServerOptimizer | None = None,
    name: str | None = None,
) -> AggregatorFunction | Callable[[AnyFunction], AggregatorFunction]:
    """Make a function an aggregator; to be used bare or with arguments.

    A streaming function `f(total, update)` is called once for each update and adds it to `total` or leaves it out.
    It must not depend on the order of the updates nor keep one. With `gather=True` the function is `f(updates)`,
    called once a round with all updates. `server_optimizer` steps from the mean to the next model, at the top.

    The module of the first aggregator of a file gets a function `new` as Knative's Python contract asks for,
    unless it has its own. Raises TypeError for a function that cannot be called that way.
    """

    def decorate(function: AnyFunction) -> AggregatorFunction:
        marked = AggregatorFunction(function, gather=gather, server_optimizer=server_optimizer, name=name)

        # The scaffolding looks for a function whose __name__ is exactly "new", so a bound method would not do.
        def new() -> FunctionInstance:
            """Return an instance in Knative's Python function contract."""
            return marked.new()

        namespace = getattr(function, "__globals__", {})
        new.__module__ = function.__module__
        namespace.setdefault("new", new)
        return marked

    return decorate if function is None else decorate(function)


# --- loading -------------------------------------------------------------------------------------------------


class _UncachedLoader(SourceFileLoader):
    """Compiles the file each time: bytecode is cached by the second, and functions are edited and run at once."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def load_function(source: str | os.PathLike[str], name: str | None = None) -> AggregatorFunction:
    """Import the aggregator that a file (`functions/fedavg.py`) or a module (`package.module`) defines.

    A file is imported under a name of its own, so that two files may be called the same; it is compiled anew on
    each call. `name` chooses between several aggregators of one file.
    Raises InvalidFunction with file, line and reason when the file is missing, breaks while it is imported,
    or has no aggregator, not the named one, or several and no `name` was given.
    """
    text = str(source)
    is_path = not isinstance(source, str) or text.endswith(".py") or "/" in text
    module = _import_file(Path(text)) if is_path else _import_module(text)
    return _choose(module, text, name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "does not exist"
        raise InvalidFunction(f"{path}: {what}")
    resolved = str(path.resolve())
    unique = f"lifl_function_{path.stem}_{hashlib.sha256(resolved.encode()).hexdigest()[:12]}"
    loader = _UncachedLoader(unique, resolved)
    spec = spec_from_loader(unique, loader)
    assert spec is not None
    module = module_from_spec(spec)
    before = sys.modules.get(unique)
    sys.modules[unique] = module  # dataclasses and typing look modules up there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[unique]
        else:
            sys.modules[unique] = before
        raise _explain(error, str(path), resolved) from error
    return module


def _import_module(dotted: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name and (dotted == error.name or dotted.startswith(f"{error.name}.")):
            raise InvalidFunction(
                f"{dotted}: there is no such module; a file is named with its path, such as functions/{dotted}.py"
            ) from error
        raise _explain(error, dotted, None) from error
    except (Exception, SystemExit) as error:
        raise _explain(error, dotted, None) from error


def _explain(error: BaseException, shown: str, resolved: str | None) -> InvalidFunction:
    """Say where in the function's file an error came up and what it was."""
    if isinstance(error, SyntaxError) and (resolved is None or error.filename == resolved):
        return InvalidFunction(f"{error.filename if resolved is None else shown}:{error.lineno}: {error.msg}")
    line, place = 0, shown
    frame = error.__traceback__
    while frame is not None:
        filename = frame.tb_frame.f_code.co_filename
        if filename == resolved:
            line = frame.tb_lineno
        elif resolved is None and "importlib" not in filename and filename != __file__:
            line, place = frame.tb_lineno, filename
        frame = frame.tb_next
    where = f"{place}:{line}" if line else place
    return InvalidFunction(f"{where}: {type(error).__name__}: {error}")


def _choose(module: ModuleType, shown: str, name: str | None) -> AggregatorFunction:
    found: dict[int, tuple[str, AggregatorFunction]] = {}
    for attribute, value in vars(module).items():
        if isinstance(value, AggregatorFunction):
            found.setdefault(id(value), (attribute, value))
    # What a file imports from another is its own only if it defines nothing.
    own = [item for item in found.values() if item[1].__module__ == module.__name__] or list(found.values())
    if name is not None:
        matching = [function for attribute, function in own if name in (function.name, attribute)]
        if matching:
            return matching[0]
    names = ", ".join(sorted(function.name for _, function in own))
    if not own:
        raise InvalidFunction(f"{shown}: defines no @aggregator function")
    if name is not None:
        raise InvalidFunction(f"{shown}: has no aggregator {name!r}, only {names}")
    if len(own) > 1:
        raise InvalidFunction(f"{shown}: defines several aggregators ({names}); say which one by its name")
    return own[0][1]
