"""The coordinator as a service for many threads: one lock, group commit, long polls, and what goes on behind.

Every call acts on the coordinator under the lock, and returns when all that its answer may depend on is in the
journal. Three kinds of threads work by themselves, and sleep while there is nothing to do: one ends leases and
rounds when their time has come, some fetch models to store them, one compacts rounds that are over.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from lifl.cluster.checkpoints import CheckpointStore, FetchModel, sync_file
from lifl.cluster.coordinator import CheckpointTask, ClusterCoordinator
from lifl.cluster.function_needs import FunctionNeed
from lifl.cluster.group_commit import GroupCommit
from lifl.cluster.journal import UpdateRecord
from lifl.cluster.members import Expired, Member
from lifl.cluster.messages import Answers, Leave, MemberMessages, Orders, OrdersRequest, Register, Registered
from lifl.cluster.sharded_job import ShardedJob
from lifl.errors import LiflError, Refused
from lifl.messages import JobSpec, JobState
from lifl.model_layout import parse_header
from lifl.shards import describe_shards, plan_shards, shard_name

log = logging.getLogger("lifl.coordinator")

T = TypeVar("T")

_FETCHING_THREADS: Final = 2
_RETRY_SECONDS: Final = 1.0
"""After a model could not be fetched."""
_OVERSLEPT_SECONDS: Final = 1.0
"""Waking so much later than asked for, the process was stopped and could not have heard its members."""
_STOP_SECONDS: Final = 5.0
_IS_FETCHED: Final = float("inf")
"""In place of the time at which a model may be fetched: one of the threads is at it."""


class ClusterService:
    """Runs a coordinator; all methods may be called from any thread."""

    def __init__(
        self,
        coordinator: ClusterCoordinator,
        store: CheckpointStore,
        fetch: FetchModel,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_failure` is called once when the journal cannot be written: the process has to end then."""
        self.coordinator = coordinator
        self.store = store
        self._fetch = fetch
        self._on_failure = on_failure
        self._commits = GroupCommit(coordinator.journal)
        self._lock = threading.Lock()
        self._polls: dict[str, threading.Condition] = {}
        """Who waits for orders, by incarnation; all conditions are of the one lock."""
        self._timer = threading.Condition(self._lock)
        self._timer_due: float | None = None
        self._models = threading.Condition(self._lock)
        """Who waits for another model of any job."""
        self._functions = threading.Condition(self._lock)
        """Who waits for functions to be needed elsewhere."""
        self._function_polls = 0
        self._fetching = threading.Condition(self._lock)
        self._fetched: dict[str, float] = {}
        """Jobs whose model is being fetched, or when it may be tried again."""
        self._old_rounds = threading.Condition(self._lock)
        self._ended_rounds = -1
        self._shards: dict[str, tuple[int, list[dict[str, Any]]]] = {}
        """What clients are told of each sharded job, with the journal's key of its first shard."""
        self._is_stopping = False
        self._threads = [
            threading.Thread(target=self._run_timer, name="timer", daemon=True),
            threading.Thread(target=self._run_compaction, name="compaction", daemon=True),
            *(
                threading.Thread(target=self._run_fetching, name="checkpoints", daemon=True)
                for _ in range(_FETCHING_THREADS)
            ),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Answer whoever waits, end the threads, commit what is left and close the journal.

        Called when no request is being answered any more, but for long polls.
        """
        self.release()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_STOP_SECONDS)
        with self._lock:
            ticket = self._finish()
        with contextlib.suppress(LiflError):
            self._commits.wait(ticket)
        self.coordinator.journal.close()

    def release(self) -> None:
        """Let long polls be answered at once from now on, and the threads end."""
        with self._lock:
            self._is_stopping = True
            waiting = (self._timer, self._models, self._functions, self._fetching, self._old_rounds)
            for condition in (*waiting, *self._polls.values()):
                condition.notify_all()

    # --- calls -----------------------------------------------------------------------------------------------

    def call(self, act: Callable[[ClusterCoordinator, float], T]) -> T:
        """Do something with the coordinator; returns when it is in the journal. Raises what `act` raises."""
        try:
            with self._lock:
                try:
                    return act(self.coordinator, time.monotonic())
                finally:
                    ticket = self._finish()
        finally:
            self._wait(ticket)

    def _wait(self, ticket: int) -> None:
        try:
            self._commits.wait(ticket)
        except LiflError:
            log.critical("the journal cannot be written: %s", self._commits.failure)
            self._on_failure()
            raise

    def _finish(self) -> int:
        """After each change, under the lock: hand the changes over, and wake whom they concern."""
        coordinator = self.coordinator
        has_changes = coordinator.journal.has_changes
        ticket = self._commits.add(coordinator.journal.take() if has_changes else [])
        self._wake()
        # A job that a client has woken up changes nothing in the journal, but will be idle again.
        due = coordinator.next_timer(time.monotonic()) if has_changes or coordinator.members.do_attach else None
        if due is not None and (self._timer_due is None or due < self._timer_due):
            self._timer.notify_all()
        if not has_changes:
            return ticket
        # Also for one whose last attempt failed: if it had nothing to store after that, nobody waits to try again.
        if any(self._fetched.get(task.job, 0.0) < _IS_FETCHED for task in coordinator.checkpoint_tasks()):
            self._fetching.notify_all()
        if self._ended_rounds != coordinator.jobs.ended_rounds:
            self._old_rounds.notify_all()
        return ticket

    def _wake(self) -> None:
        if self._function_polls:
            needs = self.coordinator.jobs.needs
            before = needs.version
            needs.describe()
            if needs.version != before:
                self._functions.notify_all()
        woken = self.coordinator.news.take()
        if woken is None:
            self._models.notify_all()
            for condition in self._polls.values():
                condition.notify_all()
            return
        for incarnation in woken:
            waiting = self._polls.get(incarnation)
            if waiting is not None:
                waiting.notify_all()

    # --- members ---------------------------------------------------------------------------------------------

    def register(self, request: Register) -> Registered:
        """Make a node a member; raises Expired or Refused 422."""
        return self.call(lambda coordinator, now: coordinator.register(request, now))

    def leave(self, name: str, request: Leave) -> None:
        """A node ends."""
        self.call(lambda coordinator, now: coordinator.leave(name, request, now))

    def answer(self, name: str, request: MemberMessages, arrived: float) -> Answers:
        """Act on a member's messages; raises Expired."""
        answers = self.call(lambda coordinator, now: coordinator.answer(name, request, arrived, now))
        return Answers(tuple(answers))

    def orders(self, name: str, request: OrdersRequest, arrived: float) -> Orders:
        """What is new for a member, as soon as there is something or its time is over; raises Expired."""
        coordinator = self.coordinator
        until = arrived + min(request.wait, coordinator.heartbeat_seconds)
        try:
            with self._lock:
                ticket = 0
                try:
                    member = coordinator.note_request(name, request, arrived, time.monotonic())
                    ticket = self._finish()
                    return self._await_orders(member, until)
                except Expired:
                    self._polls.pop(request.incarnation, None)
                    raise
                finally:
                    ticket = max(ticket, self._finish())
        finally:
            self._wait(ticket)

    def _await_orders(self, member: Member, until: float) -> Orders:
        polls, incarnation = self._polls, member.incarnation
        while True:
            found = self.coordinator.orders(member)
            left = until - time.monotonic()
            if found is not None or left <= 0 or self._is_stopping:
                return found or self.coordinator.no_orders(member)
            condition = polls.setdefault(incarnation, threading.Condition(self._lock))
            condition.wait(left)
            if not member.is_member:
                raise Expired("the lease ended while the request waited")

    # --- functions ---------------------------------------------------------------------------------------------

    def functions(self, known: int, seconds: float) -> tuple[int, tuple[FunctionNeed, ...]]:
        """Which functions are needed where, and the version of that.

        Waits while it is the version that is `known`, at most so many seconds.
        """
        until = time.monotonic() + seconds
        with self._lock:
            needs = self.coordinator.jobs.needs
            self._function_polls += 1
            try:
                while True:
                    found = needs.describe()
                    left = until - time.monotonic()
                    if needs.version != known or left <= 0 or self._is_stopping:
                        break
                    self._functions.wait(left)
            finally:
                self._function_polls -= 1
            version, ticket = needs.version, self._finish()
        self._wait(ticket)
        return version, found

    # --- jobs ------------------------------------------------------------------------------------------------

    def create_job(self, spec: JobSpec) -> JobState:
        """Make a job and the directory for its models; raises Refused 409 or 422."""

        def act(coordinator: ClusterCoordinator, now: float) -> JobState:
            is_new = not coordinator.jobs.has(spec.name)
            state = coordinator.create_job(spec)
            for directory in _directories(spec) if is_new else ():
                self.store.make_room(directory)
            return state

        return self.call(act)

    def delete_job(self, name: str) -> None:
        """Stop a job; its models are kept under another name. Raises Refused 404."""

        def delete(coordinator: ClusterCoordinator, now: float) -> JobSpec:
            spec = coordinator.requests.describe(name).spec
            coordinator.delete_job(name)
            return spec

        def put_away(coordinator: ClusterCoordinator, now: float) -> None:
            if not coordinator.jobs.has(name):
                for directory in _directories(spec):
                    self.store.retire(directory)

        spec = self.call(delete)
        self.call(put_away)  # only now: a job that the journal still has needs its models

    def install_model(self, name: str, path: Path) -> JobState:
        """Take over the file of a job's initial model and open round 1; raises Refused 404 or 409."""

        def act(coordinator: ClusterCoordinator, now: float) -> JobState:
            job = coordinator.require_no_model(name)
            self.store.adopt(path, name)
            return coordinator.model_installed(name, job.nonce, now)

        job = self.call(lambda coordinator, now: coordinator.require_no_model(name))
        if isinstance(job, ShardedJob):
            return self._install_shards(job.spec, path)
        sync_file(path)
        return self.call(act)

    def _install_shards(self, spec: JobSpec, path: Path) -> JobState:
        """Cut the initial model and begin all shards in one commit."""

        def act(coordinator: ClusterCoordinator, now: float) -> JobState:
            job = coordinator.require_no_model(spec.name)
            if not isinstance(job, ShardedJob) or job.spec != spec:
                raise Refused(409, "another job", f"job {spec.name!r} is another one now")
            self.store.adopt_shards(spec.name, header, parts)
            return coordinator.model_installed(spec.name, job.nonce, now)

        try:
            header, parts = self.store.split(path, spec.shards)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Refused(507, "Insufficient Storage", "the state directory is full") from error
            raise
        try:
            return self.call(act)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    def updates_of(self, name: str, number: int, offset: int, most: int) -> tuple[str, list[UpdateRecord], int]:
        """Status of a round, its updates from `offset` on, and how many it has. Raises Refused 404."""

        def find(coordinator: ClusterCoordinator, now: float) -> tuple[int, str]:
            status = coordinator.requests.describe_round(name, number).status
            sharded = coordinator.jobs.sharded.by_name.get(name)
            # The updates of all shards are the same; the first tells of its own nodes.
            return coordinator.jobs.round_key(sharded.shards[0].name if sharded else name, number), status

        key, status = self.call(find)
        records, total = self.coordinator.journal.record_of(key, offset, most)
        return status, records, total

    # --- time ------------------------------------------------------------------------------------------------

    def _run_timer(self) -> None:
        while True:
            with self._lock:
                if not self._sleep_until_due():
                    return
                self.coordinator.tick(time.monotonic())
                ticket = self._finish()
            with contextlib.suppress(LiflError):
                self._wait(ticket)

    def _sleep_until_due(self) -> bool:
        """Wait, with the lock, until something is due; False when the service stops."""
        while not self._is_stopping:
            now = time.monotonic()
            due = self._timer_due = self.coordinator.next_timer(now)
            if due is not None and due <= now:
                return True
            asked = None if due is None else due - now
            self._timer.wait(asked)
            if asked is not None and time.monotonic() - now > asked + _OVERSLEPT_SECONDS:
                self.coordinator.members.renew_all(time.monotonic())
        return False

    # --- checkpoints -----------------------------------------------------------------------------------------

    def _run_fetching(self) -> None:
        while True:
            with self._lock:
                task = self._next_task()
            if task is None:
                return
            is_stored = self._store(task)
            with self._lock:
                if is_stored:
                    del self._fetched[task.job]
                else:
                    self._fetched[task.job] = time.monotonic() + _RETRY_SECONDS
                self._fetching.notify_all()

    def _next_task(self) -> CheckpointTask | None:
        """Wait, with the lock, for a model to fetch; None when the service stops."""
        while not self._is_stopping:
            now = time.monotonic()
            tasks = self.coordinator.checkpoint_tasks()
            due = [task for task in tasks if self._fetched.get(task.job, 0.0) <= now]
            if due:
                self._fetched[due[0].job] = _IS_FETCHED
                return due[0]
            times = [when for task in tasks if (when := self._fetched[task.job]) < _IS_FETCHED]
            self._fetching.wait(min(times) - now if times else None)
        return None

    def _store(self, task: CheckpointTask) -> bool:
        try:
            self.store.store(task, self._fetch)
            surplus = self.call(lambda coordinator, now: coordinator.checkpoint_stored(task, now))
            self.store.delete(task.job, surplus or ())
        except Exception as error:  # whatever it is, the next attempt may go well
            log.warning("job %s: the model of round %d was not stored: %s", task.job, task.round, error)
            return False
        return True

    # --- compaction ------------------------------------------------------------------------------------------

    def _run_compaction(self) -> None:
        journal = self.coordinator.journal
        while True:
            with self._lock:
                while self._ended_rounds == self.coordinator.jobs.ended_rounds and not self._is_stopping:
                    self._old_rounds.wait()
                self._ended_rounds = self.coordinator.jobs.ended_rounds
                if self._is_stopping:
                    return
            self._delete_void()
            try:
                for key in journal.rounds_to_compact():
                    if not self._is_stopping:
                        journal.compact(key)
            except sqlite3.Error as error:  # nothing is lost by doing it later
                log.error("rounds that are over were not compacted: %s", error)

    def _delete_void(self) -> None:
        """Delete checkpoints that shards had beyond the round that begins anew, once the journal has it so."""
        with self._lock:
            sharded = self.coordinator.jobs.sharded
            void, sharded.void = sharded.void, []
            ticket = self._finish()
        with contextlib.suppress(LiflError):
            self._wait(ticket)
            with self._lock:
                for name, number in void:
                    job = self.coordinator.jobs.by_name.get(name)
                    # One that is being stored takes the place of the other by itself.
                    if name not in self._fetched and (job is None or number not in job.checkpoints):
                        self.store.delete(name, [number])

    # --- models ----------------------------------------------------------------------------------------------

    def wait_for_model(self, name: str, known: Callable[[int], int], seconds: float) -> int:
        """Wait until a job has another model than the client knows, or is over; at most so many seconds.

        `known` tells from the job's nonce which round's model the client has. Returns the nonce that the job had
        at first. Raises Refused 404.
        """
        until = time.monotonic() + seconds
        with self._lock:
            first = self.coordinator.jobs.find_any(name).nonce
            while not self._is_stopping:
                job = self.coordinator.jobs.find_any(name)
                is_over = job.status in ("complete", "failed", "deleted")
                left = until - time.monotonic()
                if job.nonce != first or job.model_round > known(job.nonce) or is_over or left <= 0:
                    break
                self._models.wait(left)
            ticket = self._finish()
        self._wait(ticket)
        return first

    def stored_model(self, name: str, number: int | None) -> StoredModel:
        """The model that starts a round, or the newest. Raises Refused 404 when there is no such job or model."""

        def find(coordinator: ClusterCoordinator, now: float) -> StoredModel:
            sharded = coordinator.jobs.sharded.by_name.get(name)
            state = coordinator.requests.describe(name)
            if sharded is not None:
                return self._sharded_model(sharded, state, number or sharded.model_round)
            job = coordinator.jobs.find(name)
            wanted = number or job.model_round
            if wanted and wanted in job.checkpoints:
                return StoredModel(state, wanted, (self.store.model_path(name, wanted),))
            holders = job.sources() if wanted and wanted == job.model_round == job.made_round else []
            if not holders:
                raise Refused(404, "no such model", f"the model of round {wanted} is not kept here")
            return StoredModel(state, wanted, address=holders[0].registration.address)

        return self.call(find)

    def _sharded_model(self, sharded: ShardedJob, state: JobState, wanted: int) -> StoredModel:
        if not sharded.has_stored(wanted):
            raise Refused(404, "no such model", f"the model of round {wanted} is not kept here")
        paths = tuple(self.store.model_path(job.name, wanted) for job in sharded.shards)
        return StoredModel(state, wanted, paths, header=self.store.whole_header(sharded.name))

    def shards_of(self, name: str) -> list[dict[str, Any]]:
        """The shards of a job as the API tells them: which part of which tensor goes to which of their jobs.

        Raises Refused 404 when it has none, 409 before it has a model.
        """

        def find(coordinator: ClusterCoordinator, now: float) -> tuple[int, int]:
            job = coordinator.jobs.find_any(name)
            if not isinstance(job, ShardedJob):
                raise Refused(404, "not sharded", f"job {name!r} has no shards")
            if not job.model_round:
                raise Refused(
                    409, "no model yet", f"job {name!r} has no initial model; PUT /v1/jobs/{name}/model first"
                )
            return job.shards[0].key, job.spec.shards

        key, count = self.call(find)
        known = self._shards.get(name)
        if known is None or known[0] != key:
            described = describe_shards(name, plan_shards(parse_header(self.store.whole_header(name)), count))
            known = self._shards[name] = (key, described)
        return known[1]


class StoredModel(NamedTuple):
    """A model: its file, those of its shards, or else a node that has it."""

    state: JobState
    round: int
    """The round that it starts."""
    paths: tuple[Path, ...] = ()
    address: str = ""
    """Base URL of the gateways of that node."""
    header: bytes = b""
    """Of the whole model, if the files are those of its shards."""


def _directories(spec: JobSpec) -> list[str]:
    """What a job has directories for."""
    return [spec.name, *(shard_name(spec.name, index) for index in range(spec.shards) if spec.shards > 1)]
