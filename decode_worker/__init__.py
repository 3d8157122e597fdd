"""The decode role: reserves blocks, takes in prompts' KV, and streams tokens from a continuously batched engine."""
