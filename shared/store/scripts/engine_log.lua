-- Stores the engine's log of a load with its record, unless the load belongs to another worker meanwhile.  Deletes the
-- oldest log of an ended load if there are more than `kept`.
--   id, text, worker, kept, retain_s
local a = cmsgpack.unpack(ARGV[1])
local inst, logs, insts = unpack(KEYS)
if redis.call('HGET', inst, 'worker') ~= a.worker then return end
if redis.call('HSET', inst, 'engine', a.text) == 0 then return end
redis.call('LPUSH', logs, a.id)
redis.call('EXPIRE', logs, a.retain_s)
if redis.call('LLEN', logs) <= a.kept then return end
local old = redis.call('RPOP', logs)
if redis.call('SISMEMBER', insts, old) == 1 then redis.call('LPUSH', logs, old)
else redis.call('HDEL', 'inst:' .. old, 'engine') end
