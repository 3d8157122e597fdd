"""The prefill role: computes prompts in chunks, draws each first token, and ships the prompts' KV blocks to decode."""
