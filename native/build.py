"""`python native/build.py`: builds llama-cpp-python with Loadstone's chat code, and prints the path of the wheel.

This is the one place that knows how the engine is built; prebuilt.py packs what was built elsewhere.  CMAKE_ARGS of the
environment is passed on, such as `-DGGML_CUDA=on` for NVIDIA GPUs.  The wheel is kept in ~/.cache/loadstone/engine
(XDG_CACHE_HOME), under a digest of all that it depends on, so that another environment takes seconds.  Pip's own cache
would not do: it returns a wheel that was built with other options.

Uses only the standard library and pip.  Progress goes to stderr: at least a line every 5 seconds, where stderr is no
terminal.
"""

from __future__ import annotations

import hashlib
import os
import platform
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import IO

NATIVE = Path(__file__).resolve().parent
CONSTRAINTS = NATIVE.parent / "constraints.txt"
PACKAGE = "llama-cpp-python"
CHAT_LIBRARY = "llama_cpp/lib/libloadstone_chat.so"
ENVIRONMENT = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CMAKE_ARGS")  # read by CMake and its caller

CPU_SECONDS = 400  # of the whole build without CUDA, measured on a Xeon with AVX-512; 116 units
STEP = re.compile(r"\[(\d+)/(\d+)\]")
EVERY_S = 5.0
TAIL = 40  # lines of the log that are shown after a failure


def version() -> str:
    """Return the pinned version of llama-cpp-python."""
    for line in CONSTRAINTS.read_text().splitlines():
        name, _, pinned = line.partition("==")
        if name.replace("_", "-").lower() == PACKAGE:
            return pinned
    raise SystemExit(f"{CONSTRAINTS} does not pin {PACKAGE}")


def digest() -> str:
    """Return a digest of all that the wheel depends on, the processor included: by default it is built for this one."""
    hashed = hashlib.sha256(version().encode())
    for path in sorted(NATIVE.glob("*.c*")):
        hashed.update(path.name.encode() + path.read_bytes())
    for name in ENVIRONMENT:
        hashed.update(f"{name}={os.environ.get(name, '')}".encode())
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = next((line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))), "")
    hashed.update(f"{platform.machine()} {platform.libc_ver()} {flags}".encode())
    return hashed.hexdigest()[:16]


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class Progress:
    """Shows what the build does: in one line that changes on a terminal, else in a line every few seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._compiling_since: float | None = None
        self._shown_at = 0.0
        self._doing = "downloading the source (77 MB) and the build tools"
        self._is_terminal = sys.stderr.isatty()

    def see(self, line: str) -> None:
        """Take note of a line of pip's output."""
        if step := STEP.search(line):
            now = time.monotonic()
            self._compiling_since = self._compiling_since or now
            done, total = int(step[1]), int(step[2])
            self._doing = f"compiling [{done}/{total}]"
            if done >= 10:
                self._doing += f", about {minutes((now - self._compiling_since) / done * (total - done))} left"
        elif "Configuring CMake" in line:
            self._doing = "configuring"
        elif "Installing project into wheel" in line:
            self._doing = "packing the wheel"

    def show(self) -> None:
        now = time.monotonic()
        if not self._is_terminal and now - self._shown_at < EVERY_S:
            return
        self._shown_at = now
        text = f"llama.cpp: {self._doing} ({minutes(now - self._began)} so far)"
        sys.stderr.write(f"\r\x1b[K{text}" if self._is_terminal else f"{text}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.write(f"llama.cpp: built in {minutes(time.monotonic() - self._began)}\n")


def read_lines(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def build(directory: Path) -> None:
    """Build the wheel into a directory.  Raises `SystemExit` with the end of the log."""
    include = f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={shlex.quote(str(NATIVE / 'engine.cmake'))}"
    environment = {**os.environ, "CMAKE_ARGS": f"{include} {os.environ.get('CMAKE_ARGS', '')}"}
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", PACKAGE, "--wheel-dir", str(directory), f"{PACKAGE}=={version()}"]
    log: list[str] = []
    progress = Progress()
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        threading.Thread(target=read_lines, args=(pip.stdout, lines), daemon=True).start()
        while True:
            progress.show()
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                continue
            if line is None:
                break
            log.append(line)
            progress.see(line)
    if pip.returncode != 0:
        path = Path(tempfile.gettempdir()) / "loadstone-engine-build.log"
        path.write_text("".join(log))
        raise SystemExit(f"{''.join(log[-TAIL:])}\nThe build of {PACKAGE} failed.  The whole log: {path}")
    progress.end()


def kept(digest: str) -> Path:
    """Return the directory in which a wheel is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loadstone" / "engine" / digest


def main() -> None:
    directory = kept(digest())
    cache = directory.parent
    if not (wheels := list(directory.glob("*.whl"))):
        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
            raise SystemExit("llama.cpp needs a C++ compiler: install g++ or clang++")
        cores = len(os.sched_getaffinity(0))
        sys.stderr.write(
            f"Building llama.cpp: about {minutes(30 + CPU_SECONDS / cores)} on {cores} idle cores.  "
            "Later environments reuse the result.\n"
        )
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{error}.  XDG_CACHE_HOME names another place for the wheel.") from error
        with tempfile.TemporaryDirectory(dir=cache) as name:
            build(Path(name))
            (wheel,) = Path(name).glob("*.whl")
            if CHAT_LIBRARY not in zipfile.ZipFile(wheel).namelist():
                raise SystemExit(f"{wheel.name} has no {CHAT_LIBRARY}: does CMAKE_ARGS replace engine.cmake?")
            directory.mkdir(exist_ok=True)
            wheel.replace(directory / wheel.name)
        wheels = list(directory.glob("*.whl"))
    sys.stdout.write(f"{wheels[0]}\n")


if __name__ == "__main__":
    main()
