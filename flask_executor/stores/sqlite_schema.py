"""The tables of the SQLite store, how a file of an older version gets them, and a job as a row of them."""

from __future__ import annotations

import sqlite3
from typing import Any

from flask_executor.abc import Entry
from flask_executor.exceptions import StoreUnavailable
from flask_executor.jobs.model import Job, JobStatus
from flask_executor.stores.base import StoredRecord, skipped
from flask_executor.stores.codec import decode_key, decode_meta, encode_key, encode_meta, replace_surrogates

COLUMNS = (
    "id, key, name, owner, status, queued_at, started_at, ended_at, error, attempt, progress, message, meta, "
    "stop_requested, holder"
)
FIELDS = COLUMNS.split(", ")
INSERT = f"INSERT INTO jobs (space, has_key, {COLUMNS}) VALUES ({', '.join('?' * (2 + len(FIELDS)))})"
UPDATE = f"UPDATE jobs SET {', '.join(f'{column} = ?' for column in FIELDS[4:])} WHERE id = ?"
LOG_COLUMNS = "time, level, logger, text, trace"

# Each index is one more page to write at each step of a job, so there are no more than are needed. What has not ended
# has no ended_at; `has_key` is 1 while the job has its key.
_SCHEMA = (
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, space TEXT NOT NULL, key TEXT, has_key INTEGER NOT NULL,
        name TEXT NOT NULL, owner TEXT, status TEXT NOT NULL, queued_at REAL NOT NULL, started_at REAL, ended_at REAL,
        error TEXT, attempt INTEGER NOT NULL, progress REAL, message TEXT, meta TEXT, stop_requested INTEGER NOT NULL,
        holder TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX jobs_with_key ON jobs (space, key) WHERE has_key",
    "CREATE INDEX jobs_by_key ON jobs (space, key) WHERE key IS NOT NULL",
    "CREATE INDEX jobs_by_owner ON jobs (space, owner) WHERE owner IS NOT NULL",
    "CREATE INDEX jobs_by_end ON jobs (space, ended_at) WHERE ended_at IS NOT NULL",
    "CREATE INDEX jobs_not_ended ON jobs (holder) WHERE ended_at IS NULL",
    "CREATE TABLE outcomes (number INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE, data BLOB NOT NULL)",
    """CREATE TABLE log (
        line INTEGER PRIMARY KEY, number INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE, time REAL NOT NULL,
        level TEXT NOT NULL, logger TEXT NOT NULL, text TEXT NOT NULL)""",
    "CREATE INDEX log_by_job ON log (number)",
    """CREATE TABLE requests (
        number INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE, grace REAL, only_queued INTEGER NOT NULL)""",
    "CREATE TABLE holders (holder TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    "CREATE TABLE gone (id TEXT PRIMARY KEY, space TEXT NOT NULL, key TEXT, until REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX gone_by_key ON gone (space, key) WHERE key IS NOT NULL",
    "CREATE INDEX gone_by_time ON gone (until)",
)

# `has_mail` is 1 while messages wait for the job: its holder looks often, and there are none nearly always.
_MESSAGES = (
    "ALTER TABLE jobs ADD COLUMN has_mail INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX jobs_with_mail ON jobs (holder) WHERE has_mail AND ended_at IS NULL",
    """CREATE TABLE messages (
        message INTEGER PRIMARY KEY, number INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE, data BLOB NOT NULL)""",
    "CREATE INDEX messages_by_job ON messages (number)",
)

#: What brings a file of an older version up to date: the statements that lead from version n to n + 1, at n.
#: Version 0 is an empty file. The number of entries is the version that this module reads and writes.
MIGRATIONS: tuple[tuple[str, ...], ...] = (_SCHEMA, ("ALTER TABLE log ADD COLUMN trace TEXT",), _MESSAGES)


def migrate(connection: sqlite3.Connection, where: str) -> None:
    """Make the tables, or bring them up to date.

    :param where: the path of the file, for the error.
    :raises StoreUnavailable: for a file of a newer version.
    """
    version = schema_version(connection)
    if version < len(MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        for statements in MIGRATIONS[schema_version(connection) :]:  # another process may have been faster
            for statement in statements:
                connection.execute(statement)
        if schema_version(connection) < len(MIGRATIONS):
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    elif version > len(MIGRATIONS):
        raise StoreUnavailable(
            where,
            f"a newer version of Flask-Executor has written it (its schema is {version}, this one knows "
            f"{len(MIGRATIONS)}). Update this one, or give it another file",
        )


def schema_version(connection: sqlite3.Connection) -> int:
    """The version of the tables in a file; 0 for an empty one."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def row_of(entry: Entry) -> list[Any]:
    """What is written of a job, in the order of ``COLUMNS``."""
    job = entry.job
    return [
        job.id,
        None if job.key is None else encode_key(job.key),
        replace_surrogates(job.name),
        replace_surrogates(job.owner),
        job.status.value,
        job.queued_at,
        job.started_at,
        job.ended_at,
        replace_surrogates(job.error),
        job.attempt,
        job.progress,
        replace_surrogates(job.message),
        encode_meta(job),
        job.stop_requested,
        entry.holder,
    ]


def record_of(row: tuple[Any, ...]) -> StoredRecord | None:
    """The record that a row of ``COLUMNS`` is; None, with a warning, when it cannot be read."""
    fields = dict(zip(FIELDS, row, strict=True))
    holder = fields.pop("holder")
    try:
        fields["key"] = None if fields["key"] is None else decode_key(fields["key"])
        fields["status"] = JobStatus(fields["status"])
        fields["meta"] = decode_meta(fields["meta"])
    except (SyntaxError, ValueError) as error:
        skipped(error)
        return None
    fields["stop_requested"] = bool(fields["stop_requested"])
    return StoredRecord(Job(**fields), holder)
