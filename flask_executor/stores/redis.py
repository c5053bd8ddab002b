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

Redis itself lets records expire. Whoever waits for a job subscribes to the channel ``job:<id>``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from flask_executor.abc import MOST_MESSAGES, Entry, StopRequest, StoredMessage, StoreOptions, Watch
from flask_executor.exceptions import MissingExtra, StoreUnavailable
from flask_executor.helpers import redact_url
from flask_executor.jobs.model import LOG_LINES, Job, JobStatus, LogLine, new_id
from flask_executor.stores.base import (
    MAIL_AT_ONCE,
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

_PATIENCE = 2.0  # seconds to wait for an answer
_DOUBT = 30.0  # seconds within which a command may come again whose answer was lost
_AT_ONCE = 500  # records that are read in one go

# What changes more than one name is a script, so that it happens in one piece. In mode "claim" it answers with the
# record that is in the way, if one is; in mode "lose" with the record that is there, if the job has ended; in modes
# "take", "pass" (which takes only what is there) and "revive" with the one that is there, if it is not what is
# expected: a job of "instead", or just that text.
_PUT = """
local p, mode, id, record, ended, key, holder = unpack(ARGV, 1, 7)
local ttl, memory, now, outcome, instead, lease, owner, names = unpack(ARGV, 8, 15)
if mode == 'claim' then
    local there = redis.call('GET', p .. 'key:' .. key)
    if there and there ~= instead and there ~= id then
        local other = redis.call('GET', p .. 'job:' .. there)
        if other then return other end
    end
    redis.call('SET', p .. 'key:' .. key, id)
    redis.call('ZADD', p .. 'keys', now, key)
    redis.call('SET', p .. 'lease:' .. holder, '', 'PX', lease)
elseif mode == 'lose' and redis.call('SISMEMBER', p .. 'open:' .. holder, id) == 0 then
    return redis.call('GET', p .. 'job:' .. id)
elseif mode == 'take' or mode == 'pass' then
    if redis.call('SREM', p .. 'open:' .. instead, id) == 0 then
        local there = redis.call('GET', p .. 'job:' .. id)
        if there or mode == 'pass' then return there end
    end
elseif mode == 'revive' then
    local there = redis.call('GET', p .. 'job:' .. id)
    local has = key ~= '' and redis.call('GET', p .. 'key:' .. key)
    local other = has and has ~= id and redis.call('EXISTS', p .. 'job:' .. has) == 1
    if there and (other or there ~= instead) then return there end
end
local old = redis.call('GET', p .. 'job:' .. id)
redis.call('SET', p .. 'job:' .. id, record)
local former = old and string.match(old, '"holder": "([^"]*)"}$')
if former and former ~= holder then
    redis.call('SREM', p .. 'open:' .. former, id)
    redis.call('SREM', p .. 'mailed:' .. former, id)
end
if not old then
    redis.call('ZADD', p .. 'jobs', now, id)
    if owner ~= '' then redis.call('ZADD', p .. 'of:' .. owner, now, id) end
    if key ~= '' then
        redis.call('SET', p .. 'last:' .. key, id)
        if ended == '' and redis.call('SET', p .. 'key:' .. key, id, 'NX') then
            redis.call('ZADD', p .. 'keys', now, key)
        end
    end
end
if outcome ~= '' then redis.call('SET', p .. 'result:' .. id, outcome) end
for n = 16, #ARGV do redis.call('RPUSH', p .. 'log:' .. id, ARGV[n]) end
if #ARGV > 15 then redis.call('LTRIM', p .. 'log:' .. id, -LOG_LINES, -1) end
local own = {'job:' .. id, 'result:' .. id, 'log:' .. id, 'mail:' .. id}
for _, name in ipairs({'key:', 'last:'}) do
    if key ~= '' and redis.call('GET', p .. name .. key) == id then table.insert(own, name .. key) end
end
if ended == '' then
    redis.call('SADD', p .. 'holders', holder)
    if redis.call('SADD', p .. 'open:' .. holder, id) == 1 and redis.call('EXISTS', p .. 'mail:' .. id) == 1 then
        redis.call('SADD', p .. 'mailed:' .. holder, id)
    end
    redis.call('ZREM', p .. 'ended', names)
    for _, name in ipairs(own) do redis.call('PERSIST', p .. name) end
else
    redis.call('SREM', p .. 'open:' .. holder, id)
    redis.call('SREM', p .. 'mailed:' .. holder, id)
    redis.call('ZADD', p .. 'ended', ended, names)
    for _, name in ipairs(own) do redis.call('PEXPIRE', p .. name, ttl) end
    if mode ~= 'lose' then redis.call('HDEL', p .. 'stops', id) end
    redis.call('SET', p .. 'gone:' .. id, '', 'PX', memory)
    if key ~= '' then redis.call('SET', p .. 'gone-key:' .. key, '', 'PX', memory) end
end
redis.call('PUBLISH', p .. 'job:' .. id, '')
return false
""".replace("LOG_LINES", str(LOG_LINES))

# ARGV: prefix, id, key, owner, how it stands in "ended", whether also the memory of it.
_FORGET = """
local p, id, key, owner = unpack(ARGV, 1, 4)
for _, name in ipairs({'key:', 'last:'}) do
    if key ~= '' and redis.call('GET', p .. name .. key) == id then redis.call('DEL', p .. name .. key) end
end
if key ~= '' and redis.call('EXISTS', p .. 'key:' .. key) == 0 then redis.call('ZREM', p .. 'keys', key) end
redis.call('DEL', p .. 'job:' .. id, p .. 'result:' .. id, p .. 'log:' .. id, p .. 'mail:' .. id)
redis.call('HDEL', p .. 'stops', id)
redis.call('ZREM', p .. 'jobs', id)
if owner ~= '' then redis.call('ZREM', p .. 'of:' .. owner, id) end
redis.call('ZREM', p .. 'ended', ARGV[5])
if ARGV[6] ~= '' then redis.call('DEL', p .. 'gone:' .. id) end
redis.call('PUBLISH', p .. 'job:' .. id, '')
"""

# ARGV: prefix, the name of an id. Answers with the record of that job.
_BY_NAME = """
local id = redis.call('GET', ARGV[1] .. ARGV[2])
return id and redis.call('GET', ARGV[1] .. 'job:' .. id)
"""

# ARGV: prefix, the name of a sorted set of ids, from, to. Answers with the records that are there, highest first.
_NEWEST = """
local ids = redis.call('ZREVRANGE', ARGV[1] .. ARGV[2], ARGV[3], ARGV[4])
if #ids == 0 then return false end
for n, id in ipairs(ids) do ids[n] = ARGV[1] .. 'job:' .. id end
return redis.call('MGET', unpack(ids))
"""

# ARGV: prefix, key, id.
_RELEASE = """
local p, key, id = unpack(ARGV, 1, 3)
if redis.call('GET', p .. 'key:' .. key) == id then
    redis.call('DEL', p .. 'key:' .. key)
    redis.call('ZREM', p .. 'keys', key)
    return 1
end
return 0
"""

# ARGV: prefix, id, holder, the record as it was read, message, its number, milliseconds to remember that. Answers with
# 0 when the record is another by now, and -1 when there are too many. The client asks again when an answer is lost.
_SEND = """
local p, id, holder, record, message, number, memory = unpack(ARGV)
if redis.call('GET', p .. 'job:' .. id) ~= record then return 0 end
if redis.call('EXISTS', p .. 'sent:' .. number) == 1 then return 1 end
if redis.call('XLEN', p .. 'mail:' .. id) >= MOST_MESSAGES then return -1 end
redis.call('XADD', p .. 'mail:' .. id, '*', 'm', message)
redis.call('SADD', p .. 'mailed:' .. holder, id)
redis.call('SET', p .. 'sent:' .. number, '', 'PX', memory)
return 1
""".replace("MOST_MESSAGES", str(MOST_MESSAGES))

# ARGV: prefix, id, how it stands in "ended", request. It is for whoever has the job when he looks.
_STOP = """
local p, id, names, request = unpack(ARGV)
if redis.call('EXISTS', p .. 'job:' .. id) == 1 and not redis.call('ZSCORE', p .. 'ended', names) then
    redis.call('HSET', p .. 'stops', id, request)
end
"""

# ARGV: prefix, holder. Answers with requests to stop, and pairs of an id and messages; with nothing if there are none.
_REQUESTS = """
local p, holder = unpack(ARGV)
local stops = {}
for _, id in ipairs(redis.call('HKEYS', p .. 'stops')) do
    if redis.call('SISMEMBER', p .. 'open:' .. holder, id) == 1 then
        table.insert(stops, id)
        table.insert(stops, redis.call('HGET', p .. 'stops', id))
        redis.call('HDEL', p .. 'stops', id)
    end
end
local ids = redis.call('SMEMBERS', p .. 'mailed:' .. holder)
if #stops == 0 and #ids == 0 then return false end
for n, id in ipairs(ids) do
    ids[n] = {id, redis.call('XRANGE', p .. 'mail:' .. id, '-', '+', 'COUNT', AT_ONCE)}
end
return {stops, ids}
""".replace("AT_ONCE", str(MAIL_AT_ONCE))

# ARGV: prefix, holder, id, numbers of messages.
_RECEIVED = """
local p, holder, id = unpack(ARGV, 1, 3)
redis.call('XDEL', p .. 'mail:' .. id, unpack(ARGV, 4))
if redis.call('XLEN', p .. 'mail:' .. id) == 0 then
    redis.call('DEL', p .. 'mail:' .. id)
    redis.call('SREM', p .. 'mailed:' .. holder, id)
end
"""

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
            socket_timeout=_PATIENCE,
            socket_connect_timeout=_PATIENCE,
            health_check_interval=30,
            # For a connection that was open when Redis was restarted. Who got no answer in time does not wait again.
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            retry_on_error=[redis.ConnectionError],  # redis-py 5 asks for that too
        )
        pool.make_connection()  # which connects nowhere, but raises for an option that there is not
        if pool.connection_kwargs.get("decode_responses"):
            raise ValueError("without decode_responses, as results are bytes")
        # A client that has made its pool itself closes it when it is collected. After a fork that waits for ever: a
        # thread of the parent may have held the lock of the pool.
        self._redis: Any = redis.Redis(connection_pool=pool)
        self._known = False  # whether the server has our scripts, and the version was looked at

    # ---- one job ----

    def claim(self, entry: Entry, *, again: bool = False) -> Job | None:
        instead = ""
        while True:
            with self.reaching():
                there = self._call(_PUT, *self._arguments("claim", entry, instead))
                job = self._detect_loss(_stored(there))
            if job is None:
                return None
            if not again or not job.status.ended or job.status is JobStatus.SUCCEEDED or job.id == instead:
                return job
            instead = job.id

    def write(self, entries: Sequence[Entry]) -> None:
        with self.reaching():
            self._call_each(_PUT, [self._arguments("write", entry) for entry in entries])

    def transfer(self, entry: Entry, former: str | None, *, lost: bool = False, new: bool = True) -> Job | None:
        with self.reaching():
            text = self._call(_PUT, *self._arguments("take" if new else "pass", entry, former or ""))
            there = _stored(text)
            if lost and there is not None and there.job.status is JobStatus.LOST:
                there = _stored(self._call(_PUT, *self._arguments("revive", entry, text)))
        return None if there is None or was_transferred(there, entry) else there.job

    def _mark_lost(self, stored: StoredRecord) -> Job:
        lost = as_lost(stored)
        there = _stored(self._call(_PUT, *self._arguments("lose", Entry(job=lost, holder=stored.holder))))
        if there is not None:
            return there.job
        report_loss(lost)
        return lost

    def _arguments(self, mode: str, entry: Entry, instead: str | bytes = "") -> list[Any]:
        job, ttl = entry.job, self.options.result_ttl
        return [
            mode,
            job.id,
            encode_job(job, holder=entry.holder),
            "" if job.ended_at is None else repr(job.ended_at),
            "" if job.key is None else encode_key(job.key),
            entry.holder,
            _milliseconds(ttl),
            _milliseconds(ttl + self.memory),
            repr(time.time()),
            entry.outcome or "",
            instead,
            _milliseconds(LEASE_SECONDS),
            replace_surrogates(job.owner) or "",
            _names(job),
            *map(encode_line, entry.log),
        ]

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
                names = _names(stored.job)
                self._call(_FORGET, *json.loads(names), names, "1")

    # ---- looking ----

    def _youngest(self, key: str) -> StoredRecord | None:
        return self._by_name(f"last:{key}")

    def _holding(self, key: str) -> StoredRecord | None:
        return self._by_name(f"key:{key}")

    def _by_name(self, name: str) -> StoredRecord | None:
        return _stored(self._call(_BY_NAME, name))

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
        mark = b"" if status is None else f'"status": "{status}"'.encode()  # to save the work of decoding
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
                if found == limit:  # before another lot is read
                    return

    def _newest(self, owner: str | None, limit: int | None) -> Iterator[bytes | None]:
        """The records, youngest first, read some at a time."""
        ids = "jobs" if owner is None else f"of:{owner}"
        begin, size = 0, _AT_ONCE if limit is None else max(1, min(limit, _AT_ONCE))
        while (texts := self._call(_NEWEST, ids, begin, begin + size - 1)) is not None:
            yield from texts
            begin, size = begin + size, _AT_ONCE

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
            return bool(self._call(_RELEASE, encode_key(key), id))

    def ask_to_stop(self, request: StopRequest) -> None:
        with self.reaching():
            stored = self._read(request.id)
            if stored is not None:
                asked = json.dumps([request.grace, request.only_queued])
                self._call(_STOP, request.id, _names(stored.job), asked)

    def send(self, id: str, data: bytes) -> bool:
        number = new_id()
        with self.reaching():
            while (text := self._redis.get(f"{self._prefix}job:{id}")) is not None:
                stored = _stored(text)
                if stored is None or stored.job.status.ended:
                    break
                sent = self._call(_SEND, id, stored.holder, text, data, number, _milliseconds(_DOUBT))
                if sent == -1:
                    raise message_limit_error(id)
                if sent:
                    return True
        return False

    def take_requests(self, holder: str) -> Sequence[StopRequest | StoredMessage]:
        with self.reaching():
            found = self._call(_REQUESTS, holder)
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
            self._call_each(_RECEIVED, [[holder, id, *numbers] for id, numbers in by_job.items()])

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
        """Have records leave, given as they stand in ``ended``."""
        self._call_each(_FORGET, [[*json.loads(names), names, ""] for names in members])
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
            self.purge(time.time() - self.options.result_ttl)  # what stands in lists of those that have expired
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
        with suppress(redis.RedisError, OSError):
            self._redis.close()
            self._redis.connection_pool.disconnect()

    @contextmanager
    def reaching(self, *, writing: bool = False) -> Iterator[None]:
        with super().reaching():
            if not self._known:
                self._get_to_know()
            yield

    def _get_to_know(self) -> None:
        """Look at the version, and give the server our scripts."""
        name = f"{self._prefix}version"
        self._redis.set(name, VERSION, nx=True)
        version = int(self._redis.get(name))
        if version != VERSION:
            raise StoreUnavailable(
                self.where,
                f"another version of Flask-Executor has written it (its schema is {version}, this knows {VERSION}). "
                f"Use that version, or another database (redis://host/1), or delete all names {self._prefix}*",
            )
        for script in (_PUT, _FORGET, _RELEASE, _BY_NAME, _NEWEST, _SEND, _STOP, _REQUESTS, _RECEIVED):
            self._redis.script_load(script)
        self._known = True

    def _call(self, script: str, *arguments: Any) -> Any:
        """What a script answers."""
        try:
            return self._redis.evalsha(_digest(script), 0, self._prefix, *arguments)
        except redis.exceptions.NoScriptError:  # it was restarted
            self._get_to_know()
            return self._redis.evalsha(_digest(script), 0, self._prefix, *arguments)

    def _call_each(self, script: str, calls: Sequence[Sequence[Any]]) -> None:
        """Call a script with each of these arguments, all in one go."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for arguments in calls:
                pipeline.evalsha(_digest(script), 0, self._prefix, *arguments)
            try:
                pipeline.execute()
                return
            except redis.exceptions.NoScriptError:
                self._get_to_know()
        self._call_each(script, calls)

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
        self._heard: set[str] = set()  # channels of which something has come that nobody has waited for yet

    def begin(self, ids: Collection[str]) -> None:
        wanted = {self._wakes, *(f"{self._store._prefix}job:{id}" for id in ids)}
        with self._connected():
            gone, new = self._channels - wanted, wanted - self._channels
            if gone:
                self._pubsub.unsubscribe(*gone)
            if new:
                self._pubsub.subscribe(*new)
            self._channels = wanted
            while new:  # what changes from here on must be heard of
                message = self._pubsub.get_message(timeout=_PATIENCE)
                if message is None:
                    raise redis.TimeoutError(f"no answer in {_PATIENCE:g} s")
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
        with suppress(redis.RedisError, OSError):  # whoever waits there will hear of that by itself
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


@functools.cache
def _digest(script: str) -> str:
    """What Redis calls a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


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


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _escaped(text: str) -> str:
    """A pattern of Redis that matches just this text."""
    return "".join(f"\\{sign}" if sign in "*?[]\\" else sign for sign in text)
