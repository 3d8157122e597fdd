"""Where one HTTP call waits for what its requests bring: tokens and endings, in order, several at once when it is slow.

Filled by router/control/plane.py, emptied by generation.py, both on the event loop. It needs no bound of its own: no
request can bring more than max_tokens tokens.
"""

import asyncio

from protocol.messages import TokenUpdate
from router.control.events import Outcome

Item = TokenUpdate | Outcome


class CallMailbox:
    """Items of all requests of one call, each with the index of its request among them."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Item]] = []
        self._has_items = asyncio.Event()

    def put(self, index: int, item: Item) -> None:
        self._items.append((index, item))
        self._has_items.set()

    def wake(self) -> None:
        """Let whoever waits take what there is, which may be nothing."""
        self._has_items.set()

    async def take(self) -> list[tuple[int, Item]]:
        """Return everything that has come, waiting until there is something, or somebody is woken."""
        await self._has_items.wait()
        self._has_items.clear()
        items, self._items = self._items, []
        return items
