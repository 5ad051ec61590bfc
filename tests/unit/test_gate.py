"""The gate of a runner: requests that begin and end in threads, while it is closed and opened."""

from __future__ import annotations

import threading
import time

from worker.engine.gate import Gate


def test_a_closed_gate_begins_nothing_until_it_opens() -> None:
    gate = Gate()
    assert gate.close_if_unused(time.time())
    assert not gate.enter()
    assert gate.n_requests == 0
    gate.open()
    assert gate.enter()
    assert gate.n_requests == 1


def test_a_gate_in_use_does_not_close() -> None:
    gate = Gate()
    assert gate.enter()
    assert not gate.close_if_unused(time.time() + 3600), "whatever the clocks say"
    assert gate.enter()
    gate.leave()
    assert not gate.close_if_unused(time.time() + 3600)
    gate.leave()
    assert gate.close_if_unused(time.time() + 3600)


def test_a_gate_that_was_used_since_does_not_close() -> None:
    gate = Gate()
    assert gate.used_at == 0.0
    before = time.time()
    assert gate.enter()
    assert gate.used_at >= before
    gate.leave()
    assert gate.used_at >= before
    assert not gate.close_if_unused(before - 1)
    assert gate.enter()


def test_the_last_request_of_a_closing_gate_is_reported_once() -> None:
    gate = Gate()
    empty: list[str] = []
    for _ in range(2):
        assert gate.enter()
    gate.close(lambda: empty.append("first"))
    assert not gate.enter()
    gate.leave()
    assert empty == []
    gate.leave()
    assert empty == ["first"]
    gate.close(lambda: empty.append("second"))
    assert empty == ["first", "second"], "at once"


def test_an_opened_gate_reports_nothing() -> None:
    gate = Gate()
    empty: list[None] = []
    assert gate.enter()
    gate.close(lambda: empty.append(None))
    gate.open()
    gate.leave()
    assert empty == []


def test_no_request_begins_between_the_decision_and_its_answer() -> None:
    """Threads begin and end requests without a pause; the gate closes only while none of them has one."""
    gate, inside, over = Gate(), [0, 0], threading.Event()

    def use(number: int) -> None:
        while not over.is_set():
            if gate.enter():
                inside[number] = 1
                inside[number] = 0
                gate.leave()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    closed = 0
    while closed < 200:
        if gate.close_if_unused(time.time() + 3600):
            closed += 1
            assert (gate.n_requests, inside) == (0, [0, 0])
            gate.open()
    over.set()
    for thread in threads:
        thread.join()
