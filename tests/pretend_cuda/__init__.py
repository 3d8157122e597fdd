"""A CUDA device that a CPU plays, for tests: what a GPU does late, or refuses, is late and refused here as well.

A tensor "on" it holds a tensor of the host's memory. Work on such tensors is queued on the current stream and done when
somebody waits for it, in a drawn order that keeps to the streams' own order and to the events they wait for, and to
nothing else. Memory is full of NaN and of indices that lead nowhere until it is written, and again once it was freed.
So whoever reads early, overwrites what is still to be copied, or lets go of what another stream reads, gets another
result than on a CPU. What CUDA or torch would refuse raises. Speed, kernels as they are compiled, NCCL and IPC are what
it cannot show.
"""
