"""`python native/prebuilt.py LIBRARIES SOURCE`: packs llama.cpp's shared libraries, which another build has made, as a
wheel of llama-cpp-python with Loadstone's chat code, and prints its path.

For machines where llama.cpp cannot be built, such as one with GPUs but without CUDA's compiler or a network.
LIBRARIES: a directory with libllama.so, libggml.so and those that they need.  SOURCE: the source distribution of
llama-cpp-python, packed or unpacked, whose llama.cpp the libraries were built from.

Only the chat code is compiled, with CXX or g++, from the files that chat.cmake lists: a minute of CPU time.  The wheel
is kept beside those of build.py.  Uses only the standard library.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build

LIBRARY = re.compile(r"lib(llama|ggml[a-z0-9-]*)\.so(\.\d+)?")
FLAGS = "-O3 -DNDEBUG -std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -ffunction-sections"
LINK = (
    "-shared -static-libstdc++ -Wl,-soname,libloadstone_chat.so -Wl,-rpath,$ORIGIN -Wl,--gc-sections -Wl,--no-undefined"
)
# Libraries of another build may export symbols of their own libstdc++ (seen in a libggml-cuda): a second one beside it
# shares some of them, and crashes.  So the chat code has a libstdc++ that nothing else sees.
VISIBLE = "{ global: loadstone_chat_*; local: *; };\n"
TAG = "py3-none-linux_x86_64"


def main(libraries: Path, source: Path) -> None:
    found = sorted(path for path in libraries.iterdir() if LIBRARY.fullmatch(path.name))
    if not {"libllama.so", "libggml.so", "libggml-base.so"} <= {path.name for path in found}:
        raise SystemExit(f"{libraries} has no libllama.so, or not all of libggml's libraries.")
    kept = build.kept(digest(found))
    if not (wheels := list(kept.glob("*.whl"))):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            root = unpacked(source, Path(name))
            files = package(root) | {f"llama_cpp/lib/{path.name}": path for path in found}
            files[build.CHAT_LIBRARY] = compile_chat(root / "vendor/llama.cpp", found, Path(name))
            wheel = Path(name) / f"llama_cpp_python-{build.version()}-{TAG}.whl"
            pack(wheel, files, (root / "PKG-INFO").read_text())
            kept.mkdir(exist_ok=True)
            wheel.replace(kept / wheel.name)
        wheels = list(kept.glob("*.whl"))
    sys.stdout.write(f"{wheels[0]}\n")


def digest(libraries: list[Path]) -> str:
    """Return a digest of all that the wheel depends on."""
    hashed = hashlib.sha256(build.digest().encode())
    for path in [Path(__file__), *libraries]:
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest() + path.name.encode())
    return hashed.hexdigest()[:16]


def unpacked(source: Path, directory: Path) -> Path:
    """Return the directory of the source distribution.  It must be the pinned version."""
    name = f"llama_cpp_python-{build.version()}"
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(directory, filter="data")
        source = directory / name
    try:
        information = (source / "PKG-INFO").read_text()
    except OSError as error:
        raise SystemExit(f"{source} is no source distribution of {build.PACKAGE}: {error.strerror}") from None
    if f"\nVersion: {build.version()}\n" not in information:
        raise SystemExit(f"{source} is not {build.PACKAGE} {build.version()}")
    return source


def package(root: Path) -> dict[str, Path]:
    """Return the Python files and the chat templates, by their names in the wheel."""
    files = {path.relative_to(root).as_posix(): path for path in (root / "llama_cpp").rglob("*.py*")}
    templates = (root / "vendor/llama.cpp/models/templates").glob("*.jinja")
    return files | {f"llama_cpp/chat/templates/{path.name}": path for path in templates}


def sources(llama_cpp: Path) -> tuple[list[Path], list[Path]]:
    """Return the small and the other sources of the chat code, as chat.cmake lists them."""
    common = llama_cpp / "common"
    listed = (build.NATIVE / "chat.cmake").read_text()
    parsers = re.findall(r"/([\w-]+\.cpp)$", (common / "parsers/sources.cmake").read_text(), re.MULTILINE)
    places = {"COMMON": common, "LOADSTONE_NATIVE": build.NATIVE}
    lists = []
    for name in ("SMALL_SOURCES", "OTHER_SOURCES"):
        (body,) = re.findall(rf"^set\({name}\n(.*?)\)$", listed, re.MULTILINE | re.DOTALL)
        lists.append([places[place] / file for place, file in re.findall(r'"\$\{(\w+)\}/([^"]+\.cpp)"', body)])
    return [*(common / "parsers" / parser for parser in parsers), *lists[0]], lists[1]


def compile_chat(llama_cpp: Path, libraries: list[Path], directory: Path) -> Path:
    """Compile the chat code, link it to the libraries, and return the result."""
    (base,) = (path for path in libraries if path.name == "libggml-base.so")
    compiler = os.environ.get("CXX") or "g++"
    small, others = sources(llama_cpp)
    unity = directory / "small.cpp"
    unity.write_text("".join(f'#include "{path}"\n' for path in small))
    include = [f"-I{llama_cpp / name}" for name in ("common", "include", "ggml/include", "vendor")]
    commit = f'-DLOADSTONE_GGML_COMMIT="{commit_of(base)}"'

    def compiled(source: Path) -> str:
        target = directory / f"{source.stem}-{source.parent.name}.o"
        run([*shlex.split(compiler), *FLAGS.split(), commit, *include, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, [unity, *others]))
    chat, visible = directory / Path(build.CHAT_LIBRARY).name, directory / "visible.map"
    visible.write_text(VISIBLE)
    linked = [str(path) for path in libraries if path.name in {"libllama.so", "libggml.so", "libggml-base.so"}]
    run([*shlex.split(compiler), *LINK.split(), f"-Wl,--version-script={visible}", *objects, *linked, "-o", str(chat)])
    return chat


def commit_of(base: Path) -> str:
    """Return the commit of llama.cpp that libggml-base says it was built from."""
    try:
        library = ctypes.CDLL(str(base))
    except OSError as error:
        raise SystemExit(f"The libraries cannot be used on this machine: {error}") from None
    library.ggml_commit.restype = ctypes.c_char_p
    commit: bytes = library.ggml_commit()
    return commit.decode()


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(
            f"The chat code needs a C++ compiler: install g++, or name one with CXX ({command[0]})."
        ) from None
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-4000:]}\nThe build of the chat code failed.")


def pack(wheel: Path, files: dict[str, Path], metadata: str) -> None:
    """Write a wheel (PEP 427)."""
    information = f"llama_cpp_python-{build.version()}.dist-info"
    texts = {
        f"{information}/METADATA": metadata,
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nGenerator: loadstone\nRoot-Is-Purelib: false\nTag: {TAG}\n",
    }
    contents = {name: path.read_bytes() for name, path in files.items()}
    contents |= {name: text.encode() for name, text in texts.items()}
    record = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(name, content)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            record.append(f"{name},sha256={hashed},{len(content)}\n")
        archive.writestr(f"{information}/RECORD", "".join([*record, f"{information}/RECORD,,\n"]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python native/prebuilt.py LIBRARIES SOURCE")
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
