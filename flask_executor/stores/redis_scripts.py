"""The Lua scripts of the Redis store: what changes more than one name happens in one piece.

All scripts are called alike:

.. code-block:: text

    ARGV[1]       what all names begin with
    ARGV[2]       the arguments by name, as JSON; what is None in Python is left out, and so is nil here
    ARGV[3], ...  bytes that JSON cannot carry: the outcome of each entry, or the data of a message

Five of them write entries: CLAIM, WRITE, TRANSFER, REVIVE and MARK_LOST. They begin with the same functions, and
differ in what has to be true beforehand. An entry has ``id``, ``record`` (as JSON), ``holder``, ``names`` (how the job
stands in ``ended``), ``queued`` (by which lists are ordered) and ``log`` (lines as JSON), and where they are not None
``key``, ``owner`` and ``ended``. Beside it come ``now``, and ``ttl`` and ``memory``: milliseconds that the record of an
ended job is kept, and that it is known to have been there. Times are seconds since the epoch.

A script that answers with a record has not done what it was called for; that record is why.
"""

from __future__ import annotations

from flask_executor.abc import MOST_MESSAGES
from flask_executor.jobs.model import LOG_LINES
from flask_executor.stores.base import MESSAGES_PER_JOB

_ARGUMENTS = """
local p, call = ARGV[1], cjson.decode(ARGV[2])
local function get(name) return redis.call('GET', p .. name) end
"""

# An ended job's record, result, log and messages expire; so do its key and the youngest id under it, if they are its
# own. A job that is queued again after its end has them back for good.
_PUT = (
    _ARGUMENTS
    + """
local entry = call.entry

local function forget_former_holder(entry, record)
    local former = string.match(record, '"holder": "([^"]*)"}$')
    if former and former ~= entry.holder then
        redis.call('SREM', p .. 'open:' .. former, entry.id)
        redis.call('SREM', p .. 'mailed:' .. former, entry.id)
    end
end

local function put_in_lists(entry)
    redis.call('ZADD', p .. 'jobs', entry.queued, entry.id)
    if entry.owner then redis.call('ZADD', p .. 'of:' .. entry.owner, entry.queued, entry.id) end
    if entry.key then
        redis.call('SET', p .. 'last:' .. entry.key, entry.id)
        if not entry.ended and redis.call('SET', p .. 'key:' .. entry.key, entry.id, 'NX') then
            redis.call('ZADD', p .. 'keys', call.now, entry.key)
        end
    end
end

local function own_names(entry)
    local names = {}
    for _, kind in ipairs({'job:', 'result:', 'log:', 'mail:'}) do table.insert(names, kind .. entry.id) end
    for _, kind in ipairs({'key:', 'last:'}) do
        if entry.key and get(kind .. entry.key) == entry.id then table.insert(names, kind .. entry.key) end
    end
    return names
end

local function mark_open(entry)
    redis.call('SADD', p .. 'holders', entry.holder)
    if redis.call('SADD', p .. 'open:' .. entry.holder, entry.id) == 1
            and redis.call('EXISTS', p .. 'mail:' .. entry.id) == 1 then
        redis.call('SADD', p .. 'mailed:' .. entry.holder, entry.id)
    end
    redis.call('ZREM', p .. 'ended', entry.names)
    for _, name in ipairs(own_names(entry)) do redis.call('PERSIST', p .. name) end
end

local function mark_ended(entry)
    redis.call('SREM', p .. 'open:' .. entry.holder, entry.id)
    redis.call('SREM', p .. 'mailed:' .. entry.holder, entry.id)
    redis.call('ZADD', p .. 'ended', entry.ended, entry.names)
    for _, name in ipairs(own_names(entry)) do redis.call('PEXPIRE', p .. name, call.ttl) end
    redis.call('SET', p .. 'gone:' .. entry.id, '', 'PX', call.memory)
    if entry.key then redis.call('SET', p .. 'gone-key:' .. entry.key, '', 'PX', call.memory) end
end

local function put(entry, outcome)
    local old = get('job:' .. entry.id)
    redis.call('SET', p .. 'job:' .. entry.id, entry.record)
    if old then forget_former_holder(entry, old) else put_in_lists(entry) end
    if outcome ~= '' then redis.call('SET', p .. 'result:' .. entry.id, outcome) end
    for _, line in ipairs(entry.log) do redis.call('RPUSH', p .. 'log:' .. entry.id, line) end
    if #entry.log > 0 then redis.call('LTRIM', p .. 'log:' .. entry.id, -LOG_LINES, -1) end
    if entry.ended then mark_ended(entry) else mark_open(entry) end
    redis.call('PUBLISH', p .. 'job:' .. entry.id, '')
end

local function put_and_drop_stop(entry, outcome)
    put(entry, outcome)
    if entry.ended then redis.call('HDEL', p .. 'stops', entry.id) end
end
""".replace("LOG_LINES", str(LOG_LINES))
)

#: Take the key for ``entry``, and give its holder a lease of ``lease`` milliseconds. Answers with the record of the job
#: that has the key, unless that is this job, or the one with the id ``replaces``.
CLAIM = (
    _PUT
    + """
local claimant = get('key:' .. entry.key)
if claimant and claimant ~= entry.id and claimant ~= call.replaces then
    local record = get('job:' .. claimant)
    if record then return record end
end
redis.call('SET', p .. 'key:' .. entry.key, entry.id)
redis.call('ZADD', p .. 'keys', call.now, entry.key)
redis.call('SET', p .. 'lease:' .. entry.holder, '', 'PX', call.lease)
put_and_drop_stop(entry, ARGV[3])
"""
)

#: Write all ``entries``.
WRITE = (
    _PUT
    + """
for number, each in ipairs(call.entries) do put_and_drop_stop(each, ARGV[2 + number]) end
"""
)

#: Write ``entry`` if the holder ``former`` has the job, or if there is no record and ``create`` is true. Answers with
#: the record that there is otherwise.
TRANSFER = (
    _PUT
    + """
if redis.call('SREM', p .. 'open:' .. (call.former or ''), entry.id) == 0 then
    local record = get('job:' .. entry.id)
    if record or not call.create then return record end
end
put_and_drop_stop(entry, ARGV[3])
"""
)

#: Write ``entry`` if its record is still the text ``seen``, that of a lost job, and no other job has its key. Answers
#: with the record that there is otherwise.
REVIVE = (
    _PUT
    + """
local record, claimant = get('job:' .. entry.id), entry.key and get('key:' .. entry.key)
local is_taken = claimant and claimant ~= entry.id and redis.call('EXISTS', p .. 'job:' .. claimant) == 1
if record and (is_taken or record ~= call.seen) then return record end
put_and_drop_stop(entry, ARGV[3])
"""
)

#: Write ``entry``, the record of a lost job, unless the job has ended meanwhile; answers with its record then. A
#: request to stop it stays for the holder that takes it over.
MARK_LOST = (
    _PUT
    + """
if redis.call('SISMEMBER', p .. 'open:' .. entry.holder, entry.id) == 0 then return get('job:' .. entry.id) end
put(entry, '')
"""
)

#: Remove ``jobs``, given as they stand in ``ended``, and if ``completely`` is true also the memory of them.
FORGET = (
    _ARGUMENTS
    + """
for _, names in ipairs(call.jobs) do
    local id, key, owner = unpack(cjson.decode(names))
    for _, kind in ipairs({'key:', 'last:'}) do
        if key ~= '' and get(kind .. key) == id then redis.call('DEL', p .. kind .. key) end
    end
    if key ~= '' and not get('key:' .. key) then redis.call('ZREM', p .. 'keys', key) end
    redis.call('DEL', p .. 'job:' .. id, p .. 'result:' .. id, p .. 'log:' .. id, p .. 'mail:' .. id)
    redis.call('HDEL', p .. 'stops', id)
    redis.call('ZREM', p .. 'jobs', id)
    if owner ~= '' then redis.call('ZREM', p .. 'of:' .. owner, id) end
    redis.call('ZREM', p .. 'ended', names)
    if call.completely then redis.call('DEL', p .. 'gone:' .. id) end
    redis.call('PUBLISH', p .. 'job:' .. id, '')
end
"""
)

#: Answers with the record of the job whose id has this ``name``.
RECORD_BY_NAME = (
    _ARGUMENTS
    + """
local id = get(call.name)
return id and get('job:' .. id)
"""
)

#: Answers with the records of the ids ``first`` to ``last`` in the sorted set ``name``, highest first; with nothing if
#: there are none.
NEWEST_RECORDS = (
    _ARGUMENTS
    + """
local ids = redis.call('ZREVRANGE', p .. call.name, call.first, call.last)
if #ids == 0 then return false end
for n, id in ipairs(ids) do ids[n] = p .. 'job:' .. id end
return redis.call('MGET', unpack(ids))
"""
)

#: Free ``key`` if the job ``id`` has it; answers with 1 then, and with 0 otherwise.
RELEASE = (
    _ARGUMENTS
    + """
if get('key:' .. call.key) ~= call.id then return 0 end
redis.call('DEL', p .. 'key:' .. call.key)
redis.call('ZREM', p .. 'keys', call.key)
return 1
"""
)

#: Leave a message for the ``holder`` of the job ``id``, if its record is still the text ``seen``. Answers with 1; with
#: 0 if the record has changed; with -1 if too many wait. ``number`` is remembered for ``memory`` milliseconds: redis-py
#: sends the command again when the connection breaks before the answer.
SEND = (
    _ARGUMENTS
    + """
local mail = p .. 'mail:' .. call.id
if get('job:' .. call.id) ~= call.seen then return 0 end
if redis.call('EXISTS', p .. 'sent:' .. call.number) == 1 then return 1 end
if redis.call('XLEN', mail) >= MOST_MESSAGES then return -1 end
redis.call('XADD', mail, '*', 'm', ARGV[3])
redis.call('SADD', p .. 'mailed:' .. call.holder, call.id)
redis.call('SET', p .. 'sent:' .. call.number, '', 'PX', call.memory)
return 1
""".replace("MOST_MESSAGES", str(MOST_MESSAGES))
)

#: Leave ``request`` for the holder of the job ``id``, if the job is there and ``names`` does not stand in ``ended``.
ASK_TO_STOP = (
    _ARGUMENTS
    + """
if get('job:' .. call.id) and not redis.call('ZSCORE', p .. 'ended', call.names) then
    redis.call('HSET', p .. 'stops', call.id, call.request)
end
"""
)

#: Answers with the requests to stop jobs of ``holder``, as a list of id and request by turns, which it removes; and
#: with pairs of an id and messages, which stay. Answers with nothing if there are neither.
TAKE_REQUESTS = (
    _ARGUMENTS
    + """
local stops = {}
for _, id in ipairs(redis.call('HKEYS', p .. 'stops')) do
    if redis.call('SISMEMBER', p .. 'open:' .. call.holder, id) == 1 then
        table.insert(stops, id)
        table.insert(stops, redis.call('HGET', p .. 'stops', id))
        redis.call('HDEL', p .. 'stops', id)
    end
end
local mail = redis.call('SMEMBERS', p .. 'mailed:' .. call.holder)
if #stops == 0 and #mail == 0 then return false end
for n, id in ipairs(mail) do
    mail[n] = {id, redis.call('XRANGE', p .. 'mail:' .. id, '-', '+', 'COUNT', MESSAGES_PER_JOB)}
end
return {stops, mail}
""".replace("MESSAGES_PER_JOB", str(MESSAGES_PER_JOB))
)

#: Remove messages that jobs of ``holder`` have: ``messages`` has their numbers by the ids of the jobs.
ACKNOWLEDGE = (
    _ARGUMENTS
    + """
for id, numbers in pairs(call.messages) do
    redis.call('XDEL', p .. 'mail:' .. id, unpack(numbers))
    if redis.call('XLEN', p .. 'mail:' .. id) == 0 then
        redis.call('DEL', p .. 'mail:' .. id)
        redis.call('SREM', p .. 'mailed:' .. call.holder, id)
    end
end
"""
)
