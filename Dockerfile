# syntax=docker/dockerfile:1
# Two images, `--target cpu` and `--target cuda`, which differ in the build of llama.cpp and its dependencies.
# llama.cpp is built in a separate stage, which is repeated only when constraints.txt or native/ changes.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS engine-cpu
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential cmake git ninja-build
COPY constraints.txt /engine/
COPY native /engine/native
# For any x86-64 processor with AVX2, not only for that of the build machine.
RUN mkdir /wheels && CMAKE_ARGS="-DGGML_NATIVE=OFF" sh -c 'cp "$(python3 /engine/native/build.py)" /wheels'

FROM nvidia/cuda:12.6.3-devel-ubuntu24.04 AS engine-cuda
RUN apt-get update && apt-get install --yes --no-install-recommends \
    build-essential cmake git ninja-build python3-dev python3-pip
COPY constraints.txt /engine/
COPY native /engine/native
# The host provides libcuda.so.1, the library of the driver; it may stay unresolved here.
RUN mkdir /wheels && \
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=on -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined" \
    sh -c 'cp "$(python3 /engine/native/build.py)" /wheels'

FROM ${PYTHON_IMAGE} AS base-cpu
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home loadstone && install -d -o loadstone -m 700 /data /locks && install -d /models

FROM nvidia/cuda:12.6.3-runtime-ubuntu24.04 AS base-cuda
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home loadstone && install -d -o loadstone -m 700 /data /locks && install -d /models

FROM base-cpu AS install-cpu
COPY . /src
RUN --mount=from=engine-cpu,source=/wheels,target=/wheels python3 -m venv /opt/loadstone \
    && /opt/loadstone/bin/pip install --no-cache-dir --find-links /wheels --only-binary llama-cpp-python \
    --constraint /src/constraints.txt "/src[demo]"

FROM base-cuda AS install-cuda
COPY . /src
RUN --mount=from=engine-cuda,source=/wheels,target=/wheels python3 -m venv /opt/loadstone \
    && /opt/loadstone/bin/pip install --no-cache-dir --find-links /wheels --only-binary llama-cpp-python \
    --constraint /src/constraints.txt "/src[demo]"

FROM base-cuda AS cuda
COPY --from=install-cuda /opt/loadstone /opt/loadstone
ENV PATH=/opt/loadstone/bin:$PATH LOADSTONE_MODELS_DIR=/models LOADSTONE_DATA_DIR=/data
WORKDIR /data
USER loadstone
ENTRYPOINT ["loadstone"]

FROM base-cpu AS cpu
COPY --from=install-cpu /opt/loadstone /opt/loadstone
ENV PATH=/opt/loadstone/bin:$PATH LOADSTONE_MODELS_DIR=/models LOADSTONE_DATA_DIR=/data
WORKDIR /data
USER loadstone
ENTRYPOINT ["loadstone"]
