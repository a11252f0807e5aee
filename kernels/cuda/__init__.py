"""Triton kernels: one file per operation, imported at its first call on a CUDA tensor."""
