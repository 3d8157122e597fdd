"""Every operation as fused Triton kernels for NVIDIA GPUs: same names, signatures and results as kernels/plain.

backend.py imports this for CUDA devices only, since a worker on a CPU may have no Triton. configurations.py holds all
tile shapes. Every integer that changes from step to step is marked `do_not_specialize`, so a kernel is compiled once
per model and dtype, never because a batch has another size.
"""
