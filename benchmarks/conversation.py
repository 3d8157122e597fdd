"""`make bench-fetch`: time to first token in a conversation of growing length, with and without fetching from decode.

Every turn's prompt is all that was said so far and a new question. Without fetching, prefill computes the last answer
again, which decode has computed already; where prefill groups take turns, one of them computes all that the other has.
Both clusters are up at once and take turns. Of several conversations the best time of each turn counts: whatever else
the machine does can only add to it.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.random_llama import ensure_random_llama
from benchmarks.serving import environment
from benchmarks.systems import Tandem
from benchmarks.workload import prompts_of

MIN_FETCH_TOKENS = 32
QUESTION_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="conversations per cluster (default 3)")
    parser.add_argument("--turns", type=int, default=6, help="turns of a conversation (default 6)")
    parser.add_argument("--answer", type=int, default=112, help="tokens of an answer (default 112)")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks"), help="where the random model is kept")
    arguments = parser.parse_args()
    models = {
        "demo model, float32": (Path("configs/demo_model"), "float32"),
        "random Llama 100 M, bfloat16": (ensure_random_llama(arguments.cache / "llama_100m"), "bfloat16"),
    }
    print(environment())
    for title, (model, dtype) in models.items():
        for num_prefill in (1, 2):
            _report(f"{title}, {num_prefill}P1D", topology_of(model.resolve(), dtype, num_prefill), arguments)


def topology_of(model: Path, dtype: str, num_prefill: int) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": dtype},
        "kv_cache": {"memory": "512MiB"},
        "prefill": {"groups": num_prefill},
        "decode": {},
    }


def _report(title: str, topology: dict[str, Any], arguments: argparse.Namespace) -> None:
    with ExitStack() as running:
        systems = [
            running.enter_context(Tandem(name, topology | {"kv_transfer": {"transport": "auto", **options}}))
            for name, options in (("computed", {}), ("fetched", {"min_fetch_tokens": MIN_FETCH_TOKENS}))
        ]
        hold_conversations(systems, arguments.turns, arguments.answer, seed=1)  # warm-up
        rounds = [
            hold_conversations(systems, arguments.turns, arguments.answer, seed=100 * (index + 1))
            for index in range(arguments.rounds)
        ]
    _print_table(title, rounds, arguments)


def hold_conversations(systems: list[Tandem], num_turns: int, num_tokens: int, seed: int) -> list[list[float]]:
    """Hold the same conversation with every system, turn by turn; return [turn][system] seconds to the first token."""
    said: list[list[int]] = [[] for _ in systems]
    times = []
    for turn in range(num_turns):
        [question] = prompts_of(1, QUESTION_TOKENS, seed + turn)
        times.append(
            [_take_turn(system, text, question, num_tokens) for system, text in zip(systems, said, strict=True)]
        )
    return times


def _take_turn(system: Tandem, said: list[int], question: list[int], num_tokens: int) -> float:
    said += question
    [answer] = system.generate([said], num_tokens)
    said += answer.token_ids
    return answer.first_s


def _print_table(title: str, rounds: list[list[list[float]]], arguments: argparse.Namespace) -> None:
    print(f"\n{title}: milliseconds to the first token, best of {len(rounds)}")
    print(f"{'prompt tokens':>14}{'computed':>12}{'fetched':>12}{'ratio':>8}")
    for turn in range(arguments.turns):
        num_tokens = turn * (QUESTION_TOKENS + arguments.answer) + QUESTION_TOKENS
        computed, fetched = map(min, zip(*(times[turn] for times in rounds), strict=True))
        ratio = fetched / computed
        print(f"{num_tokens:>14}{1000 * computed:>12.1f}{1000 * fetched:>12.1f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
