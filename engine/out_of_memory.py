"""Memory that has run out, told by one error on every device. For whoever runs steps.

On a GPU torch raises OutOfMemoryError. On a CPU it raises RuntimeErrors that only their texts tell from others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TEXTS = ("can't allocate memory", "not enough memory", "bad_alloc", "bad allocation")


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Raise torch.OutOfMemoryError in place of whatever else says that there is no memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except MemoryError as error:
        raise torch.OutOfMemoryError(f"the host has no memory for it: {error}") from error
    except RuntimeError as error:
        if not any(text in str(error) for text in _TEXTS):
            raise
        raise torch.OutOfMemoryError(str(error)) from error
