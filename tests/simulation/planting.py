"""Looks for a seed that shows a mistake which a test has planted into production code."""

import re

from tests.simulation.scenario import faults_of, run_seed

MAX_SEEDS = 8000

WRONG = "the oracle's answer is|garbage"
LEAK = "not at rest|was not served at once"
STUCK = "unexplained end|never ended|not at rest"


def first_failure(says: str, faults: str) -> str:
    """Return what the first seed says whose failure matches; "" when none does."""
    for seed in (seed for seed in range(MAX_SEEDS) if faults in faults_of(seed).name):
        try:
            run_seed(seed)
        except Exception as error:
            failure = f"seed {seed}: {type(error).__name__}: {error}"
            if re.search(says, failure):
                return failure
    return ""
