"""Kernels that pass over the memory once: C++ on a CPU, Triton on a CUDA device."""
