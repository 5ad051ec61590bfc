"""Published clients, installed once into the cache directory, each with its driver."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1] / "clients"
DRIVERS = HERE / "drivers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "loadstone/clients")
INSTALL_S, RUN_S = 600, 300


def for_node() -> Path:
    """Return a directory with the libraries for Node, and the drivers, which find them there."""
    directory = _packages(HERE)
    for driver in DRIVERS.glob("*.mjs"):
        shutil.copy(driver, directory)
    return directory


def agents() -> Path:
    """Return the directory with the commands of agents that run on Node."""
    return _packages(HERE / "agents") / "node_modules/.bin"


def for_python() -> Path:
    """Return an interpreter that has the libraries for Python."""
    requirements = HERE / "requirements.txt"
    directory = _installed_for(requirements)
    done, interpreter = directory / "done", directory / "bin/python"
    if not done.exists():
        run(sys.executable, "-m", "venv", "--clear", str(directory), within_s=INSTALL_S)
        pip = (str(interpreter), "-m", "pip", "install", "--no-deps", "--no-compile")  # most modules are never imported
        run(*pip, "-r", str(requirements), within_s=INSTALL_S)
        done.touch()
    return interpreter


def run(*command: str, within_s: float = RUN_S) -> str:
    """Return what a command writes.  Fails with its errors."""
    quiet = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else litellm downloads its prices
    done = subprocess.run(command, capture_output=True, text=True, timeout=within_s, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _packages(named: Path) -> Path:
    """Return a directory with the packages for Node that the lock file in `named` has."""
    directory = _installed_for(named / "package-lock.json")
    if not (directory / "node_modules/.package-lock.json").exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(named / name, directory)
        run("npm", "ci", "--prefix", str(directory), "--no-audit", "--no-fund", within_s=INSTALL_S)
    return directory


def _installed_for(pins: Path) -> Path:
    """Return the directory for the packages that a file names."""
    directory = CACHE / hashlib.sha256(pins.read_bytes()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory
