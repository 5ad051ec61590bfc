-- Publishes a catalog, unless another process holds the worker's lease.
--   epoch, dead_epoch (an older one that is known to be dead), catalog, retain_s
-- Returns whether it was published.
local a = cmsgpack.unpack(ARGV[1])
local held = redis.call('GET', KEYS[1])
if held and held ~= a.epoch and held ~= a.dead_epoch then return 0 end
redis.call('SET', KEYS[2], a.catalog, 'EX', a.retain_s)
return 1
