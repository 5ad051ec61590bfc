-- Reads of each worker its lease, its snapshot, and how many ms are left of the lease.
--   names
local a = cmsgpack.unpack(ARGV[1])
local found = {}
for i, name in ipairs(a.names) do
  local lease = 'lease:' .. name
  found[i] = {redis.call('GET', lease), redis.call('GET', 'worker:' .. name), redis.call('PTTL', lease)}
end
return found
