-- Removes responses of one owner, for the scripts that this precedes.
--   records   the beginning of the keys of its records
local a = cmsgpack.unpack(ARGV[1])
local index, sizes = KEYS[1], KEYS[2]
local function drop(id)
  local n_bytes = redis.call('HGET', sizes, id)
  if n_bytes then
    redis.call('HINCRBY', sizes, 'sum', -tonumber(n_bytes))
    redis.call('HDEL', sizes, id)
  end
  redis.call('ZREM', index, id)
  return redis.call('DEL', a.records .. id)
end
