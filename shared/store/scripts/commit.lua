-- Compares the revision, writes the next document, and publishes the change.
--   id, rev, doc, epoch of the process that claimed it ('' before)
--   state          if it changed, else absent
--   ended          whether that state is terminal
--   requeued_at    if it was requeued, the worker in whose queue it is now
--   failed         the key that remembers the last failure of a load of its model on demand, or absent
--   forgets        whether to delete that key; else it is set
--   remember_s     for how many seconds
--   desired        true: add to the desired instances of its worker; false: remove; absent: no change
--   retain_s       seconds
--   counts         what to add to `tallies`
-- Returns the time of Redis in microseconds, false if another writer was faster, or 'stop' if the instance would become
-- loaded but a stop was requested before.
local a = cmsgpack.unpack(ARGV[1])
local inst, log, names, insts, counters = unpack(KEYS)
local next_rev = string.format('%d', a.rev + 1)

local held = redis.call('HMGET', inst, 'rev', 'doc', 'instance_id', 'worker', 'stop', 'of')
local rev, doc, name, worker, stop, of = unpack(held, 1, 6)
local now = redis.call('TIME'); now = string.format('%.0f', now[1] * 1000000 + now[2])
if rev == next_rev and doc == a.doc then return now end
if rev ~= string.format('%d', a.rev) then return false end
if a.state == 'loaded' and stop then return 'stop' end

redis.call('HSET', inst, 'rev', next_rev, 'doc', a.doc, 'epoch', a.epoch)
redis.call('XADD', log, '*', 'rev', next_rev, 'doc', a.doc)
for field, count in pairs(a.counts) do redis.call('HINCRBY', 'tallies', field, count) end

if a.requeued_at then
  redis.call('HSET', inst, 'state', 'queued', 'worker', a.requeued_at)
  redis.call('HINCRBY', counters, 'requeued', 1)
  redis.call('SREM', 'insts:' .. worker, a.id)
  redis.call('SADD', 'insts:' .. a.requeued_at, a.id)
  redis.call('SREM', 'queued:' .. worker, a.id)
  redis.call('SADD', 'queued', a.id)
  redis.call('SADD', 'queued:' .. a.requeued_at, a.id)
  redis.call('PUBLISH', 'requeued', a.id)
elseif a.state then
  redis.call('HSET', inst, 'state', a.state)
  redis.call('HINCRBY', counters, a.state, 1)
  if redis.call('SREM', 'queued', a.id) == 1 then
    redis.call('SREM', 'queued:' .. worker, a.id)
    for _, rate in ipairs({'pace', 'pace:' .. worker}) do
      redis.call('LPUSH', rate, now)
      redis.call('LTRIM', rate, 0, 15)
      redis.call('EXPIRE', rate, 3600)
    end
  end
end

local desired = 'wanted:' .. worker
if a.desired == false then
  if redis.call('HGET', desired, name) == a.id then redis.call('HDEL', desired, name) end
elseif a.desired then
  redis.call('HSET', desired, name, a.id)
  redis.call('EXPIRE', desired, a.retain_s)
end

if a.failed and a.forgets then
  redis.call('DEL', a.failed)
elseif a.failed then
  redis.call('SET', a.failed, a.id, 'EX', a.remember_s)
end

if a.ended then
  if of then redis.call('SREM', 'copies:' .. of, a.id) end
  if redis.call('HGET', names, name) == a.id then redis.call('HDEL', names, name) end
  redis.call('SREM', insts, a.id)
  redis.call('SREM', 'insts:' .. worker, a.id)
  redis.call('EXPIRE', inst, a.retain_s)
  redis.call('EXPIRE', log, a.retain_s)
end
redis.call('PUBLISH', 'news', a.id)
return now
