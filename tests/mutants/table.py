"""The mutants: promises of README.md, SECURITY.md and RELIABILITY.md, and a change of the code that breaks each."""

from __future__ import annotations

from typing import NamedTuple

UNIT, INTEGRATION, ACCEPTANCE = "tests/unit/test_", "tests/integration/test_", "tests/acceptance/test_"


class Mutant(NamedTuple):
    """A promise, the change that breaks it, and the test files that should notice.

    `old` occurs once in `file`.  It is code and no sentence: sentences are rewritten more often.
    """

    promise: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    # ---- clients
    Mutant(
        "a wrong token is refused",
        "api/auth.py",
        "return None if any(matches) else",
        "return None if True else",
        (f"{UNIT}auth.py",),
    ),
    Mutant(
        "only /healthz and /readyz need no token",
        "api/auth.py",
        "frozenset({paths.HEALTHZ, paths.READYZ})",
        "frozenset({paths.HEALTHZ, paths.READYZ, paths.METRICS})",
        (f"{UNIT}auth.py", f"{ACCEPTANCE}metrics.py"),
    ),
    Mutant(
        "without tokens the Host header must name loopback",
        "api/auth.py",
        "if self.check_host and not is_probe and not _names_loopback(",
        "if False and not _names_loopback(",
        (f"{UNIT}auth.py",),
    ),
    Mutant(
        "an address that others can reach needs a token",
        "shared/settings.py",
        "return ipaddress.ip_address(",
        "return True or ipaddress.ip_address(",
        (f"{UNIT}settings.py",),
    ),
    Mutant(
        "a body has at most 1 MiB",
        "api/decode.py",
        "if len(body) > MAX_BODY_BYTES:",
        "if False:",
        (f"{ACCEPTANCE}errors.py",),
    ),
    Mutant(
        "an Idempotency-Key begins one load",
        "shared/store/scripts/create.lua",
        "if first[1] then return {'remembered', first[1], first[2]} end",
        "",
        (f"{INTEGRATION}store.py", f"{INTEGRATION}loads.py"),
    ),
    Mutant(
        "an Idempotency-Key is refused with another request",
        "api/loads/submit.py",
        "if remembered.digest != digest:",
        "if False:",
        (f"{ACCEPTANCE}idempotency.py",),
    ),
    Mutant(
        "Retry-After is that of the worker that is free first",
        "api/loads/submit.py",
        "min(full, e, key=lambda f: f.retry_after_s)",
        "e",
        (f"{INTEGRATION}loads.py",),
    ),
    Mutant(
        "the queue of a worker has a limit",
        "shared/store/scripts/create.lua",
        "if redis.call('SCARD', 'queued' .. place) >= limit then",
        "if redis.call('SCARD', 'queued' .. place) > limit then",
        (f"{INTEGRATION}store.py", f"{INTEGRATION}loads.py"),
    ),
    Mutant(
        "loads accepted within one millisecond keep their order",
        "shared/store/scripts/enqueue.lua",
        "string.format('%.3f', now[1] * 1000 + now[2] / 1000 - 1)",
        "string.format('%.0f', now[1] * 1000 + now[2] / 1000 - 1)",
        (f"{INTEGRATION}queue.py",),
    ),
    Mutant(
        "a delivery does not overtake the one before it",
        "worker/deliveries.py",
        "        await begun.wait()\n",
        "",
        (f"{INTEGRATION}queue.py",),
    ),
    Mutant(
        "replies that are held open have a limit",
        "api/replies.py",
        "if self.count >= self.limit:",
        "if False:",
        (f"{ACCEPTANCE}limits.py",),
    ),
    # ---- loads and instances
    Mutant(
        "an unload is answered once the instance has ended",
        "api/loads/stop.py",
        "return revision.state in TERMINAL or (",
        "return revision.state in (*TERMINAL, State.UNLOADING) or (",
        (f"{INTEGRATION}loads.py", f"{ACCEPTANCE}cancel.py", f"{ACCEPTANCE}load.py"),
    ),
    Mutant(
        "an instance is unloaded once its runner is reaped",
        "worker/instance.py",
        "        await self._stop_runner(runner)\n"
        "        self._services.desired.discard(await self._record.write(instance, Event.EXIT))",
        "        self._services.desired.discard(await self._record.write(instance, Event.EXIT))\n"
        "        await self._stop_runner(runner)",
        (f"{INTEGRATION}agent.py",),
    ),
    Mutant(
        "an instance is unloaded once the driver has its memory back",
        "worker/memory/placer.py",
        "while not self.ledger.is_back(id_) and clock() < deadline:",
        "while False:",
        (f"{INTEGRATION}memory.py", f"{ACCEPTANCE}pool_settings.py"),
    ),
    Mutant(
        "a load is cancelled or loaded, never both",
        "shared/store/scripts/commit.lua",
        "if a.state == 'loaded' and stop then return 'stop' end",
        "",
        (f"{INTEGRATION}store.py",),
    ),
    Mutant(
        "a cancel leaves a load that is over as it is",
        "shared/store/scripts/stop.lua",
        "if a.unless_loaded and held[2] ~= 'queued' and held[2] ~= 'loading' then return held[2] end",
        "",
        (f"{INTEGRATION}store.py",),
    ),
    Mutant(
        "the load config is read back from the engine",
        "worker/engine/llama.py",
        "eval_batch_size=lib.llama_n_batch(self.context)",
        "eval_batch_size=load.n_batch",
        (f"{INTEGRATION}runner.py", f"{ACCEPTANCE}fields.py"),
    ),
    Mutant(
        "one token is decoded before a model counts as loaded",
        "worker/engine/llama.py",
        "                self._warm_up()",
        "                pass",
        (f"{INTEGRATION}warmup.py", f"{UNIT}warmup.py"),
    ),
    Mutant(
        "a file that changes while it is loaded fails the load",
        "worker/instance.py",
        "case Ready() if outcome.files != model.files:",
        "case Ready() if False:",
        (f"{INTEGRATION}agent.py", f"{ACCEPTANCE}damage.py"),
    ),
    Mutant(
        "a load without progress is stalled",
        "worker/instance.py",
        "elif now - progressed_at >= self._services.settings.stall_limit_s:",
        "elif False:",
        (f"{INTEGRATION}agent.py", f"{ACCEPTANCE}errors.py"),
    ),
    Mutant(
        "a message out of turn fails the load",
        "worker/instance.py",
        "                            return so_far, Unexpected(tag(message))\n                        case _:",
        "                            receiving = asyncio.ensure_future(runner.receive())\n"
        "                        case _:",
        (f"{INTEGRATION}out_of_turn.py",),
    ),
    Mutant(
        "an idle TTL unloads the instance",
        "worker/instance.py",
        "if instance.idle_at is not None and time.time() >= instance.idle_at:",
        "if False:",
        (f"{INTEGRATION}agent.py", f"{ACCEPTANCE}ttl.py"),
    ),
    Mutant(
        "a crash of the engine is remembered",
        "worker/instance.py",
        'if code == "engine_crashed" and runner.status not in FROM_OUTSIDE:',
        "if False:",
        (f"{INTEGRATION}agent.py", f"{ACCEPTANCE}damage.py"),
    ),
    Mutant(
        "a runner that was killed from outside is no crash of the engine",
        "worker/instance.py",
        'if code == "engine_crashed" and runner.status not in FROM_OUTSIDE:',
        'if code == "engine_crashed":',
        (f"{INTEGRATION}agent.py",),
    ),
    # ---- memory
    Mutant(
        "reserved memory is not given away",
        "worker/memory/ledger.py",
        "return reading.total_bytes - self._reserved(reading.id) - other_usage",
        "return reading.total_bytes - other_usage",
        (f"{UNIT}ledger.py",),
    ),
    Mutant(
        "leaked memory is not given away",
        "worker/memory/ledger.py",
        "other_usage = self._others_bytes(reading) + self._at_start[reading.id] + self._leaked[reading.id]",
        "other_usage = self._others_bytes(reading) + self._at_start[reading.id]",
        (f"{UNIT}ledger.py",),
    ),
    Mutant(
        "the instance that was used longest ago is evicted first",
        "shared/memory/placement.py",
        "key=lambda held: (held.used_at, held.instance_id)",
        "key=lambda held: (-held.used_at, held.instance_id)",
        (f"{UNIT}placement.py",),
    ),
    Mutant(
        "no more is evicted than needed",
        "shared/memory/placement.py",
        "for held in idle[:enough][::-1]:",
        "for held in []:",
        (f"{UNIT}placement.py",),
    ),
    Mutant(
        "only an instance with a TTL is evicted",
        "worker/memory/placer.py",
        "return instance.request.ttl_seconds is not UNSET",
        "return True",
        (f"{INTEGRATION}memory.py", f"{ACCEPTANCE}pool.py"),
    ),
    Mutant(
        "a loaded model leaves no free heap in its runner",
        "worker/engine/child.py",
        "    libc.trim_heap()",
        "    pass",
        (f"{INTEGRATION}runner.py", f"{INTEGRATION}memory.py"),
    ),
    # ---- workers, leases and restarts
    Mutant(
        "a worker that lost its fence cannot write",
        "shared/store/scripts/commit.lua",
        "if rev ~= string.format('%d', a.rev) then return false end",
        "",
        (f"{INTEGRATION}store.py",),
    ),
    Mutant(
        "a write that is sent again counts once",
        "shared/store/scripts/commit.lua",
        "if rev == next_rev and doc == a.doc then return now end",
        "",
        (f"{INTEGRATION}store.py",),
    ),
    Mutant(
        "a lease that another process holds is refused",
        "shared/store/scripts/renew.lua",
        "if held and held ~= a.epoch and held ~= a.dead_epoch then return 0 end",
        "",
        (f"{INTEGRATION}store.py",),
    ),
    Mutant(
        "a process releases only its own lease",
        "shared/store/scripts/release.lua",
        "if redis.call('GET', KEYS[1]) == a.epoch then redis",
        "if true then redis",
        (f"{INTEGRATION}store.py",),
    ),
    Mutant(
        "a load of a worker without a lease is moved on",
        "api/pool/sweep.py",
        "is_held = epochs.get(instance.worker) == instance.epoch",
        "is_held = True",
        (f"{INTEGRATION}sweep.py",),
    ),
    Mutant(
        "after an outage of Redis nothing is lost before a lease has passed",
        "api/pool/sweep.py",
        "if is_time or _is_refused(instance):",
        "if True:",
        (f"{INTEGRATION}sweep.py",),
    ),
    Mutant(
        "a load is begun a limited number of times",
        "shared/instance.py",
        "case State.LOADING if self.attempt < attempts:",
        "case State.LOADING if True:",
        (f"{UNIT}lifecycle.py", f"{INTEGRATION}restore.py", f"{INTEGRATION}sweep.py"),
    ),
    Mutant(
        "without a runner that answers the lease runs out",
        "worker/agent.py",
        "if self.runners.silent_s < self.store.workers.lease_s:",
        "if True:",
        (f"{INTEGRATION}silence.py",),
    ),
    Mutant(
        "a worker that is stopped hands its loads back",
        "worker/instance.py",
        "        if self._services.ending.is_set():\n            await self._stop_runner(runner)",
        "        if False:\n            await self._stop_runner(runner)",
        (f"{INTEGRATION}agent.py",),
    ),
    Mutant(
        "the instance that was used last is restored first",
        "worker/restore.py",
        "key=lambda instance: instance.used_at or 0.0, reverse=True",
        "key=lambda instance: instance.used_at or 0.0",
        (f"{INTEGRATION}restore.py",),
    ),
    Mutant(
        "an instance that was unloaded is not restored",
        "worker/restore.py",
        "is_desired = known == desired.id and not record.stop_requested",
        "is_desired = True",
        (f"{INTEGRATION}restore.py",),
    ),
    Mutant(
        "an instance is never of other files",
        "shared/lookup.py",
        "return moved or copied",
        "return moved or copied or models.get(source.key)",
        (f"{UNIT}lookup.py",),
    ),
    Mutant(
        "a load that waited opens its files where they are now",
        "worker/instance.py",
        "self._begin(record, model_now, placed)",
        "self._begin(record, model, placed)",
        (f"{INTEGRATION}agent.py",),
    ),
    Mutant(
        "a restoration waits for its files",
        "worker/restore.py",
        "            if has_files:",
        "            if True:",
        (f"{INTEGRATION}restore.py",),
    ),
    Mutant(
        "a loaded instance is listed until it is unloaded",
        "api/pool/listing.py",
        "gone.add(instance, _loaded(instance, instance.load_config))",
        "pass",
        (f"{ACCEPTANCE}restore.py",),
    ),
    Mutant(
        "a file that is no model changes no key",
        "worker/catalog/keys.py",
        "_name(told[: len(models)], told[: len(models)], set())",
        "_name(told[: len(models)], told, set())",
        (f"{UNIT}catalog.py",),
    ),
    Mutant(
        "a projector gives vision to its own models only",
        "worker/catalog/projectors.py",
        "if is_of_another and not in_folder:",
        "if False:",
        (f"{UNIT}catalog.py",),
    ),
    Mutant(
        "a draining API takes no more loads",
        "api/routes.py",
        '    if request.state["draining"].is_set():\n        raise',
        "    if False:\n        raise",
        (f"{ACCEPTANCE}drain.py",),
    ),
    Mutant(
        "a child that stands still is replaced",
        "cli/supervisor.py",
        "while silent < CHECKS:",
        "while True:",
        (f"{INTEGRATION}watchdog.py",),
    ),
    # ---- the models directory and runners
    Mutant(
        "a symbolic link out of the models directory is refused",
        "worker/catalog/directory.py",
        "if target and not _holds(root, target) and (is_folder or is_gguf):",
        "if False:",
        (f"{UNIT}catalog.py",),
    ),
    Mutant(
        "a FIFO blocks nobody",
        "worker/engine/prefetch.py",
        "os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC",
        "os.O_RDONLY | os.O_CLOEXEC",
        (f"{INTEGRATION}runner.py", f"{ACCEPTANCE}damage.py"),
    ),
    Mutant(
        "a header has a limited number of metadata keys",
        "worker/catalog/gguf.py",
        "if n_keys > MAX_KEYS:",
        "if False:",
        (f"{UNIT}gguf.py",),
    ),
    Mutant(
        "a downloaded demo model is checked",
        "cli/demo.py",
        "if not _is_intact(packaged, path):",
        "if False:",
        (f"{INTEGRATION}demo.py",),
    ),
    Mutant(
        "chat code for another llama.cpp is not used",
        "worker/engine/chat.py",
        "if built != present:",
        "if False:",
        (f"{INTEGRATION}chat.py",),
    ),
    Mutant(
        "a worker's environment is stripped",
        "worker/environment.py",
        "            del os.environ[name]",
        "            pass",
        (f"{INTEGRATION}confine.py",),
    ),
    Mutant(
        "a worker gets no tokens",
        "cli/up.py",
        'msgspec.structs.replace(settings, api_tokens="", api_tokens_file=None)',
        "msgspec.structs.replace(settings)",
        (f"{UNIT}up.py",),
    ),
    Mutant(
        "a runner has no descriptor of its worker's",
        "worker/engine/confine.py",
        "    os.closerange(3, channel)",
        "    pass",
        (f"{UNIT}confine.py", f"{INTEGRATION}confine.py"),
    ),
    Mutant(
        "a runner has no descriptor of its worker's above its channel",
        "worker/engine/confine.py",
        '    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))',
        "    pass",
        (f"{UNIT}confine.py",),
    ),
    Mutant(
        "a runner gets no new privileges",
        "worker/engine/confine.py",
        "    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)",
        "    pass",
        (f"{INTEGRATION}confine.py",),
    ),
    Mutant(
        "a stopped runner dies with its worker",
        "worker/engine/confine.py",
        "    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)",
        "    pass",
        (f"{INTEGRATION}confine.py",),
    ),
    Mutant(
        "a runner leaves no core dump",
        "worker/engine/confine.py",
        "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
        "    pass",
        (f"{INTEGRATION}confine.py",),
    ),
    Mutant(
        "a runner leaves when its channel ends",
        "worker/engine/child.py",
        "        os._exit(ORPHANED)",
        "        pass",
        (f"{INTEGRATION}runner.py",),
    ),
    Mutant(
        "the engine's log names no directory of the host",
        "worker/engine_log.py",
        "scrub(self.relative(",
        "str(self.relative(",
        (f"{UNIT}engine_log.py",),
    ),
)
