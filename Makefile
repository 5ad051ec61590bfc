PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
GPU_BIN := .venv-gpu/bin
GPU_STAMP := .venv-gpu/.installed
PEERS := bench/out/peers
LLAMA_SERVER := $(PEERS)/build/bin/llama-server
PEERS_STAMP := $(PEERS)/venv/.installed

.PHONY: setup run test test-unit test-quality test-clients coverage mutants soak check image bench bench-peers bench-inference setup-gpu test-gpu bench-gpu gpu

setup: $(STAMP)

# native/build.py compiles llama.cpp with the chat code, or returns the wheel of an earlier build.
NATIVE := $(wildcard native/*)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	wheel=$$($(BIN)/python native/build.py) && $(BIN)/python -m pip install --no-deps --force-reinstall "$$wheel"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo]'
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

run: setup
	$(BIN)/loadstone up --demo --models-dir .run/models --data-dir .run/data

test: $(DEV_STAMP)
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-unit: $(DEV_STAMP)
	$(BIN)/python -m pytest --numprocesses auto tests/unit

# Downloads 180 MB once, into ~/.cache/loadstone or $XDG_CACHE_HOME/loadstone.
test-quality: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/quality

# Installs published clients once, into the same directory, for which a busy machine needs minutes; those for Node are
# skipped where there is none.
test-clients: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/clients --timeout 900

# Branches, also of the processes that the tests start.  A worker strips its environment, so that what it starts is
# measured only where a test starts it directly.
coverage: $(DEV_STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder tests/unit tests/integration
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Breaks promises one by one in a copy of the tree; each must fail a test.
mutants: $(DEV_STAMP)
	$(BIN)/python -m tests.mutants

soak: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/soak

check: $(DEV_STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_imports.py

# Builds the CPU image with buildah, and loads a model in it.
image:
	.ci/image

bench: $(DEV_STAMP)
	$(BIN)/python -m bench

# Compares Loadstone with llama_cpp.server and llama-server: 20 minutes, and as long for the first build.
bench-peers: $(DEV_STAMP) $(LLAMA_SERVER) $(PEERS_STAMP)
	$(BIN)/python -m bench.peers

# Compares answers with llama-server's: 15 minutes, and as long for the first build.
bench-inference: $(DEV_STAMP) $(LLAMA_SERVER)
	$(BIN)/python -m bench.inference

# Builds llama-server from the source in llama-cpp-python, with the same options: a release build with shared libraries
# for this CPU, without the web UI (which would be downloaded) and TLS (which is not used).
$(LLAMA_SERVER): constraints.txt
	mkdir -p $(PEERS)/.source
	$(BIN)/python -m pip download --no-deps --no-binary llama-cpp-python --constraint constraints.txt --dest $(PEERS) llama-cpp-python
	tar --extract --strip-components 1 --directory $(PEERS)/.source --file $(PEERS)/llama_cpp_python-*.tar.gz
	cmake -S $(PEERS)/.source/vendor/llama.cpp -B $(PEERS)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF $(CMAKE_ARGS)
	cmake --build $(PEERS)/build --target llama-server --parallel $$(nproc)
	touch $@

$(PEERS_STAMP): constraints.txt
	$(PYTHON) -m venv $(PEERS)/venv
	$(PEERS)/venv/bin/python -m pip install --constraint constraints.txt 'llama-cpp-python[server]'
	touch $@

# Installs llama.cpp with CUDA, for the GPUs of this machine, in a separate environment: compiled, or from GPU_LIBRARIES,
# a directory with llama.cpp's libraries, and GPU_SOURCE, the source distribution of llama-cpp-python
# (native/prebuilt.py).  GPU_PYTHON names the Python of another environment to use instead; then nothing is installed.
ifdef GPU_PYTHON
GPU_READY :=
else
GPU_PYTHON := $(GPU_BIN)/python
GPU_READY := $(GPU_STAMP)
endif

setup-gpu: $(GPU_READY)

ifdef GPU_LIBRARIES
GPU_WHEEL = $(GPU_BIN)/python native/prebuilt.py "$(GPU_LIBRARIES)" "$(GPU_SOURCE)"
else
GPU_WHEEL = CMAKE_ARGS="-DGGML_CUDA=on $$CMAKE_ARGS" $(GPU_BIN)/python native/build.py
endif

$(GPU_STAMP): pyproject.toml constraints.txt $(NATIVE)
ifndef GPU_LIBRARIES
	@command -v nvcc > /dev/null || { echo "nvcc is not on PATH: install NVIDIA's CUDA toolkit, or add its bin directory to PATH." >&2; exit 1; }
endif
	$(PYTHON) -m venv .venv-gpu
	wheel=$$($(GPU_WHEEL)) && $(GPU_BIN)/python -m pip install --no-deps --force-reinstall "$$wheel"
	$(GPU_BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

test-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m pytest tests/gpu

bench-gpu: $(GPU_READY)
	$(GPU_PYTHON) -m bench.gpu

# One stage in at most 9 minutes (.ci/gpu): make gpu STAGE=tests|cycles|loads|tokens OUT=directory ARGS="--gb 4"
OUT ?= bench/out/gpu
gpu: $(GPU_READY)
	.ci/gpu "$(STAGE)" "$(OUT)" $(GPU_PYTHON) $(ARGS)
