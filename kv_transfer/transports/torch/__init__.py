"""Transports over torch.distributed: gloo between hosts' memories, nccl between GPUs."""
