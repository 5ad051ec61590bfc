"""The overhead of Loadstone: `python -m bench` compares its loads with llama-cpp-python alone and prints a report."""
