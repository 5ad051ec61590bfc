-- Replaces the snapshot of a worker that holds its lease; keeps its expiry.
--   epoch, snapshot
local a = cmsgpack.unpack(ARGV[1])
if redis.call('GET', KEYS[1]) == a.epoch then redis.call('SET', KEYS[2], a.snapshot, 'XX', 'KEEPTTL') end
