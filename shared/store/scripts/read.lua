-- Reads the requested fields of each record.
--   fields, ids
local a = cmsgpack.unpack(ARGV[1])
local rows = {}
for i, id in ipairs(a.ids) do rows[i] = redis.call('HMGET', 'inst:' .. id, unpack(a.fields)) end
return rows
