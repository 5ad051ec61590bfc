PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
GPU_BIN := .venv-gpu/bin
GPU_STAMP := .venv-gpu/.installed

.PHONY: setup run test soak check bench setup-gpu test-gpu bench-gpu

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

run: setup
	$(BIN)/loadstone up --demo --models-dir .run/models --data-dir .run/data

test: setup
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile

soak: setup
	$(BIN)/python -m pytest tests/soak

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_imports.py

bench: setup
	$(BIN)/python -m bench

# With llama.cpp built with CUDA, for the GPUs of this machine, in an environment of its own.  A wheel that pip may have
# kept would be one without CUDA.
setup-gpu: $(GPU_STAMP)

$(GPU_STAMP): pyproject.toml constraints.txt
	@command -v nvcc > /dev/null || { echo "nvcc is not on PATH: install NVIDIA's CUDA toolkit, or add its bin directory to PATH." >&2; exit 1; }
	$(PYTHON) -m venv .venv-gpu
	CMAKE_ARGS="-DGGML_CUDA=on $$CMAKE_ARGS" $(GPU_BIN)/python -m pip install --no-cache-dir --no-binary llama-cpp-python \
		--constraint constraints.txt llama-cpp-python
	$(GPU_BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

test-gpu: setup-gpu
	$(GPU_BIN)/python -m pytest tests/gpu

bench-gpu: setup-gpu
	$(GPU_BIN)/python -m bench.gpu
