"""Which tokens the texts under a penalty hold, kept where they are drawn: on the device, one row for each text.

Kept by the sampler. A row is taken up when its text is first sampled here, counted on with every draw, and given to
another text when this one is no more; the host never needs to know what was drawn.
"""

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.upload import upload

_FIRST_ROWS = 8


class Text(Protocol):
    """A prompt and what was drawn after it, as far as the host knows; told apart by identity."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    @property
    def output_token_ids(self) -> Sequence[int]: ...


class TokenCounts:
    """in_output: int32 [num_rows, vocab_size], how often; in_prompt: bool [num_rows, vocab_size], whether at all."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._rows: weakref.WeakKeyDictionary[Text, int] = weakref.WeakKeyDictionary()
        self._free: list[int] = []
        self.in_output = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    def row_of(self, text: Text) -> int:
        """Return the row of a text; a new one starts with what the host knows, which must be all of it."""
        row = self._rows.get(text)
        return self._take_up(text) if row is None else row

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count token_ids, int64 [num_rows], in rows, int64 [num_rows]."""
        ones = torch.ones_like(rows, dtype=torch.int32)
        self.in_output.index_put_((rows, token_ids), ones, accumulate=True)

    def _take_up(self, text: Text) -> int:
        """When memory runs out on the way, everything is as it was."""
        if not self._free:
            self._grow()
        row, vocab_size = self._free[-1], self.in_output.shape[1]
        known = [_known(token_ids, vocab_size) for token_ids in (text.output_token_ids, text.prompt_token_ids)]
        output, prompt = upload(known, self._device)
        ones = torch.ones_like(output, dtype=torch.int32)
        self.in_output[row].zero_().index_put_((output,), ones, accumulate=True)
        self.in_prompt[row].zero_().index_fill_(0, prompt, value=True)
        self._rows[text] = self._free.pop()  # not before its counts are there: memory may have run out
        weakref.finalize(text, self._free.append, row).atexit = False
        return row

    def _grow(self) -> None:
        """Double the rows, so that growing is rare."""
        num_rows = len(self.in_output)
        more = max(num_rows, _FIRST_ROWS)
        grown = [torch.cat((old, old.new_zeros(more, old.shape[1]))) for old in (self.in_output, self.in_prompt)]
        self.in_output, self.in_prompt = grown
        self._free += range(num_rows, num_rows + more)


def _known(token_ids: Sequence[int], vocab_size: int) -> Tensor:
    """Return the ids that the model has logits for."""
    ids = torch.tensor(token_ids, dtype=torch.int64)
    return ids[ids < vocab_size]
