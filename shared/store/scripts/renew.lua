-- Renews a worker's lease and publishes its snapshot.
--   name, epoch, dead_epoch (an older one that is known to be dead), lease_ms, snapshot, now_s, retain_s
-- Returns 0 if another process holds the lease, 1 if Redis has no catalog of this worker, else 2.
local a = cmsgpack.unpack(ARGV[1])
local lease, snapshot, catalog, workers = unpack(KEYS)
local held = redis.call('GET', lease)
if held and held ~= a.epoch and held ~= a.dead_epoch then return 0 end
redis.call('SET', lease, a.epoch, 'PX', a.lease_ms)
redis.call('SET', snapshot, a.snapshot, 'PX', a.lease_ms)
redis.call('ZADD', workers, a.now_s, a.name)
redis.call('ZREMRANGEBYSCORE', workers, '-inf', a.now_s - a.retain_s)
redis.call('EXPIRE', 'wanted:' .. a.name, a.retain_s)
redis.call('EXPIRE', 'used:' .. a.name, a.retain_s)
return 1 + redis.call('EXPIRE', catalog, a.retain_s)
