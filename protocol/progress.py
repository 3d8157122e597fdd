"""How a long start tells a person what it is doing: loading says it, a worker sends it, `up` shows it."""

from collections.abc import Callable

Tell = Callable[[str], None]
"""Takes what is being done, in a person's words: "weights 3 of 9"."""


def say_nothing(doing: str) -> None:
    """For work that nobody watches."""
