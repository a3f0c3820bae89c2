"""The error tree of LIFL: one class for each failure a caller can act on.

LiflError
|-- InvalidInput            what was given can never be accepted as it is
|   |-- InvalidModel        safetensors bytes that break the format or the job's model
|   |-- InvalidFunction     a function file that cannot be loaded
|   `-- InvalidProject      a func.yaml that cannot be used
|       `-- MissingProject  there is no func.yaml
|-- Refused                 the platform said no; `status` and `detail` say why (RFC 9457)
|   `-- Busy                the same request may succeed after `retry_after` seconds
|-- Unavailable             nobody answered: not started, or gone
`-- ProtocolError           a peer broke the descriptor or control protocol
"""

from __future__ import annotations


class LiflError(Exception):
    """Base of every error that LIFL raises on purpose."""


class InvalidInput(LiflError, ValueError):
    """The input can never be accepted as it is; the text says what, where and what to do."""


class InvalidModel(InvalidInput):
    """A safetensors payload that breaks the format, or does not fit the job's model."""


class InvalidFunction(InvalidInput):
    """A function file that cannot be loaded, or that defines no `@aggregator`."""


class InvalidProject(InvalidInput):
    """A func.yaml that is missing or unusable."""


class MissingProject(InvalidProject):
    """There is no func.yaml where one was looked for."""


class Refused(LiflError):
    """The platform refused a request.

    `status` is the HTTP status, `title` a short constant phrase, `detail` what happened here.
    """

    def __init__(self, status: int, title: str, detail: str = "") -> None:
        super().__init__(f"{title}: {detail}" if detail else title)
        self.status = status
        self.title = title
        self.detail = detail


class Busy(Refused):
    """The platform is full just now; ask again after `retry_after` seconds."""

    def __init__(self, title: str, detail: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(503, title, detail)
        self.retry_after = retry_after


class Unavailable(LiflError, ConnectionError):
    """Nobody answered at the address: not started yet, or gone."""


class ProtocolError(LiflError):
    """A peer broke the descriptor or the control protocol."""
