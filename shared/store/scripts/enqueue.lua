-- Prepended to create.lua and deliver.lua: writes an entry in arq's format into a worker's queue and wakes the worker.
-- ArqRedis.enqueue_job (arq 0.28, arq/connections.py) needs three round trips for this, because it first checks whether
-- the id exists.  Here, an existing entry with the same id has the same content.
-- The score is in ms, as arq writes it, but has the microseconds as a fraction: entries are read by score, and those of
-- one score by id.  It is 1 ms early, because arq reads only up to its own time in whole ms.
--   worker, id of the entry, entry, ms after which the entry expires, seconds after which an idle queue expires
local function enqueue(worker, id, entry, expires_ms, retain_s)
  local queue, now = 'arq:queue:' .. worker, redis.call('TIME')
  redis.call('PSETEX', 'arq:job:' .. id, expires_ms, entry)
  redis.call('ZADD', queue, string.format('%.3f', now[1] * 1000 + now[2] / 1000 - 1), id)
  redis.call('EXPIRE', queue, retain_s)
  redis.call('PUBLISH', 'wake:' .. worker, '')
end

