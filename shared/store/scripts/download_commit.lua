-- Writes a revision of the record of a download, which only its worker does.
--   id, rev, doc, worker, created, retain_s
--   over   nothing happens to the download until a client asks
--   done   the request of a client that this revision fulfils
-- Returns false if Redis has a later revision.
local a = cmsgpack.unpack(ARGV[1])
local record, target = KEYS[1], KEYS[2]
local held = redis.call('HMGET', record, 'rev', 'doc')
local rev = tonumber(held[1] or 0)
if rev > a.rev or (rev == a.rev and held[2] ~= a.doc) then return false end
redis.call('HSET', record, 'rev', a.rev, 'doc', a.doc, 'worker', a.worker)
redis.call('EXPIRE', record, a.retain_s)
if a.done and redis.call('HGET', record, 'wanted') == a.done then redis.call('HDEL', record, 'wanted') end
redis.call('ZADD', 'downloads', a.created, a.id)
redis.call('EXPIRE', 'downloads', a.retain_s)
if a.over then
  if not redis.call('HGET', record, 'wanted') then redis.call('SREM', 'downloads:' .. a.worker, a.id) end
  if redis.call('GET', target) == a.id then redis.call('DEL', target) end
else
  redis.call('SADD', 'downloads:' .. a.worker, a.id)
  redis.call('EXPIRE', 'downloads:' .. a.worker, a.retain_s)
  redis.call('SET', target, a.id, 'EX', a.retain_s)
end
redis.call('PUBLISH', 'download_news', a.id)
return 1
