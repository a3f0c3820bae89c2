"""What the coordinator says of functions, and the long poll that asks it."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from lifl.cli.common import CommandError

_WAIT_SECONDS: Final = 50.0
"""Longest wait for a change: below what proxies between usually allow."""
_SLACK_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 15.0
_MOST_ANSWER_BYTES: Final = 64 << 20

log = logging.getLogger("lifl.autoscaler")


@dataclass(frozen=True)
class Need:
    """What there is to know of one function."""

    wanted: int
    """Pods that there should be."""
    keep: frozenset[str] = frozenset()
    """Nodes whose pods should be the last to end: with updates first of all, then those of the plan."""
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that was heard from the coordinator. One that is not current is not acted upon."""

    needs: Mapping[str, Need] = field(default_factory=dict)
    """By function."""
    problem: str = "the coordinator has not been asked yet"
    """Why it is not current; empty if it is."""

    @property
    def is_current(self) -> bool:
        """Whether it is what the coordinator says now."""
        return not self.problem

    def need_of(self, function: str) -> Need | None:
        """What a function is needed for; None if that is not known now. What nobody mentions nobody needs."""
        return self.needs.get(function, Need(0)) if self.is_current else None


def parse_answer(data: bytes) -> tuple[int, dict[str, Need]]:
    """Version and needs of `GET /v1/functions`; raises ValueError for what is none."""
    try:
        answer = json.loads(data)
        needs = {
            str(entry["function"]): Need(
                int(entry["wanted"]),
                frozenset(map(str, entry["busy"] or entry["needed_on"])),
                tuple(map(str, entry["jobs"])),
            )
            for entry in answer["functions"]
        }
        version = int(answer["version"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the coordinator's answer makes no sense: {error!r}") from error
    if any(need.wanted < 0 for need in needs.values()):
        raise ValueError("the coordinator's answer makes no sense: it wants fewer pods than none")
    return version, needs


def read_token(path: Path | None) -> str:
    """The operator's token: of the line for `*` in a token file, or the file's one word. Raises CommandError."""
    if path is None:
        return ""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"the token file '{path}' cannot be read: {error}") from None
    lines = [words for words in lines if not words[0].startswith("#")]
    if len(lines) == 1 and len(lines[0]) == 1:
        return lines[0][0]
    for words in lines:
        if len(words) == 2 and words[0] == "*":
            return words[1]
    raise CommandError(f"the token file '{path}' has no operator's token: a line '* TOKEN', or the token alone")


class PlanFeed:
    """Asks the coordinator for changes, in a thread, and calls `on_plan` with each plan."""

    def __init__(self, coordinator: str, token_file: Path | None, on_plan: Callable[[Plan], None]) -> None:
        """`coordinator` is its base URL; the token is read anew for each attempt, for it may be replaced.

        Raises CommandError when the URL is none, or there is no token in the file.
        """
        url = urlsplit(coordinator)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise CommandError(f"'{coordinator}' is no URL of a coordinator, such as http://10.0.0.1:7070")
        read_token(token_file)
        self._url = coordinator.rstrip("/")
        self._token_file = token_file
        self._on_plan = on_plan
        self._plan = Plan()
        self._version = -1

    def start(self) -> None:
        """Start the thread; it ends with the process."""
        threading.Thread(target=self._run, name="plan", daemon=True).start()

    def _run(self) -> None:
        import urllib3
        import urllib3.exceptions

        pool = urllib3.PoolManager(maxsize=1, retries=False)
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                self._ask(pool)
                pause = _FIRST_PAUSE_SECONDS
                continue
            except (urllib3.exceptions.HTTPError, OSError, ValueError, CommandError) as error:
                problem = f"{self._url}: {error}"
            if problem != self._plan.problem:
                log.warning("the plan is not known: %s", problem)
                self._take(Plan(self._plan.needs, problem))
            time.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _ask(self, pool: Any) -> None:
        """One request; raises OSError, ValueError, urllib3's HTTPError or CommandError."""
        import urllib3

        token = read_token(self._token_file)
        # The first answer after trouble must not keep us waiting for a change.
        wait = _WAIT_SECONDS if self._plan.is_current else 0.0
        response = pool.request(
            "GET",
            f"{self._url}/v1/functions",
            fields={"wait": f"{wait:g}", **({"version": str(self._version)} if self._version >= 0 else {})},
            headers={"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}),
            timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=wait + _SLACK_SECONDS),
            preload_content=False,
        )
        try:
            data = response.read(_MOST_ANSWER_BYTES)
        finally:
            response.release_conn()
        if response.status != 200:
            raise ValueError(_refusal(response.status, data))
        version, needs = parse_answer(data)
        if version != self._version or not self._plan.is_current:
            self._version = version
            self._take(Plan(needs, ""))

    def _take(self, plan: Plan) -> None:
        if plan.is_current and self._plan.problem and self._plan.needs:
            log.info("the coordinator answers again")
        self._plan = plan
        self._on_plan(plan)


def _refusal(status: int, data: bytes) -> str:
    if status in (401, 403):
        return f"the coordinator does not take the token for an operator's (HTTP {status}); see --token-file"
    if status == 404:
        return "what answers there is no coordinator of this version (HTTP 404)"
    return f"HTTP {status}: {data[:200].decode(errors='replace')}"
