"""A runner's process on a machine with two GPUs that are none."""

from __future__ import annotations

import socket

NAMES = ["FAKE0", "FAKE1"]


def main(control: socket.socket, output: socket.socket) -> None:
    """What a runner does; the devices are there once the engine is."""
    from tests import fakegpu  # only here: the engine may be in the runner's process only
    from worker import child, llama

    initialise = llama.initialise

    def with_gpus() -> llama.Log:
        log = initialise()
        for name in NAMES:
            fakegpu.add(name, 1 << 30)
        return log

    llama.initialise = with_gpus
    child.main(control, output)
