"""What a model reads of one batch, as tensors on its device. The engine lays them out; the layers only look."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchTensors:
    """The first num_decodes sequences have one token each, so the first num_decodes tokens are theirs."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slots: Tensor  # int64 [num_tokens]
    block_tables: Tensor  # int32 [num_sequences, max_blocks], rows filled up with block 0
    context_lens: Tensor  # int32 [num_sequences]
    num_decodes: int
    query_starts: Tensor  # int32 [num_sequences - num_decodes + 1], from the first token that is not a decode's
    sampled_tokens: Tensor  # int64 [num_sampled], indices of the tokens whose logits are wanted
