-- Writes the record of a loaded instance again if Redis lost the record or its last revisions.  The lost revisions may
-- include the claim by this worker, even a move from the queue of another worker.
--   id, instance_id, of (full key of the model), rev, worker, at (creation, microseconds, as text), doc, epoch, retain_s
local a = cmsgpack.unpack(ARGV[1])
local inst, log, names, insts = unpack(KEYS)

local held, holder = redis.call('HMGET', inst, 'rev', 'worker'), redis.call('HGET', names, a.instance_id)
local rev = tonumber(held[1])
if rev and rev == a.rev then return 'there' end
if rev and rev > a.rev then return 'newer' end
if holder and holder ~= a.id then return 'name taken' end
if rev then
  for _, place in ipairs({'insts:' .. held[2], 'queued:' .. held[2], 'queued'}) do redis.call('SREM', place, a.id) end
end
redis.call('HSET', inst, 'rev', a.rev, 'instance_id', a.instance_id, 'worker', a.worker, 'at', a.at, 'doc', a.doc,
  'state', 'loaded', 'epoch', a.epoch, 'of', a.of)
redis.call('HSET', 'wanted:' .. a.worker, a.instance_id, a.id)
redis.call('EXPIRE', 'wanted:' .. a.worker, a.retain_s)
redis.call('XADD', log, '*', 'rev', a.rev, 'doc', a.doc)
redis.call('HSET', names, a.instance_id, a.id)
redis.call('SADD', insts, a.id)
redis.call('SADD', 'insts:' .. a.worker, a.id)
redis.call('SADD', 'copies:' .. a.of, a.id)
redis.call('PUBLISH', 'news', a.id)
return 'written'
