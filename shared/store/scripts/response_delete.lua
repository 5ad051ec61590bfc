-- Removes responses of one owner.
--   ids   those to remove; absent: all
-- Returns how many there were.
local n = 0
for _, id in ipairs(a.ids or redis.call('ZRANGE', index, 0, -1)) do n = n + drop(id) end
return n
