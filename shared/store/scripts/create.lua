-- Writes a queued record under a free instance id, and optionally its delivery.
--   id, doc, worker
--   model          the key in the request: the name of the instance, followed by :2, :3, ... if it is taken
--   instance_id    the required name of the instance, or absent
--   digest         of the request that came with an Idempotency-Key, or absent
--   joins          whether to join the oldest identical load under way whose requester has left
--   of             the full key of the model
--   on_demand      whether to join the oldest instance of the model that is queued, loading or loaded
--   without        ids of instances that are not joined, and whose failure does not count
--   worker_limit, limit   maximum queue length of the worker, and of the whole pool
--   ignore_crash   whether to accept a model that crashed the engine recently
--   restores       the id of the load for which the instance must still be desired, or absent
--   entry, expires_ms     the delivery (enqueue.lua); absent: none
--   retain_s       seconds
--   counts         what to add to `tallies`
local a = cmsgpack.unpack(ARGV[1])
local inst, log, names, insts, counters, lease, idem, crashed, catalog, left, copies, failed = unpack(KEYS)

local made = redis.call('HMGET', inst, 'instance_id', 'at')
if made[1] then return {'created', made[1], made[2]} end
if a.digest then
  local first = redis.call('HMGET', idem, 'digest', 'id')
  if first[1] then return {'remembered', first[1], first[2]} end
end
if a.joins then
  local abandoned, oldest = redis.call('HGETALL', left), nil
  for i = 1, #abandoned, 2 do
    local other, joiner = abandoned[i], abandoned[i + 1]
    local state, stop, at = unpack(redis.call('HMGET', 'inst:' .. other, 'state', 'stop', 'at'))
    if joiner == a.id then return {'joined', other} end
    if (state ~= 'queued' and state ~= 'loading') or stop then
      redis.call('HDEL', left, other)
    elseif joiner == '' and (not oldest or tonumber(at) < oldest.at) then
      oldest = {id = other, at = tonumber(at)}
    end
  end
  if oldest then
    redis.call('HSET', left, oldest.id, a.id)
    return {'joined', oldest.id}
  end
end
if a.on_demand then
  local without, oldest = {}, nil
  for _, other in ipairs(a.without) do without[other] = true end
  for _, other in ipairs(redis.call('SMEMBERS', copies)) do
    local state, stop, at, worker, epoch =
      unpack(redis.call('HMGET', 'inst:' .. other, 'state', 'stop', 'at', 'worker', 'epoch'), 1, 5)
    local comes = state == 'queued' or state == 'loading'  -- also if its worker is gone: it is requeued
    local is_there = state == 'loaded' and redis.call('GET', 'lease:' .. worker) == epoch
    if not state then
      redis.call('SREM', copies, other)
    elseif (comes or is_there) and not stop and not without[other] and (not oldest or tonumber(at) < oldest.at) then
      oldest = {id = other, at = tonumber(at)}
    end
  end
  if oldest then return {'joined', oldest.id} end
  local last = redis.call('GET', failed)
  if last and not without[last] then return {'failed', last, redis.call('TTL', failed)} end
end
local reason = not a.ignore_crash and redis.call('GET', crashed)
if reason then return {'crashed', reason, redis.call('TTL', crashed)} end
if redis.call('EXISTS', lease, catalog) < 2 then return {'no lease'} end

local now = redis.call('TIME'); now = now[1] * 1000000 + now[2]
for _, bound in ipairs({{':' .. a.worker, a.worker_limit}, {'', a.limit}}) do
  local place, limit = unpack(bound)
  if redis.call('SCARD', 'queued' .. place) >= limit then
    local left = redis.call('LRANGE', 'pace' .. place, 0, -1)
    return {'full', limit, #left, #left > 0 and string.format('%.0f', now - left[#left]) or 0}
  end
end

local name, n = a.model, 1
if a.instance_id then
  name = a.instance_id
  local desired = 'wanted:' .. a.worker
  if a.restores and redis.call('HGET', desired, name) ~= a.restores then return {'not desired'} end
  if redis.call('HEXISTS', names, name) == 1 then return {'name taken'} end
  redis.call('HSET', desired, name, a.id)
  redis.call('EXPIRE', desired, a.retain_s)
end
while redis.call('HEXISTS', names, name) == 1 do n = n + 1; name = a.model .. ':' .. n end

local since = string.format('(%.0f', now - a.retain_s * 1000000); now = string.format('%.0f', now)
redis.call('HSET', inst, 'rev', 1, 'instance_id', name, 'worker', a.worker, 'at', now, 'doc', a.doc, 'state', 'queued',
  'of', a.of)
redis.call('XADD', log, '*', 'rev', 1, 'doc', a.doc)
redis.call('HSET', names, name, a.id)
redis.call('SADD', insts, a.id)
redis.call('SADD', 'insts:' .. a.worker, a.id)
redis.call('SADD', copies, a.id)
redis.call('SADD', 'queued', a.id)
redis.call('SADD', 'queued:' .. a.worker, a.id)
redis.call('ZADD', 'jobs', now, a.id)
redis.call('ZREMRANGEBYSCORE', 'jobs', '-inf', since)
redis.call('EXPIRE', 'jobs', a.retain_s)
if a.digest then
  redis.call('HSET', idem, 'digest', a.digest, 'id', a.id)
  redis.call('EXPIRE', idem, a.retain_s)
end
redis.call('HINCRBY', counters, 'queued', 1)
for field, count in pairs(a.counts) do redis.call('HINCRBY', 'tallies', field, count) end
if a.entry then enqueue(a.worker, a.id .. ':1', a.entry, a.expires_ms, a.retain_s) end
redis.call('PUBLISH', 'news', a.id)
return {'created', name, now}
