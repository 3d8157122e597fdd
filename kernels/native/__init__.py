"""Operations that decide how fast a CPU decodes and moves KV, in C: names, signatures and results of kernels/plain.

Each is one pass over memory in one call, where plain torch makes many small ones. library.py compiles the C files when
they are first used. Where there is no compiler, and for types that C has no fast form of, the plain twin serves.
"""
