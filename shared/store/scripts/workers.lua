-- Reads the lease, the snapshot and the remaining time of the lease (ms) of each worker.
--   names
local a = cmsgpack.unpack(ARGV[1])
local rows = {}
for i, name in ipairs(a.names) do
  local lease = 'lease:' .. name
  rows[i] = {redis.call('GET', lease), redis.call('GET', 'worker:' .. name), redis.call('PTTL', lease)}
end
return rows
