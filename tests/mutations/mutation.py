"""What a planted mistake is."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """before, which stands in file exactly once, is replaced by after; tests, one of which must fail then.

    tests: files or test ids, fast ones, separated by blanks.
    """

    file: str
    before: str
    after: str
    tests: str

    @property
    def name(self) -> str:
        """What a person reads: the file and the line that was changed."""
        return f"{self.file}: {self.before.strip().splitlines()[0]}"
