"""The overhead of Loadstone: `python -m bench` compares its loads with llama-cpp-python alone and prints a report.

A program that uses the engine imports it before numpy.  A libggml-cuda may define symbols of libstdc++, and crashes in
a process that has loaded libstdc++ before, which numpy and matplotlib do (seen on an H100).
"""
