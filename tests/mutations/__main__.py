"""Plants each mistake in a copy of this tree, alone, and sees whether the tests that are named beside it find it.

    python -m tests.mutations [WORD]    WORD: only those whose file or line holds it

Exit code 1 when one was not found, or does not apply any more. Some minutes on two cores; no part of `make test`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutations import models, router, wire, worker
from tests.mutations.mutation import Mutation

ROOT = Path(__file__).parents[2]
MUTATIONS = [*worker.MUTATIONS, *router.MUTATIONS, *wire.MUTATIONS, *models.MUTATIONS]
NUM_COPIES = 2
TIMEOUT_S = 150.0

PASSED, FAILED = 0, 1  # pytest's


def copy_tree(folder: Path) -> Path:
    """Copy what belongs to the repository, as it is now, with the environment linked."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def run_tests(copy: Path, tests: Iterable[str]) -> int | None:
    """Return pytest's exit code; None when it took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # or the bytecode of another mistake might be run
    try:
        return subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def try_out(mutation: Mutation, copy: Path) -> str:
    """Return "found", or what happened instead."""
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(mutation.before) != 1:
        return f"DOES NOT APPLY: the text stands there {text.count(mutation.before)} times"
    path.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        code = run_tests(copy, mutation.tests.split())
    finally:
        path.write_text(text, encoding="utf-8")
    outcomes = {FAILED: "found", PASSED: "NOT FOUND", None: f"NOT FOUND: no end within {TIMEOUT_S:g} s"}
    return outcomes.get(code, f"DOES NOT RUN: pytest ended with {code}")


def main(words: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.name for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_COPIES) as threads:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(NUM_COPIES):
            copies.put(copy_tree(Path(folder) / str(number)))

        copy = copies.get()
        if run_tests(copy, {test for mutation in chosen for test in mutation.tests.split()}) != PASSED:
            print("the tests that should find mistakes do not pass without any")
            return 1
        copies.put(copy)

        def take_turn(mutation: Mutation) -> str:
            copy, start = copies.get(), time.monotonic()
            try:
                outcome = try_out(mutation, copy)
            finally:
                copies.put(copy)
            print(f"{time.monotonic() - start:5.1f} s  {outcome}  {mutation.name}", flush=True)
            return outcome

        outcomes = list(threads.map(take_turn, chosen))
    num_found = outcomes.count("found")
    print(f"{num_found} of {len(outcomes)} mistakes were found")
    return int(num_found < len(outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
