"""Kernels by hand: the same functions as kernels.py, for CPUs (C++) and NVIDIA GPUs (Triton)."""
