"""CUDA on the CPU: the kernels of csrc/cuda, compiled by a plain C++ compiler against emulation.h."""
