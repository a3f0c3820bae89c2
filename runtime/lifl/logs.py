"""How the processes of the platform write their logs: lines for people, or JSON for what collects logs.

`LIFL_LOG_FORMAT=json` makes each record one line of JSON on standard error: time (RFC 3339, UTC), level, process,
logger, message, and exception where there is one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import Final

FORMAT_VARIABLE: Final = "LIFL_LOG_FORMAT"
"""Environment variable: `text` (the default) or `json`."""


class JsonFormatter(logging.Formatter):
    """One line of JSON for a record."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, without its end."""
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


def is_json() -> bool:
    """Whether logs are for programs."""
    return os.environ.get(FORMAT_VARIABLE, "") == "json"


def configure_logging(process: str, text_format: str, level: int = logging.INFO) -> None:
    """Send what this process logs from `level` on to standard error, in the format that the environment asks for.

    `process` names it in JSON; `text_format` is `logging`'s, for people. Call it once, first.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if is_json() else logging.Formatter(text_format))
    logging.basicConfig(handlers=[handler], level=level)


def say(process: str, message: str) -> None:
    """Write one line to standard error in a process that has no use for loggers."""
    line = _as_json(process, logging.INFO, message) if is_json() else f"{process}: {message}"
    print(line, file=sys.stderr, flush=True)


def report(process: str, error: BaseException) -> None:
    """Write an error that nobody expected to standard error, with its traceback."""
    if is_json():
        print(_as_json(process, logging.ERROR, str(error), error), file=sys.stderr, flush=True)
    else:
        print("".join(traceback.format_exception(error)), file=sys.stderr, end="", flush=True)


def _as_json(process: str, level: int, message: str, error: BaseException | None = None) -> str:
    cause = None if error is None else (type(error), error, error.__traceback__)
    return JsonFormatter(process).format(logging.LogRecord(f"lifl.{process}", level, "", 0, message, None, cause))
