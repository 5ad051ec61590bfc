-- Writes the record of a new download, unless there is one to use instead.
--   id, doc, worker, target, created (seconds), retain_s
--   key       digest of an Idempotency-Key, and
--   digest    that of its request
-- Returns {outcome, id, digest}: "created", "remembered" for a known key, "joined" if the same is on its way.
local a = cmsgpack.unpack(ARGV[1])
local record, remembered, target = KEYS[1], KEYS[2], KEYS[3]
local function remember(id)
  if a.key then
    redis.call('HSET', remembered, 'id', id, 'digest', a.digest)
    redis.call('EXPIRE', remembered, a.retain_s)
  end
end
if a.key then
  local held = redis.call('HMGET', remembered, 'id', 'digest')
  if held[1] then return {'remembered', held[1], held[2]} end
end
local live = redis.call('GET', target)
if live and redis.call('EXISTS', 'download:' .. live) == 1 then
  remember(live)
  return {'joined', live, ''}
end
redis.call('HSET', record, 'rev', 1, 'doc', a.doc, 'worker', a.worker)
redis.call('EXPIRE', record, a.retain_s)
redis.call('SET', target, a.id, 'EX', a.retain_s)
redis.call('SADD', 'downloads:' .. a.worker, a.id)
redis.call('ZREMRANGEBYSCORE', 'downloads', '-inf', a.created - a.retain_s)
redis.call('ZADD', 'downloads', a.created, a.id)
redis.call('EXPIRE', 'downloads', a.retain_s)
redis.call('EXPIRE', 'downloads:' .. a.worker, a.retain_s)
remember(a.id)
redis.call('PUBLISH', 'wake:' .. a.worker, a.id)
return {'created', a.id, ''}
