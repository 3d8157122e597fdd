"""The operations that a forward pass, the sampler and the KV transfer are made of, one per file.

plain/<op>.py is the operation in plain torch: it runs on every device and is what faster ones are tested against.
triton/<op>.py, with the same name and signature, is the fused version for NVIDIA GPUs; native/<op>.py, of those that
decide how fast a CPU decodes and moves KV, the one in C. backend.py chooses.
Nothing here knows of requests, models or ranks.
"""
