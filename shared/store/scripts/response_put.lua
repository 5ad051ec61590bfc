-- Writes a response, and removes the oldest ones of its owner until the rest is within its bounds.
--   id, response, conversation, n_bytes
--   most, most_bytes, retain_s   the bounds, which this response alone does not exceed
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now - a.retain_s * 1000000)) do drop(id) end
drop(a.id)
redis.call('HSET', a.records .. a.id, 'response', a.response, 'conversation', a.conversation)
redis.call('EXPIRE', a.records .. a.id, a.retain_s)
redis.call('ZADD', index, now, a.id)
redis.call('HSET', sizes, a.id, a.n_bytes)
redis.call('HINCRBY', sizes, 'sum', a.n_bytes)
while redis.call('ZCARD', index) > a.most or tonumber(redis.call('HGET', sizes, 'sum')) > a.most_bytes do
  drop(redis.call('ZRANGE', index, 0, 0)[1])
end
redis.call('EXPIRE', index, a.retain_s)
redis.call('EXPIRE', sizes, a.retain_s)
