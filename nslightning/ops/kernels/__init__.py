"""Kernels that pass over the memory once, C++ on a CPU and Triton on a CUDA device; and autograd nodes in C++."""
