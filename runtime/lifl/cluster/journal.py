"""The coordinator's journal: one SQLite file in WAL mode from which a restart has the same state again.

Whatever changes the state puts rows into a buffer; `take` hands the buffer over and `commit` writes it as one
transaction. No answer that depends on a change may leave before its commit has returned. Because a commit takes a
batch as it stood at one moment, what a restart finds is the state at such a moment, never half a step.

`synchronous=FULL`: the write-ahead log is on the disk when a commit returns, so an accepted update survives the
loss of power and not only of the process. Measured on a virtual disk: a commit of one update takes 0.23 ms so, and
0.02 ms with NORMAL, which syncs at checkpoints only; of 64 updates 0.30 and 0.09 ms. Connections share commits, so
the price is paid per batch, and an upload takes far longer than it.

Updates are rows of the open round and of the last few complete ones. `compact` puts those of an older round into
one compressed row, out of which `record_of` says for good who took part in a model, where, and with what weight.
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from lifl.cluster.messages import Register, RoundReport
from lifl.errors import InvalidInput
from lifl.messages import JobSpec, RoundState

SCHEMA_VERSION: Final = 1
COUNTED: Final = 1
REJECTED: Final = 2
DROPPED: Final = 3
"""States of an update: it counts, it was not finite, or it was lost with its node."""

KEPT_ROUNDS: Final = 4
"""Complete rounds of a job whose updates stay rows, and whose nodes may still report."""

STATE_NAMES: Final = {COUNTED: "counted", REJECTED: "rejected", DROPPED: "lost"}

_BUSY_SECONDS: Final = 30.0
_COMPACT_ROWS: Final = 20_000
"""Rows deleted in one transaction, so that no other commit waits for long."""

_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE nodes (name TEXT PRIMARY KEY, is_draining INTEGER, calibrate INTEGER) WITHOUT ROWID;
CREATE TABLE members (key INTEGER PRIMARY KEY, name TEXT, incarnation TEXT UNIQUE, state TEXT, body BLOB);
CREATE TABLE functions (name TEXT PRIMARY KEY, is_gathering INTEGER, state_arrays INTEGER) WITHOUT ROWID;
CREATE TABLE failures (member INTEGER, function TEXT, detail TEXT, PRIMARY KEY (member, function)) WITHOUT ROWID;
CREATE TABLE jobs (key INTEGER PRIMARY KEY, name TEXT, spec BLOB, nonce INTEGER, status TEXT, detail TEXT,
    attempt INTEGER, round INTEGER, model_round INTEGER, made_round INTEGER, checkpointed_round INTEGER,
    maker TEXT, is_retired INTEGER);
CREATE TABLE broken (job INTEGER, member INTEGER, detail TEXT, PRIMARY KEY (job, member)) WITHOUT ROWID;
CREATE TABLE holders (job INTEGER, member INTEGER, PRIMARY KEY (job, member)) WITHOUT ROWID;
CREATE TABLE checkpoints (job INTEGER, round INTEGER, PRIMARY KEY (job, round)) WITHOUT ROWID;
CREATE TABLE rounds (key INTEGER PRIMARY KEY, job INTEGER, number INTEGER, attempt INTEGER, status TEXT,
    epoch INTEGER, top TEXT, forgiven INTEGER, late INTEGER, duplicates INTEGER, lost INTEGER, rejected INTEGER,
    opened REAL, first REAL, weight REAL, act REAL);
CREATE INDEX rounds_of_job ON rounds (job, number, attempt);
CREATE TABLE shares (round INTEGER, member INTEGER, is_called INTEGER, is_delivered INTEGER,
    PRIMARY KEY (round, member)) WITHOUT ROWID;
CREATE TABLE updates (round INTEGER, sequence INTEGER, client TEXT, member INTEGER, num_samples REAL,
    state INTEGER, PRIMARY KEY (round, sequence)) WITHOUT ROWID;
CREATE TABLE states (round INTEGER PRIMARY KEY, body BLOB);
CREATE TABLE reports (round INTEGER, member INTEGER, body BLOB, PRIMARY KEY (round, member)) WITHOUT ROWID;
CREATE TABLE records (round INTEGER PRIMARY KEY, body BLOB);
"""


class JobRow(NamedTuple):
    """A job as the journal has it."""

    key: int
    name: str
    spec: bytes
    nonce: int
    status: str
    detail: str
    attempt: int
    round: int
    model_round: int
    made_round: int
    checkpointed_round: int
    maker: str
    is_retired: bool

    def decoded_spec(self) -> JobSpec:
        """The specification."""
        return msgspec.json.decode(self.spec, type=JobSpec)


class RoundRow(NamedTuple):
    """A round as the journal has it."""

    key: int
    job: int
    number: int
    attempt: int
    status: str
    """`open`, `closing`, `complete`; `undone` when its model was lost or it was given up."""
    epoch: int
    top: str
    forgiven: int
    late: int
    duplicates: int
    lost: int
    rejected: int
    opened: float
    first: float
    weight: float
    act: float


class MemberRow(NamedTuple):
    """An incarnation of a node, living or not."""

    key: int
    name: str
    incarnation: str
    state: str
    """`member`, or why not any more: `lost`, `left`, `replaced`."""
    body: bytes
    """Its registration in JSON."""

    def registration(self) -> Register:
        """What the node said when it joined, with its capacity as it was last."""
        return msgspec.json.decode(self.body, type=Register)


class UpdateRecord(NamedTuple):
    """One update of a round, as its record tells."""

    client: str
    node: str
    incarnation: str
    num_samples: float
    status: str
    """`counted`, `rejected` or `lost`."""


Row = JobRow | RoundRow
Batch = list[tuple[str, tuple[Any, ...]]]

_TABLES: Final[dict[type, str]] = {JobRow: "jobs", RoundRow: "rounds"}


def _replace(table: str, columns: int) -> str:
    return f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * columns)})"  # noqa: S608


_COUNT: Final = "INSERT INTO updates VALUES (?, ?, ?, ?, ?, 1)"
_END: Final = "UPDATE updates SET state = ? WHERE round = ? AND sequence = ?"
_ROW_STATEMENTS: Final = {kind: _replace(table, len(kind._fields)) for kind, table in _TABLES.items()}  # type: ignore[attr-defined]


class Journal:
    """The file and the buffer before it.

    The buffer belongs to whoever holds the coordinator's lock; `commit` may run outside of it, one at a time. The
    readers open connections of their own and see what is committed.
    """

    def __init__(self, path: Path, clock: str = "") -> None:
        """`clock` names the monotonic clock that is used; empty if it is none of those before.

        Makes the file if it is missing. Raises InvalidInput when it is of another version or no journal.
        """
        self.path = path
        self._buffer: Batch = []
        self._touched: dict[tuple[str, int], Callable[[], Row]] = {}
        self._connection = self._open()
        try:
            self._prepare(clock)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InvalidInput(f"{path}: no journal of a coordinator: {error}") from error
        except InvalidInput:
            self._connection.close()
            raise

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    def _prepare(self, clock: str) -> None:
        execute = self._connection.execute
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        version = execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
        elif version != SCHEMA_VERSION:
            raise InvalidInput(f"{self.path}: version {version} of the journal; this is version {SCHEMA_VERSION}")
        meta = dict(execute("SELECT name, value FROM meta"))
        self.starts: int = meta.get("starts", 0) + 1
        """How often the journal was opened, this time included."""
        self.clock_goes_on = bool(clock) and meta.get("clock") == clock
        """Moments of the monotonic clock in the journal still mean something."""
        self._next_keys = {
            table: execute(f"SELECT coalesce(max(key), 0) + 1 FROM {table}").fetchone()[0]  # noqa: S608
            for table in ("members", "jobs", "rounds")
        }
        self.commit([(_replace("meta", 2), ("starts", self.starts))])
        # Not before the moments that were told by another clock: they are replaced in the first commit.
        self._buffer.append((_replace("meta", 2), ("clock", clock)))

    def close(self) -> None:
        """Close the file; what is only in the buffer is gone."""
        self._connection.close()

    # --- buffer and commit -----------------------------------------------------------------------------------

    @property
    def has_changes(self) -> bool:
        """Whether there is something to commit."""
        return bool(self._buffer or self._touched)

    def take(self) -> Batch:
        """Take the buffer, with the rows of everything touched as they are at this moment."""
        self._write_touched()
        batch, self._buffer = self._buffer, []
        return batch

    def _write_touched(self) -> None:
        for row in (build() for build in self._touched.values()):
            self._buffer.append((_ROW_STATEMENTS[type(row)], tuple(row)))
        self._touched.clear()

    def commit(self, batch: Batch) -> None:
        """Write a batch as one transaction; on return it is on the disk.

        Raises sqlite3.Error, after which nothing of the batch is there and the process must not go on.
        """
        if not batch:
            return
        with self._transaction(self._connection) as connection:
            for statement, changes in groupby(batch, itemgetter(0)):
                connection.executemany(statement, map(itemgetter(1), changes))

    @staticmethod
    @contextlib.contextmanager
    def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def flush(self) -> None:
        """Commit the buffer now."""
        self.commit(self.take())

    def touch(self, what: tuple[str, int], build: Callable[[], Row]) -> None:
        """Have the row that `build` makes written with the next commit, once however often it is touched."""
        self._touched[what] = build

    def new_key(self, table: str) -> int:
        """A key for a new row of `members`, `jobs` or `rounds`."""
        key: int = self._next_keys[table]
        self._next_keys[table] += 1
        return key

    def _add(self, statement: str, *values: Any) -> None:
        self._buffer.append((statement, values))

    # --- nodes -----------------------------------------------------------------------------------------------

    def save_member(self, key: int, state: str, registration: Register) -> None:
        """Note an incarnation of a node, or how it changed."""
        body = msgspec.json.encode(registration)
        self._add(_replace("members", 5), key, registration.name, registration.incarnation, state, body)

    def save_node(self, name: str, is_draining: bool, calibrate: int) -> None:
        """Note what the operator asked of a node, whichever its incarnation."""
        self._add(_replace("nodes", 3), name, is_draining, calibrate)

    def save_function(self, name: str, is_gathering: bool, state_arrays: int) -> None:
        """Note what a function asks of the platform."""
        self._add(_replace("functions", 3), name, is_gathering, state_arrays)

    def save_failure(self, member: int, function: str, detail: str) -> None:
        """Note that a function cannot be imported on a node."""
        self._add(_replace("failures", 3), member, function, detail)

    def clear_failure(self, member: int, function: str) -> None:
        """Note that a function can be imported on a node after all."""
        self._add("DELETE FROM failures WHERE member = ? AND function = ?", member, function)

    def members(self) -> Iterator[MemberRow]:
        """Every incarnation there was, oldest first."""
        for row in self._connection.execute("SELECT * FROM members ORDER BY key"):
            yield MemberRow(*row)

    def nodes(self) -> Iterator[tuple[str, bool, int]]:
        """Name, whether it is draining, and how often it was asked to calibrate, for each node."""
        for name, is_draining, calibrate in self._connection.execute("SELECT * FROM nodes"):
            yield name, bool(is_draining), calibrate

    def functions(self) -> Iterator[tuple[str, bool, int]]:
        """Name, whether it gathers, and its state arrays, for each function known."""
        for name, is_gathering, state_arrays in self._connection.execute("SELECT * FROM functions"):
            yield name, bool(is_gathering), state_arrays

    def failures(self) -> Iterator[tuple[int, str, str]]:
        """Member, function and detail of each function that could not be imported."""
        yield from self._connection.execute("SELECT * FROM failures")

    # --- jobs ------------------------------------------------------------------------------------------------

    def break_job(self, job: int, member: int, detail: str) -> None:
        """Note that a node can do no more for a job."""
        self._add(_replace("broken", 3), job, member, detail)

    def add_holder(self, job: int, member: int) -> None:
        """Note that a node has the newest model."""
        self._add("INSERT OR IGNORE INTO holders VALUES (?, ?)", job, member)

    def remove_holder(self, job: int, member: int) -> None:
        """Note that a node does not have the newest model any more."""
        self._add("DELETE FROM holders WHERE job = ? AND member = ?", job, member)

    def clear_holders(self, job: int) -> None:
        """Forget who had the model: there is a newer one, or none."""
        self._add("DELETE FROM holders WHERE job = ?", job)

    def add_checkpoint(self, job: int, round_number: int) -> None:
        """Note that the model which starts a round is stored."""
        self._add("INSERT OR IGNORE INTO checkpoints VALUES (?, ?)", job, round_number)

    def remove_checkpoint(self, job: int, round_number: int) -> None:
        """Note that it is not kept any more."""
        self._add("DELETE FROM checkpoints WHERE job = ? AND round = ?", job, round_number)

    def jobs(self) -> Iterator[JobRow]:
        """Every job that nodes may still have to hear about."""
        for row in self._connection.execute("SELECT * FROM jobs WHERE NOT is_retired ORDER BY key"):
            yield JobRow._make(row)

    def broken(self, job: int) -> dict[int, str]:
        """Why, for each member that can do no more for a job."""
        return dict(self._connection.execute("SELECT member, detail FROM broken WHERE job = ?", (job,)))

    def holders(self, job: int) -> list[int]:
        """Members that have the newest model."""
        query = "SELECT member FROM holders WHERE job = ? ORDER BY member"
        return [key for (key,) in self._connection.execute(query, (job,))]

    def checkpoints(self, job: int) -> list[int]:
        """Rounds whose starting model is stored, ascending."""
        query = "SELECT round FROM checkpoints WHERE job = ? ORDER BY round"
        return [number for (number,) in self._connection.execute(query, (job,))]

    # --- rounds ----------------------------------------------------------------------------------------------

    def count_update(self, round_key: int, sequence: int, client: str, member: int, num_samples: float) -> None:
        """Note an update that counts."""
        self._buffer.append((_COUNT, (round_key, sequence, client, member, num_samples)))

    def end_update(self, round_key: int, sequence: int, state: int) -> None:
        """Note that an update counts no more: `REJECTED` or `DROPPED`."""
        self._add(_END, state, round_key, sequence)

    def save_share(self, round_key: int, member: int, is_called: bool, is_delivered: bool) -> None:
        """Note how far a node's part of a round is."""
        self._add(_replace("shares", 4), round_key, member, is_called, is_delivered)

    def forget_share(self, round_key: int, member: int) -> None:
        """Note that a node has no part in a round any more."""
        self._add("DELETE FROM shares WHERE round = ? AND member = ?", round_key, member)

    def clear_shares(self, round_key: int) -> None:
        """Note that no part was asked for or delivered, so far."""
        self._add("DELETE FROM shares WHERE round = ?", round_key)

    def save_state(self, round_key: int, state: RoundState) -> None:
        """Note a complete round as the API shows it."""
        self._add(_replace("states", 2), round_key, msgspec.json.encode(state))

    def save_report(self, round_key: int, member: int, report: RoundReport) -> None:
        """Note what a round took on a node; a repeat changes nothing."""
        self._add(_replace("reports", 3), round_key, member, msgspec.json.encode(report))

    def undo_rounds(self, job: int, first: int) -> None:
        """Note that the rounds from `first` on count no more. They must not be touched after this."""
        self._write_touched()
        self._add("UPDATE rounds SET status = 'undone' WHERE job = ? AND number >= ?", job, first)

    def updates_of(self, round_key: int) -> Iterator[tuple[int, str, int, float, int]]:
        """Sequence, client, member, number of samples and state of each update, in the order of counting."""
        query = (
            "SELECT sequence, client, member, num_samples, state FROM updates WHERE round = ? ORDER BY sequence"
        )
        yield from self._connection.execute(query, (round_key,))

    def rejected_in(self, job: int, number: int) -> list[str]:
        """Clients whose updates were not finite in any attempt at a round, as far as they still are rows."""
        query = (
            "SELECT DISTINCT client FROM updates JOIN rounds ON rounds.key = updates.round "
            "WHERE rounds.job = ? AND rounds.number = ? AND updates.state = ?"
        )
        return [client for (client,) in self._connection.execute(query, (job, number, REJECTED))]

    def shares_of(self, round_key: int) -> Iterator[tuple[int, bool, bool]]:
        """Member, whether it was called and whether it has delivered."""
        query = "SELECT member, is_called, is_delivered FROM shares WHERE round = ?"
        for key, is_called, is_delivered in self._connection.execute(query, (round_key,)):
            yield key, bool(is_called), bool(is_delivered)

    def round_of(self, job: int, number: int, attempt: int) -> RoundRow:
        """The row of one attempt at a round; raises InvalidInput when it is missing."""
        query = "SELECT * FROM rounds WHERE job = ? AND number = ? AND attempt = ?"
        row = self._connection.execute(query, (job, number, attempt)).fetchone()
        if row is None:
            raise InvalidInput(f"{self.path}: round {number} of job {job} is missing")
        return RoundRow(*row)

    def complete_rounds(self, job: int) -> list[tuple[RoundRow, RoundState, dict[int, RoundReport]]]:
        """The newest complete rounds of a job, oldest first, each with what its members reported."""
        query = "SELECT * FROM rounds WHERE job = ? AND status = 'complete' ORDER BY number DESC LIMIT ?"
        found = []
        for row in map(RoundRow._make, self._connection.execute(query, (job, KEPT_ROUNDS)).fetchall()):
            body = self._connection.execute("SELECT body FROM states WHERE round = ?", (row.key,)).fetchone()
            found.append((row, msgspec.json.decode(body[0], type=RoundState), _reports(self._connection, row.key)))
        return found[::-1]

    def counted_since(self, job: int, first: int) -> Iterator[tuple[int, list[str]]]:
        """Number and counted clients of each complete round of a job from `first` on."""
        query = (
            "SELECT key, number FROM rounds WHERE job = ? AND status = 'complete' AND number >= ? ORDER BY number"
        )
        for key, number in self._connection.execute(query, (job, first)).fetchall():
            rows, _ = _rows_of(self._connection, key, 0, 1 << 62)
            yield number, [client for client, _, _, state in rows if state == COUNTED]

    # --- what was, for readers in any thread -------------------------------------------------------------------

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        connection = self._open()
        try:
            yield connection
        finally:
            connection.close()

    def find_round(self, job: int, number: int) -> tuple[RoundRow, RoundState | None] | None:
        """A round of a job, the newest attempt, with its state and all reports if it is complete."""
        query = "SELECT * FROM rounds WHERE job = ? AND number = ? ORDER BY attempt DESC, key DESC LIMIT 1"
        with self._reader() as connection:
            found = connection.execute(query, (job, number)).fetchone()
            if found is None:
                return None
            row = RoundRow(*found)
            return row, _complete_state(connection, row.key)

    def record_of(self, round_key: int, offset: int = 0, most: int = 1 << 62) -> tuple[list[UpdateRecord], int]:
        """Updates of a round from `offset` on, in the order of counting, and how many there are in all."""
        with self._reader() as connection:
            part, total = _rows_of(connection, round_key, offset, most)
            names = {key: (name, incarnation) for key, name, incarnation in _member_names(connection)}
        return [
            UpdateRecord(c, *names[key], samples, STATE_NAMES[state]) for c, key, samples, state in part
        ], total

    # --- compaction --------------------------------------------------------------------------------------------

    def rounds_to_compact(self, keep: int = KEPT_ROUNDS) -> list[int]:
        """Keys of rounds that are over and whose updates are still rows, but for the `keep` newest of each job."""
        query = (
            "SELECT key FROM rounds AS old WHERE status IN ('complete', 'undone') "
            "AND EXISTS (SELECT 1 FROM updates WHERE round = old.key) "
            "AND ((SELECT is_retired FROM jobs WHERE key = old.job) OR (SELECT count(*) FROM (SELECT 1 "
            "FROM rounds WHERE job = old.job AND key > old.key AND status = 'complete' LIMIT ?)) >= ?)"
        )
        with self._reader() as connection:
            return [key for (key,) in connection.execute(query, (keep, keep))]

    def compact(self, round_key: int) -> None:
        """Put the updates of a round that is over into one row. May be cut short at any point and done again."""
        with self._reader() as connection:
            connection.execute("PRAGMA synchronous = FULL")
            with self._transaction(connection):
                if not connection.execute("SELECT 1 FROM records WHERE round = ?", (round_key,)).fetchone():
                    rows = _update_rows(connection, round_key, 0, 1 << 62)
                    body = zlib.compress(msgspec.msgpack.encode(rows), 1)
                    connection.execute("INSERT INTO records VALUES (?, ?)", (round_key, body))
                state = _complete_state(connection, round_key)
                if state is not None:
                    connection.execute(_replace("states", 2), (round_key, msgspec.json.encode(state)))
                for table in ("reports", "shares"):
                    connection.execute(f"DELETE FROM {table} WHERE round = ?", (round_key,))  # noqa: S608
            deletion = (
                "DELETE FROM updates WHERE round = ? AND sequence < "
                "(SELECT min(sequence) FROM updates WHERE round = ?) + ?"
            )
            while connection.execute("SELECT 1 FROM updates WHERE round = ? LIMIT 1", (round_key,)).fetchone():
                with self._transaction(connection):
                    connection.execute(deletion, (round_key, round_key, _COMPACT_ROWS))


_UpdateRow = tuple[str, int, float, int]
"""Client, member, number of samples, state."""


def _rows_of(
    connection: sqlite3.Connection, round_key: int, offset: int, most: int
) -> tuple[list[_UpdateRow], int]:
    """Updates of a round, out of its record or still rows, and how many there are in all."""
    body = connection.execute("SELECT body FROM records WHERE round = ?", (round_key,)).fetchone()
    if body is not None:
        rows = msgspec.msgpack.decode(zlib.decompress(body[0]), type=list[_UpdateRow])
        return rows[offset : offset + most], len(rows)
    total = connection.execute("SELECT count(*) FROM updates WHERE round = ?", (round_key,)).fetchone()[0]
    return _update_rows(connection, round_key, offset, min(most, total)), total


def _update_rows(connection: sqlite3.Connection, round_key: int, offset: int, most: int) -> list[_UpdateRow]:
    query = (
        "SELECT client, member, num_samples, state FROM updates WHERE round = ? AND sequence > ? "
        "ORDER BY sequence LIMIT ?"
    )
    # Sequences are counted from 1 without a gap, so an offset is one.
    return connection.execute(query, (round_key, offset, most)).fetchall()


def _member_names(connection: sqlite3.Connection) -> Iterable[tuple[int, str, str]]:
    return connection.execute("SELECT key, name, incarnation FROM members")


def _complete_state(connection: sqlite3.Connection, round_key: int) -> RoundState | None:
    row = connection.execute("SELECT body FROM states WHERE round = ?", (round_key,)).fetchone()
    if row is None:
        return None
    return with_reports(msgspec.json.decode(row[0], type=RoundState), _reports(connection, round_key).values())


def _reports(connection: sqlite3.Connection, round_key: int) -> dict[int, RoundReport]:
    rows = connection.execute("SELECT member, body FROM reports WHERE round = ? ORDER BY member", (round_key,))
    return {member: msgspec.json.decode(body, type=RoundReport) for member, body in rows}


def with_reports(state: RoundState, reports: Iterable[RoundReport]) -> RoundState:
    """A complete round with what its nodes reported.

    The 95th percentile is the largest of the nodes', an upper bound; the median is the mean of theirs.
    """
    reports = list(reports)
    timed = [report for report in reports if report.latency_max]
    if not reports:
        return state
    return msgspec.structs.replace(
        state,
        leaves=state.leaves + sum(report.leaves for report in reports),
        started=state.started + sum(report.started for report in reports),
        cold=state.cold + sum(report.cold for report in reports),
        reused=state.reused + sum(report.reused for report in reports),
        internode_bytes=state.internode_bytes + sum(report.received_bytes for report in reports),
        latency_median=_mean([report.latency_median for report in timed]) or state.latency_median,
        latency_p95=max([state.latency_p95, *(report.latency_p95 for report in timed)]),
        latency_max=max([state.latency_max, *(report.latency_max for report in timed)]),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
