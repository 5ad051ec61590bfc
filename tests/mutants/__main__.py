"""`python -m tests.mutants [WORD ...]`: breaks promises one by one, and names those that no test notices.

Each mutant of `table` is applied to a copy of the tree in a temporary directory, where its tests must fail.  With
words, only the mutants are tried whose promise contains one of them.  Exits with 1 if a mutant survives, and with 2 if
the table is wrong or the tests fail without a mutant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
COPIES = 2  # how many mutants are tried at once
LIMIT_S = 1800.0  # ends a hang that the limit of each test does not end


def copy_to(directory: Path) -> Path:
    """Copy the files that git tracks or would track, as they are in the working tree."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    return directory


def environ(copy: Path) -> dict[str, str]:
    """The environment in which a program and all that it starts import the copy and not the installed tree."""
    return {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


def check_imports(copy: Path) -> None:
    code = "import api, cli, shared, worker; print(*(m.__file__ for m in (api, cli, shared, worker)))"
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, env=environ(copy), check=True, capture_output=True, text=True).stdout
    if any(not path.startswith(str(copy)) for path in found.split()):
        raise SystemExit(f"not the copy is imported: {found}")


def fails(copy: Path, tests: tuple[str, ...], *options: str) -> bool:
    """Return whether one of these test files fails in the copy."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *options, *tests]
    done = subprocess.run(
        command, cwd=copy, env=environ(copy), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode not in (0, 1):  # such as a name of a file that does not exist
        raise SystemExit(f"pytest could not run {tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def noticed(copy: Path, mutant: Mutant) -> bool:
    path = copy / mutant.file
    whole = path.read_text("utf-8")
    try:
        path.write_text(whole.replace(mutant.old, mutant.new), "utf-8")
        return fails(copy, mutant.tests)
    finally:
        path.write_text(whole, "utf-8")


def wrong_entries(mutants: list[Mutant]) -> list[str]:
    """What is wrong with the table: text that is not there, or not once."""
    counts = [(mutant, (ROOT / mutant.file).read_text("utf-8").count(mutant.old)) for mutant in mutants]
    return [f"{mutant.file} has {count} times: {mutant.old!r}" for mutant, count in counts if count != 1]


def main(words: list[str]) -> int:
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.promise for word in words)]
    if wrong := wrong_entries(mutants):
        print(*wrong, sep="\n")
        return 2
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory(prefix="loadstone-mutants-") as home, ThreadPoolExecutor(COPIES) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(COPIES):
            copies.put(copy_to(Path(home) / str(number)))
        first = copies.get()
        check_imports(first)
        files = tuple(sorted({file for mutant in mutants for file in mutant.tests}))
        if fails(first, files, "--numprocesses", "4", "--dist", "loadfile"):
            print("the tests fail without a mutant")
            return 2
        copies.put(first)

        def attempt(mutant: Mutant) -> None:
            began, copy = time.monotonic(), copies.get()
            try:
                is_noticed = noticed(copy, mutant)
            finally:
                copies.put(copy)
            if not is_noticed:
                survivors.append(mutant)
            verdict = "noticed " if is_noticed else "SURVIVED"
            print(f"{verdict} {time.monotonic() - began:5.1f} s  {mutant.promise}", flush=True)

        for attempted in [pool.submit(attempt, mutant) for mutant in mutants]:
            attempted.result()
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
