"""What both roles stand on: the model, its paged KV cache, the block pool, batches, and the loop that runs them.

Knows nothing of prefill or decode, of transfers, of Ray or HTTP.
"""
