"""What Loadstone adds to a load: `python -m bench` measures it against llama-cpp-python alone and prints a report."""
