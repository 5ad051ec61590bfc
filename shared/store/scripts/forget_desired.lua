-- Removes an instance from the desired ones of its worker, unless another load has its name meanwhile.
--   instance_id, id
local a = cmsgpack.unpack(ARGV[1])
if redis.call('HGET', KEYS[1], a.instance_id) == a.id then redis.call('HDEL', KEYS[1], a.instance_id) end
