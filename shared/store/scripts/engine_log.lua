-- Keeps what the engine logged in a load with its record, unless that is another worker's by now.  Of the loads that
-- have ended, the last `kept` ones keep it.
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
