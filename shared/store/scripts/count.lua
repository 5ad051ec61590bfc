-- Adds a batch of counts of a process to `tallies`, unless it was added before.
--   number (of the batch), retain_s, counts
local a = cmsgpack.unpack(ARGV[1])
if tonumber(redis.call('GET', KEYS[1]) or 0) >= a.number then return end
redis.call('SET', KEYS[1], a.number, 'EX', a.retain_s)
for field, count in pairs(a.counts) do redis.call('HINCRBY', 'tallies', field, count) end
