"""The engine.  Runs in runner processes only; no module outside this package imports it."""

import os

# OpenMP's threads wait for each other about a thousand times a token.  By default they spin while they wait, also for a
# thread that has no core at the moment: beside other processes on two cores, a token took 1.2 s instead of 0.02 s.
# libgomp reads the variable when it is loaded, with llama.cpp.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
