-- Reads the same fields of many records.
--   fields, ids
local a = cmsgpack.unpack(ARGV[1])
local found = {}
for i, id in ipairs(a.ids) do found[i] = redis.call('HMGET', 'inst:' .. id, unpack(a.fields)) end
return found
