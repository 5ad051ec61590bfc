-- Deletes the lease and the snapshot of a worker if this process holds the lease.
--   epoch
local a = cmsgpack.unpack(ARGV[1])
if redis.call('GET', KEYS[1]) == a.epoch then redis.call('DEL', KEYS[1], KEYS[2]) end
