"""The scripts that run in Redis: each changes several keys of `shared.store` at once, or none.

A script may be repeated after a lost reply: it finds out that its work was done, and answers as before.
"""

# In front of CREATE and DELIVER: write an entry of arq's into a worker's queue, and ring.  ArqRedis.enqueue_job (arq
# 0.28) takes three trips before anybody could ring: it first looks whether the id is taken.  These are not, but by an
# entry that says the same.
ENQUEUE = """
local function enqueue(worker, id, entry, within_ms, retain_s)
  local queue, now = 'arq:queue:' .. worker, redis.call('TIME')
  redis.call('PSETEX', 'arq:job:' .. id, within_ms, entry)
  redis.call('ZADD', queue, string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), id)
  redis.call('EXPIRE', queue, retain_s)
  redis.call('PUBLISH', 'wake:' .. worker, '')
end
"""

# ARGV: worker, id of the entry, the entry, for how many ms it is there, retention in seconds.
DELIVER = "enqueue(unpack(ARGV))"

# ARGV: id, key as asked, doc, worker, digest of the request ("" without an Idempotency-Key), how many may be queued at
# the worker, and in all, retention in seconds, an instance id that it must get (or ""), "1" to try what crashed lately,
# the id under which that instance must be wanted (or ""), the entry that delivers it (or "" for none) and for how many
# ms that is there, and what to add to `tallies`: a field, a number, ...
CREATE = """
local inst, log, names, insts, counters, lease, idem = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local id, name, doc, worker, digest, n = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], 1
local at = redis.call('HMGET', inst, 'instance_id', 'at')
if at[1] then return {'created', at[1], at[2]} end
if digest ~= '' then
  local first = redis.call('HMGET', idem, 'digest', 'id')
  if first[1] then return {'remembered', first[1], first[2]} end
end
local reason = ARGV[10] == '' and redis.call('GET', KEYS[8])
if reason then return {'crashed', reason, redis.call('TTL', KEYS[8])} end
if redis.call('EXISTS', lease, KEYS[9]) < 2 then return {'no lease'} end
local now = redis.call('TIME'); now = now[1] * 1000000 + now[2]
for i, place in ipairs({':' .. worker, ''}) do
  if redis.call('SCARD', 'queued' .. place) >= tonumber(ARGV[5 + i]) then
    local left = redis.call('LRANGE', 'pace' .. place, 0, -1)
    return {'full', ARGV[5 + i], #left, #left > 0 and string.format('%.0f', now - left[#left]) or 0}
  end
end
if ARGV[9] ~= '' then
  name = ARGV[9]
  local wanted = 'wanted:' .. worker
  if ARGV[11] ~= '' and redis.call('HGET', wanted, name) ~= ARGV[11] then return {'unwanted'} end
  if redis.call('HEXISTS', names, name) == 1 then return {'name taken'} end
  redis.call('HSET', wanted, name, id)
  redis.call('EXPIRE', wanted, ARGV[8])
end
while redis.call('HEXISTS', names, name) == 1 do n = n + 1; name = ARGV[2] .. ':' .. n end
local since = string.format('(%.0f', now - ARGV[8] * 1000000); now = string.format('%.0f', now)
redis.call('HSET', inst, 'rev', 1, 'instance_id', name, 'worker', worker, 'at', now, 'doc', doc, 'state', 'queued')
redis.call('XADD', log, '*', 'rev', 1, 'doc', doc)
redis.call('HSET', names, name, id)
redis.call('SADD', insts, id)
redis.call('SADD', 'insts:' .. worker, id)
redis.call('SADD', 'queued', id)
redis.call('SADD', 'queued:' .. worker, id)
redis.call('ZADD', 'jobs', now, id)
redis.call('ZREMRANGEBYSCORE', 'jobs', '-inf', since)
redis.call('EXPIRE', 'jobs', ARGV[8])
if digest ~= '' then
  redis.call('HSET', idem, 'digest', digest, 'id', id)
  redis.call('EXPIRE', idem, ARGV[8])
end
redis.call('HINCRBY', counters, 'queued', 1)
for i = 14, #ARGV, 2 do redis.call('HINCRBY', 'tallies', ARGV[i], ARGV[i + 1]) end
if ARGV[12] ~= '' then enqueue(worker, id .. ':1', ARGV[12], ARGV[13], ARGV[8]) end
redis.call('PUBLISH', 'news', id)
return {'created', name, now}
"""

# Compare the revision, write the document, tell everybody.  ARGV: id, rev, rev + 1, doc, state if it changed, retention
# in seconds if it is terminal, worker if it is requeued, retention if it is wanted from now on or "no" if not any more,
# epoch of the process that claimed it, and what to add to `tallies`: a field, a number, ...
# Answers Redis' time in microseconds; false to whoever was overtaken by another writer, "stop" where the wish to stop
# what was to be loaded came first.
COMMIT = """
local held = redis.call('HMGET', KEYS[1], 'rev', 'doc', 'instance_id', 'worker', 'stop')
local now = redis.call('TIME'); now = string.format('%.0f', now[1] * 1000000 + now[2])
if held[1] == ARGV[3] and held[2] == ARGV[4] then return now end
if held[1] ~= ARGV[2] then return false end
if ARGV[5] == 'loaded' and held[5] then return 'stop' end
redis.call('HSET', KEYS[1], 'rev', ARGV[3], 'doc', ARGV[4], 'epoch', ARGV[9])
redis.call('XADD', KEYS[2], '*', 'rev', ARGV[3], 'doc', ARGV[4])
for i = 10, #ARGV, 2 do redis.call('HINCRBY', 'tallies', ARGV[i], ARGV[i + 1]) end
if ARGV[7] ~= '' then
  redis.call('HSET', KEYS[1], 'state', 'queued', 'worker', ARGV[7])
  redis.call('HINCRBY', KEYS[5], 'requeued', 1)
  redis.call('SREM', 'insts:' .. held[4], ARGV[1])
  redis.call('SADD', 'insts:' .. ARGV[7], ARGV[1])
  redis.call('SREM', 'queued:' .. held[4], ARGV[1])
  redis.call('SADD', 'queued', ARGV[1])
  redis.call('SADD', 'queued:' .. ARGV[7], ARGV[1])
  redis.call('PUBLISH', 'requeued', ARGV[1])
elseif ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'state', ARGV[5])
  redis.call('HINCRBY', KEYS[5], ARGV[5], 1)
  if redis.call('SREM', 'queued', ARGV[1]) == 1 then
    redis.call('SREM', 'queued:' .. held[4], ARGV[1])
    for _, pace in ipairs({'pace', 'pace:' .. held[4]}) do
      redis.call('LPUSH', pace, now)
      redis.call('LTRIM', pace, 0, 15)
      redis.call('EXPIRE', pace, 3600)
    end
  end
end
local wanted = 'wanted:' .. held[4]
if ARGV[8] == 'no' then
  if redis.call('HGET', wanted, held[3]) == ARGV[1] then redis.call('HDEL', wanted, held[3]) end
elseif ARGV[8] ~= '' then
  redis.call('HSET', wanted, held[3], ARGV[1])
  redis.call('EXPIRE', wanted, ARGV[8])
end
if ARGV[6] ~= '' then
  if redis.call('HGET', KEYS[3], held[3]) == ARGV[1] then redis.call('HDEL', KEYS[3], held[3]) end
  redis.call('SREM', KEYS[4], ARGV[1])
  redis.call('SREM', 'insts:' .. held[4], ARGV[1])
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  redis.call('EXPIRE', KEYS[2], ARGV[6])
end
redis.call('PUBLISH', 'news', ARGV[1])
return now
"""

# Write again what Redis lost of a loaded instance, if it did: what it lost may be that this worker took it from the
# queue, perhaps another's.  ARGV: id, instance id, rev, worker, creation, doc, retention in seconds, epoch.
REWRITE = """
local held, holder = redis.call('HMGET', KEYS[1], 'rev', 'worker'), redis.call('HGET', KEYS[3], ARGV[2])
local rev = held[1]
if rev and tonumber(rev) == tonumber(ARGV[3]) then return 'there' end
if rev and tonumber(rev) > tonumber(ARGV[3]) then return 'newer' end
if holder and holder ~= ARGV[1] then return 'name taken' end
if rev then
  for _, place in ipairs({'insts:' .. held[2], 'queued:' .. held[2], 'queued'}) do
    redis.call('SREM', place, ARGV[1])
  end
end
redis.call('HSET', KEYS[1], 'rev', ARGV[3], 'instance_id', ARGV[2], 'worker', ARGV[4], 'at', ARGV[5], 'doc', ARGV[6],
  'state', 'loaded', 'epoch', ARGV[8])
redis.call('HSET', 'wanted:' .. ARGV[4], ARGV[2], ARGV[1])
redis.call('EXPIRE', 'wanted:' .. ARGV[4], ARGV[7])
redis.call('XADD', KEYS[2], '*', 'rev', ARGV[3], 'doc', ARGV[6])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[1])
redis.call('SADD', KEYS[4], ARGV[1])
redis.call('SADD', 'insts:' .. ARGV[4], ARGV[1])
redis.call('PUBLISH', 'news', ARGV[1])
return 'written'
"""

# The same fields of many records.  ARGV: how many fields, the fields, ids.
READ = """
local found, n = {}, ARGV[1] + 1
for i = n + 1, #ARGV do found[i - n] = redis.call('HMGET', 'inst:' .. ARGV[i], unpack(ARGV, 2, n)) end
return found
"""

# ARGV: id, "1" to wish it only of what is not loaded yet.  False where there is no such record.
STOP = """
local held = redis.call('HMGET', KEYS[1], 'worker', 'state')
if not held[1] then return false end
if ARGV[2] == '1' and held[2] ~= 'queued' and held[2] ~= 'loading' then return held[2] end
redis.call('HSET', KEYS[1], 'stop', 1)
redis.call('PUBLISH', 'wake:' .. held[1], ARGV[1])
return held[2]
"""

# Have an instance wanted no more, unless it is another load of that name.  ARGV: instance id, id.
UNWANT = """
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
"""

# Keep what the engine said with its record, unless that is another worker's by now, for as many as ARGV[3] of those
# that have ended.  ARGV: text, id, that number, retention in seconds, worker.
ENGINE_LOG = """
if redis.call('HGET', KEYS[1], 'worker') ~= ARGV[5] then return end
if redis.call('HSET', KEYS[1], 'engine', ARGV[1]) == 0 then return end
redis.call('LPUSH', KEYS[2], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[4])
if redis.call('LLEN', KEYS[2]) <= tonumber(ARGV[3]) then return end
local old = redis.call('RPOP', KEYS[2])
if redis.call('SISMEMBER', KEYS[3], old) == 1 then redis.call('LPUSH', KEYS[2], old)
else redis.call('HDEL', 'inst:' .. old, 'engine') end
"""

# What there is of some workers: the lease, the snapshot, what is left of the lease in ms.  ARGV: names.
WORKERS = """
local found = {}
for i, name in ipairs(ARGV) do
  local lease = 'lease:' .. name
  found[i] = {redis.call('GET', lease), redis.call('GET', 'worker:' .. name), redis.call('PTTL', lease)}
end
return found
"""

# ARGV: epoch, an older epoch that is known to be dead, lease in ms, snapshot, name, now in s, retention in s
RENEW = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] and held ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[3])
redis.call('ZADD', KEYS[4], ARGV[6], ARGV[5])
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', ARGV[6] - ARGV[7])
redis.call('EXPIRE', 'wanted:' .. ARGV[5], ARGV[7])
return 1 + redis.call('EXPIRE', KEYS[3], ARGV[7])
"""

# Publish what is new of a worker whose lease we hold, until that runs out.  ARGV: epoch, snapshot.
ANNOUNCE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[2], ARGV[2], 'XX', 'KEEPTTL') end
"""

# Publish a catalog, unless another process holds the worker's lease.  ARGV: epoch, an older epoch that is known to be
# dead, catalog, retention in seconds.
CATALOG = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] and held ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
return 1
"""

RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1], KEYS[2]) end
"""

# Add what a process has counted, once.  ARGV: the number of its batch, retention in seconds, a field, a number, ...
TALLY = """
if tonumber(redis.call('GET', KEYS[1]) or 0) >= tonumber(ARGV[1]) then return end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
for i = 3, #ARGV, 2 do redis.call('HINCRBY', 'tallies', ARGV[i], ARGV[i + 1]) end
"""
