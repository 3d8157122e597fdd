"""Transports through memory that both ends share: shm in the host's, cuda_ipc in a GPU's."""
