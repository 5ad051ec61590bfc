-- Requests that an instance be stopped.
--   id
--   unless_loaded   do nothing if the load has ended
-- Returns the current state, false if there is no such record.
local a = cmsgpack.unpack(ARGV[1])
local held = redis.call('HMGET', KEYS[1], 'worker', 'state')
if not held[1] then return false end
if a.unless_loaded and held[2] ~= 'queued' and held[2] ~= 'loading' then return held[2] end
redis.call('HSET', KEYS[1], 'stop', 1)
redis.call('PUBLISH', 'wake:' .. held[1], a.id)
return held[2]
