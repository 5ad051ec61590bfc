-- Puts one entry into a worker's queue.
--   worker, id, entry, expires_ms, retain_s   see enqueue.lua
local a = cmsgpack.unpack(ARGV[1])
enqueue(a.worker, a.id, a.entry, a.expires_ms, a.retain_s)
