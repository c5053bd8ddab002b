"""Records in Redis: processes on any number of machines.

All names begin with ``flask-executor:{space}:``:

.. code-block:: text

    job:<id>      the record as JSON            jobs        ids by the time of submission
    result:<id>   what came of it               of:<owner>  those of an owner
    log:<id>      lines as JSON                 ended       [id, key, owner] of ended jobs by the time of their end
    key:<key>     the id of who has it          keys        the keys that are taken, by the time
    last:<key>    the youngest id under it      holders     holders that had a job
    gone:<id>     there is or was such a job    open:<h>    ids of the jobs that holder h has
    gone-key:<k>  there is or was such a key    lease:<h>   there while the lease of h holds
    version       of this table                 stops       requests to stop jobs, by their ids
    mail:<id>     messages to the job, a        mailed:<h>  ids of the jobs that holder h has, and that have
                  stream of fields m                        messages
    sent:<n>      there for a while after       check       there after somebody has looked whether one can
                  message n was sent                        write

Redis itself lets records expire. Each write publishes to the channel ``job:<id>``, to which a watch subscribes. The
steps are scripts, see :mod:`flask_executor.stores.redis_scripts`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from flask_executor.abc import Entry, StopRequest, StoredMessage, StoreOptions, Watch
from flask_executor.exceptions import MissingExtra, StoreUnavailable
from flask_executor.helpers import redact_url
from flask_executor.jobs.model import Job, JobStatus, LogLine, new_id
from flask_executor.stores import redis_scripts as scripts
from flask_executor.stores.base import (
    SharedStore,
    StoredRecord,
    as_lost,
    message_limit_error,
    report_loss,
    skipped,
    was_transferred,
)
from flask_executor.stores.codec import (
    decode_job,
    decode_key,
    decode_line,
    encode_job,
    encode_key,
    encode_line,
    encode_prefix,
    replace_surrogates,
)
from flask_executor.stores.leases import LEASE_SECONDS

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise MissingExtra("redis", "redis") from error

_T = TypeVar("_T")

_ANSWER_TIMEOUT = 2.0  # seconds
_RESEND_WINDOW = 30.0  # seconds within which a command whose answer was lost may come again
_BATCH_SIZE = 500  # records that are read or written by one script, so that others need not wait long for Redis

#: What this module reads and writes; see the table above.
VERSION = 1


class RedisStore(SharedStore):
    """One pool of connections, that of redis-py, which knows about threads and forks."""

    def __init__(self, options: StoreOptions) -> None:
        super().__init__(options)
        self._url = options.url
        self._prefix = f"flask-executor:{{{options.space}}}:"
        self._connect()
        self.where = str(redact_url(options.url)).partition("?")[0].replace("***@", "")

    def _connect(self) -> None:
        pool = redis.ConnectionPool.from_url(
            self._url,
            socket_timeout=_ANSWER_TIMEOUT,
            socket_connect_timeout=_ANSWER_TIMEOUT,
            health_check_interval=30,
            # For a connection that was open when Redis was restarted. After a timeout nobody is made to wait again.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            retry_on_error=[redis.ConnectionError],  # redis-py 5 asks for that too
        )
        pool.make_connection()  # connects to nothing, but raises for an unknown option
        if pool.connection_kwargs.get("decode_responses"):
            raise ValueError("without decode_responses, as results are bytes")
        # A client that makes its own pool closes it when it is collected. After a fork that would wait for ever:
        # a thread of the parent may have held the lock of the pool.
        self._redis: Any = redis.Redis(connection_pool=pool)
        self._script: Any = functools.cache(self._redis.register_script)  # which loads it when Redis does not have it
        self._version_checked = False
        self._closed = False

    # ---- one job ----

    def claim(self, entry: Entry, *, again: bool = False) -> Job | None:
        replaces = None
        while True:
            with self.reaching():
                text = self._put(scripts.CLAIM, entry, replaces=replaces, lease=_milliseconds(LEASE_SECONDS))
                job = self._detect_loss(_stored(text))
            if job is None:
                return None
            if not again or not job.status.retryable or job.id == replaces:
                return job
            replaces = job.id

    def write(self, entries: Sequence[Entry]) -> None:
        with self.reaching():
            for batch in _batches(entries):
                outcomes = [entry.outcome or b"" for entry in batch]
                self._run(scripts.WRITE, *outcomes, entries=[_fields(entry) for entry in batch], **self._times())

    def transfer(self, entry: Entry, former: str | None, *, lost: bool = False, new: bool = True) -> Job | None:
        with self.reaching():
            text = self._put(scripts.TRANSFER, entry, former=former, create=new)
            there = _stored(text)
            if text is not None and lost and there is not None and there.job.status is JobStatus.LOST:
                there = _stored(self._put(scripts.REVIVE, entry, seen=text.decode()))
        return None if there is None or was_transferred(there, entry) else there.job

    def _mark_lost(self, stored: StoredRecord) -> Job:
        lost = as_lost(stored)
        there = _stored(self._put(scripts.MARK_LOST, Entry(job=lost, holder=stored.holder)))
        if there is not None:
            return there.job
        report_loss(lost)
        return lost

    def _put(self, script: str, entry: Entry, **arguments: Any) -> bytes | None:
        """Call a script that writes an entry: None, or the record that is why it has not."""
        answer: bytes | None = self._run(
            script, entry.outcome or b"", entry=_fields(entry), **self._times(), **arguments
        )
        return answer

    def _times(self) -> dict[str, float]:
        ttl = self.options.result_ttl
        return {"now": time.time(), "ttl": _milliseconds(ttl), "memory": _milliseconds(ttl + self.memory)}

    def outcome(self, id: str) -> bytes | None:
        with self.reaching():
            found: bytes | None = self._redis.get(f"{self._prefix}result:{id}")
        return found

    def log(self, id: str) -> Sequence[LogLine]:
        with self.reaching():
            return [decode_line(text) for text in self._redis.lrange(f"{self._prefix}log:{id}", 0, -1)]

    def remove(self, id: str) -> None:
        with self.reaching():
            stored = self._read(id)
            if stored is not None:
                for name in ("open", "mailed"):
                    self._redis.srem(f"{self._prefix}{name}:{stored.holder}", id)
                self._run(scripts.FORGET, jobs=[_names(stored.job)], completely=True)

    # ---- looking ----

    def _youngest(self, key: str) -> StoredRecord | None:
        return self._by_name(f"last:{key}")

    def _holding(self, key: str) -> StoredRecord | None:
        return self._by_name(f"key:{key}")

    def _by_name(self, name: str) -> StoredRecord | None:
        return _stored(self._run(scripts.RECORD_BY_NAME, name=name))

    def _read(self, id: str) -> StoredRecord | None:
        return _stored(self._redis.get(f"{self._prefix}job:{id}"))

    def expired(self, id: str | None = None, *, key: Hashable | None = None) -> bool:
        gone, there = ("gone:", "job:") if key is None else ("gone-key:", "last:")
        name = id if key is None else encode_key(key)
        with self.reaching(), self._redis.pipeline() as pipeline:
            pipeline.exists(f"{self._prefix}{gone}{name}").exists(f"{self._prefix}{there}{name}")
            was, is_there = pipeline.execute()
        return bool(was and not is_there)

    def keys(self, within: tuple[Hashable, ...] = ()) -> Sequence[Hashable]:
        with self.reaching():
            if within:
                pattern = _escaped(encode_prefix(within)) + "*"
                scored = sorted(self._redis.zscan_iter(f"{self._prefix}keys", pattern, 1000), key=lambda pair: pair[1])
                names = [name for name, _ in scored]
            else:
                names = self._redis.zrange(f"{self._prefix}keys", 0, -1)
            there = self._redis.mget([f"{self._prefix}key:".encode() + name for name in names]) if names else []
        return [decode_key(name.decode()) for name, id in zip(names, there, strict=True) if id is not None]

    def _select(
        self, status: JobStatus | None, name: str | None, owner: str | None, limit: int | None
    ) -> Iterable[StoredRecord]:
        if limit == 0:
            return
        mark = b"" if status is None else f'"status": "{status}"'.encode()  # decoding the others would take longer
        found = 0
        for text in self._not_ended() if status is not None and not status.ended else self._newest(owner, limit):
            stored = _stored(text) if text is not None and mark in text else None
            if (
                stored is not None
                and (status is None or stored.job.status is status)
                and (name is None or stored.job.name == name)
                and (owner is None or stored.job.owner == owner)
            ):
                found += 1
                yield stored
                if found == limit:  # before another batch is read
                    return

    def _newest(self, owner: str | None, limit: int | None) -> Iterator[bytes | None]:
        """The records, youngest first, read in batches."""
        name = "jobs" if owner is None else f"of:{owner}"
        begin, size = 0, _BATCH_SIZE if limit is None else max(1, min(limit, _BATCH_SIZE))
        while (texts := self._run(scripts.NEWEST_RECORDS, name=name, first=begin, last=begin + size - 1)) is not None:
            yield from texts
            begin, size = begin + size, _BATCH_SIZE

    def _not_ended(self) -> Iterator[bytes | None]:
        """The records of the jobs that have not ended, youngest first."""
        holders = self._redis.smembers(f"{self._prefix}holders")
        if not holders:
            return
        ids = list(self._redis.sunion([f"{self._prefix}open:".encode() + holder for holder in holders]))
        texts = self._redis.mget([f"{self._prefix}job:".encode() + id for id in ids]) if ids else []
        there = [text for text in texts if text is not None]
        yield from sorted(there, key=lambda text: float(json.loads(text)["queued_at"]), reverse=True)

    # ---- keys, requests, leases ----

    def release(self, key: Hashable, id: str) -> bool:
        with self.reaching():
            return bool(self._run(scripts.RELEASE, key=encode_key(key), id=id))

    def ask_to_stop(self, request: StopRequest) -> None:
        with self.reaching():
            stored = self._read(request.id)
            if stored is not None:
                asked = json.dumps([request.grace, request.only_queued])
                self._run(scripts.ASK_TO_STOP, id=request.id, names=_names(stored.job), request=asked)

    def send(self, id: str, data: bytes) -> bool:
        number = new_id()
        with self.reaching():
            while (text := self._redis.get(f"{self._prefix}job:{id}")) is not None:
                stored = _stored(text)
                if stored is None or stored.job.status.ended:
                    break
                sent = self._run(
                    scripts.SEND,
                    data,
                    id=id,
                    holder=stored.holder,
                    seen=text.decode(),
                    number=number,
                    memory=_milliseconds(_RESEND_WINDOW),
                )
                if sent == -1:
                    raise message_limit_error(id)
                if sent:
                    return True
        return False

    def take_requests(self, holder: str) -> Sequence[StopRequest | StoredMessage]:
        with self.reaching():
            found = self._run(scripts.TAKE_REQUESTS, holder=holder)
        if found is None:
            return []
        stops, mail = found
        requests: list[StopRequest | StoredMessage] = []
        for id, text in zip(stops[::2], stops[1::2], strict=True):
            grace, only_queued = json.loads(text)
            requests.append(StopRequest(id=id.decode(), grace=grace, only_queued=only_queued))
        for id, messages in mail:
            for number, (_, data) in messages:
                requests.append(StoredMessage(id=id.decode(), number=number.decode(), data=data))
        return requests

    def acknowledge(self, holder: str, messages: Sequence[StoredMessage]) -> None:
        by_job: dict[str, list[str]] = {}
        for message in messages:
            by_job.setdefault(message.id, []).append(message.number)
        with self.reaching():
            self._run(scripts.ACKNOWLEDGE, holder=holder, messages=by_job)

    def renew(self, holder: str) -> bool:
        name = f"{self._prefix}lease:{holder}"
        with self.reaching(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.exists(name).set(name, "", px=_milliseconds(LEASE_SECONDS))
            had_it, _ = pipeline.execute()
        return bool(had_it)

    def drop_lease(self, holder: str) -> None:
        with self.reaching():
            self._redis.delete(f"{self._prefix}lease:{holder}")

    def _has_lease(self, holder: str) -> bool:
        return bool(self._redis.exists(f"{self._prefix}lease:{holder}"))

    # ---- cleaning ----

    def purge(self, ended_before: float) -> int:
        with self.reaching():
            return self._purge(self._redis.zrangebyscore(f"{self._prefix}ended", "-inf", f"({ended_before!r}"))

    def _purge(self, members: Sequence[bytes]) -> int:
        """Remove records, given by their members of ``ended``."""
        for batch in _batches(members):
            self._run(scripts.FORGET, jobs=[names.decode() for names in batch])
        return len(members)

    def find_lost(self) -> None:
        with self.reaching():
            for dead in self._dead(holder.decode() for holder in self._redis.smembers(f"{self._prefix}holders")):
                for id in self._redis.smembers(f"{self._prefix}open:{dead}"):
                    if self._detect_loss(self._read(id.decode())) is None:
                        self._redis.srem(f"{self._prefix}open:{dead}", id)
                self._redis.srem(f"{self._prefix}holders", dead)

    def sweep(self) -> None:
        self.find_lost()
        with self.reaching():
            self.purge(time.time() - self.options.result_ttl)  # expired records still stand in lists
            too_many = self._redis.zcard(f"{self._prefix}ended") - self.options.max_records
            if too_many > 0:
                self._purge(self._redis.zrange(f"{self._prefix}ended", 0, too_many - 1))

    # ---- the server ----

    def watch(self) -> Watch:
        return _Subscription(self)

    def check(self, *, thoroughly: bool = False) -> None:
        with self.reaching():
            self._redis.set(f"{self._prefix}check", "", px=1000)

    @property
    def is_private(self) -> bool:
        return False

    def after_fork(self) -> None:
        super().after_fork()
        self._connect()

    def close(self) -> None:
        self._closed = True  # before looking for connections: those in use are closed by their threads, see reaching()
        self._disconnect()

    def _disconnect(self) -> None:
        """Close the connections that no thread uses. A thread must not lose one that it reads from."""
        with suppress(redis.RedisError, OSError):
            self._redis.connection_pool.disconnect(inuse_connections=False)

    @contextmanager
    def reaching(self, *, writing: bool = False) -> Iterator[None]:
        try:
            with super().reaching():
                if not self._version_checked:
                    self._check_version()
                yield
        finally:
            if self._closed:
                self._disconnect()

    def _check_version(self) -> None:
        name = f"{self._prefix}version"
        self._redis.set(name, VERSION, nx=True)
        version = int(self._redis.get(name))
        if version != VERSION:
            raise StoreUnavailable(
                self.where,
                f"another version of Flask-Executor has written it (its schema is {version}, this knows {VERSION}). "
                f"Use that version, or another database (redis://host/1), or delete all names {self._prefix}*",
            )
        self._version_checked = True

    def _run(self, script: str, *data: bytes, **arguments: Any) -> Any:
        """What a script answers, see :mod:`flask_executor.stores.redis_scripts`."""
        named = json.dumps({name: value for name, value in arguments.items() if value is not None})
        return self._script(script)(args=[self._prefix, named, *data])

    def _reasons(self) -> tuple[type[Exception], ...]:
        return (redis.RedisError, OSError)

    def _explain(self, error: Exception) -> str:
        what = str(error).rstrip(".") or type(error).__name__
        return f"{what}; see that Redis runs there and accepts what the url says"


class _Subscription(Watch):
    """Subscribes to the channels of jobs, and to one of its own to be woken."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._wakes = f"{store._prefix}wake:{new_id()}"
        self._pubsub: Any = None
        self._channels: set[str] = set()
        self._heard: set[str] = set()  # channels with messages since the last wait

    def begin(self, ids: Collection[str]) -> None:
        wanted = {self._wakes, *(f"{self._store._prefix}job:{id}" for id in ids)}
        with self._connected():
            gone, new = self._channels - wanted, wanted - self._channels
            if gone:
                self._pubsub.unsubscribe(*gone)
            if new:
                self._pubsub.subscribe(*new)
            self._channels = wanted
            while new:  # after that no change is missed
                message = self._pubsub.get_message(timeout=_ANSWER_TIMEOUT)
                if message is None:
                    raise redis.TimeoutError(f"no answer in {_ANSWER_TIMEOUT:g} s")
                self._hear(message)
                if message["type"] == "subscribe":
                    new.discard(message["channel"].decode())

    def wait(self, timeout: float) -> Collection[str] | None:
        deadline = time.monotonic() + timeout
        with self._connected():
            while not self._heard and (left := deadline - time.monotonic()) > 0:
                self._hear(self._pubsub.get_message(timeout=left))
            while (message := self._pubsub.get_message(timeout=0)) is not None:
                self._hear(message)
        heard, self._heard = self._heard - {self._wakes}, set()
        return [channel.removeprefix(f"{self._store._prefix}job:") for channel in heard]

    def _hear(self, message: dict[str, Any] | None) -> None:
        if message is not None and message["type"] == "message":
            self._heard.add(message["channel"].decode())

    def wake(self) -> None:
        with suppress(StoreUnavailable), self._store.reaching():  # the thread that waits gets the same error
            self._store._redis.publish(self._wakes, "")

    def close(self) -> None:
        pubsub, self._pubsub, self._channels = self._pubsub, None, set()
        if pubsub is not None:
            with suppress(redis.RedisError, OSError):
                pubsub.close()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            with self._store.reaching():
                if self._pubsub is None:
                    self._pubsub = self._store._redis.pubsub()
                yield
        except StoreUnavailable:
            self.close()
            raise


def _fields(entry: Entry) -> dict[str, Any]:
    """An entry as scripts take it, without the outcome, which is bytes."""
    job = entry.job
    fields = {
        "id": job.id,
        "record": encode_job(job, holder=entry.holder),
        "holder": entry.holder,
        "names": _names(job),
        "queued": job.queued_at,
        "log": [encode_line(line) for line in entry.log],
        "key": None if job.key is None else encode_key(job.key),
        "owner": replace_surrogates(job.owner) or None,
        "ended": job.ended_at,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _names(job: Job) -> str:
    """What a job is found by, as it stands in ``ended``."""
    return json.dumps([job.id, "" if job.key is None else encode_key(job.key), replace_surrogates(job.owner) or ""])


def _stored(text: bytes | None) -> StoredRecord | None:
    if text is None:
        return None
    try:
        job, more = decode_job(text)
        return StoredRecord(job, more["holder"])
    except (KeyError, TypeError, ValueError) as error:
        skipped(error)
        return None


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(items), _BATCH_SIZE):
        yield items[begin : begin + _BATCH_SIZE]


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _escaped(text: str) -> str:
    """A pattern of Redis that matches just this text."""
    return "".join(f"\\{sign}" if sign in "*?[]\\" else sign for sign in text)
