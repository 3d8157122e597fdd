"""Mistakes about parking that both the simulator and the exhaustive search must find, planted into production code."""

import pytest

from decode_worker.role import DecodeRole
from decode_worker.running import Running

Patch = pytest.MonkeyPatch


def nobody_is_parked(patch: Patch) -> None:
    patch.setattr(Running, "_youngest_after", lambda self, reservation: None)


def a_sequence_is_parked_whose_chunk_is_on_its_way(patch: Patch) -> None:
    def schedule(self: DecodeRole, num_tokens: int):
        chunks = [sequence.next_chunk(1) for sequence in self._running.ready(num_tokens)]
        self._running.make_room(num_tokens)
        self._admit()
        return chunks

    patch.setattr(DecodeRole, "schedule", schedule)
