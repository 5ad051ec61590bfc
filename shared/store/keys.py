"""Every key in Redis: its type, its content and its expiry.

  inst:{id}         hash    rev, instance_id, worker, at (creation, Redis' clock, microseconds), doc (msgpack), state,
                            epoch, stop (a stop was requested), engine (log lines), of (the
                            full key of the model)
                                                              expires RETAIN_S after a terminal state
  inst:{id}:log     stream  rev, doc: one entry a revision     expires with inst:{id}
  insts             set     ids of instances that are not terminal; insts:{worker} those of one worker
  logs              list    ids of instances with an engine log; of ended loads, the last ENGINE_LOGS_N keep theirs
                                                              expires RETAIN_S after the last write
  copies:{key}      set     ids of the instances of the model with this full key that are not terminal
  names             hash    instance_id -> id, of instances that are not terminal
  queued            set     ids in state queued; queued:{worker} those of one worker
  pace              list    times (microseconds) at which the last 16 loads left the queue; pace:{worker} of one worker
                                                              expires an hour after the last write
  jobs              zset    id -> creation (microseconds), of the last RETAIN_S; expires RETAIN_S after the last write
  idem:{digest}     hash    id of the load and digest of the request of an Idempotency-Key; expires after RETAIN_S
  left:{digest}     hash    of the digest of a request: id of a load whose requester left before its outcome -> "", or
                            once another request has joined the load, the id that its own load would have had
                                                              expires RETAIN_S after the last write
  crashed:{digest}  string  why a model (Model.fingerprint) crashed the engine; expires after CRASH_MEMORY_S
  failed:{digest}   string  id of the last load on demand of a model (Model.fingerprint), if it failed
                                                              expires after FAILURE_MEMORY_S
  wanted:{worker}   hash    instance_id -> id: the desired instances of a worker
                                                              expires RETAIN_S after its last beat
  used:{worker}     hash    id -> last use (seconds) of the desired instances of a worker
                                                              expires RETAIN_S after its last beat
  download:{id}     hash    rev, worker, doc (msgpack), wanted (the request of a client that is not fulfilled yet)
                                                              expires DOWNLOAD_RETAIN_S after the last write
  downloads         zset    id -> creation (seconds), of the last DOWNLOAD_RETAIN_S
                                                              expires DOWNLOAD_RETAIN_S after the last write
  downloads:{worker} set    ids that a worker has to look at; expires as above
  downloading:{target} string  id of the live download of the same files to the same place
                                                              expires DOWNLOAD_RETAIN_S after the last write
  fetched:{digest}  hash    id of the download and digest of the request of an Idempotency-Key
                                                              expires DOWNLOAD_RETAIN_S after the request
  response:{client}:{id} hash  response (JSON) and conversation (JSON) of a response, which belongs to a client
                                                              expires after LOADSTONE_RESPONSES_RETAIN_S
  responses:{client} zset   id -> creation (microseconds); expires that long after the last write
  response_bytes:{client} hash  id -> bytes, and "sum" -> those of all; expires that long after the last write
  workers           zset    name -> time of the last beat (seconds); removed after RETAIN_S
  lease:{worker}    string  epoch of its process               expires a lease after its last beat
  worker:{worker}   string  WorkerSnapshot (msgpack)           expires with the lease
  catalog:{worker}  string  list[Model] (msgpack)              expires RETAIN_S after the last beat
  counters          hash    number of instances that entered each state, and number of requeues
  tallies           hash    other counters of /metrics: "family|label|..." (`telemetry.tally`) -> an integer
  tallied:{id}      string  number of the last batch that a process added to `tallies`; expires RETAIN_S after it
  arq:*             arq's own  queue, jobs and health check of each worker; queues expire RETAIN_S after the last entry
  wake:{worker}     channel "" for a delivery in the worker's queue, the id of a load for a stop request, that of a
                            download if it has news
  news              channel ids of changed records of loads
  download_news     channel ids of changed downloads
  requeued          channel ids of requeued loads

Scripts access several keys and build some of the names themselves, so Redis Cluster is not supported.
"""

from __future__ import annotations

RETAIN_S = 24 * 3600
DOWNLOAD_RETAIN_S = 7 * RETAIN_S
CRASH_MEMORY_S = 600
FAILURE_MEMORY_S = 30
INSTANCES, LOGS, NAMES, QUEUED, JOBS = "insts", "logs", "names", "queued", "jobs"
WORKERS, COUNTERS, TALLIES = "workers", "counters", "tallies"
DOWNLOADS = "downloads"
NEWS, DOWNLOAD_NEWS, REQUEUED = "news", "download_news", "requeued"  # channels


def instance(id_: str) -> str:
    return f"inst:{id_}"


def log_of(id_: str) -> str:
    return f"inst:{id_}:log"


def instances_at(worker: str) -> str:
    return f"insts:{worker}"


def queued_at(worker: str) -> str:
    return f"queued:{worker}"


def idempotency(digest: str) -> str:
    return f"idem:{digest}"


def left(digest: str) -> str:
    return f"left:{digest}"


def crash(fingerprint: str) -> str:
    return f"crashed:{fingerprint}"


def copies(key: str) -> str:
    return f"copies:{key}"


def failure(fingerprint: str) -> str:
    return f"failed:{fingerprint}"


def download(id_: str) -> str:
    return f"download:{id_}"


def downloads_at(worker: str) -> str:
    return f"downloads:{worker}"


def download_of(target: str) -> str:
    return f"downloading:{target}"


def download_idempotency(digest: str) -> str:
    return f"fetched:{digest}"


def response(owner: str, id_: str) -> str:
    return f"response:{owner}:{id_}"


def responses_of(owner: str) -> str:
    return f"responses:{owner}"


def response_bytes_of(owner: str) -> str:
    return f"response_bytes:{owner}"


def desired(worker: str) -> str:
    return f"wanted:{worker}"


def used(worker: str) -> str:
    return f"used:{worker}"


def lease(worker: str) -> str:
    return f"lease:{worker}"


def snapshot(worker: str) -> str:
    return f"worker:{worker}"


def catalog(worker: str) -> str:
    return f"catalog:{worker}"


def tallied(process: str) -> str:
    return f"tallied:{process}"


def queue(worker: str) -> str:
    return f"arq:queue:{worker}"


def wake(worker: str) -> str:
    return f"wake:{worker}"
