-- Requests that a download be paused, resumed or cancelled.
--   id, wanted, retain_s
-- Returns false if there is no such record.
local a = cmsgpack.unpack(ARGV[1])
local worker = redis.call('HGET', KEYS[1], 'worker')
if not worker then return false end
redis.call('HSET', KEYS[1], 'wanted', a.wanted)
redis.call('SADD', 'downloads:' .. worker, a.id)
redis.call('EXPIRE', 'downloads:' .. worker, a.retain_s)
redis.call('PUBLISH', 'wake:' .. worker, a.id)
return 1
