"""The unit in Triton: twins of the kernels in csrc/, for NVIDIA and AMD GPUs. `table` is what the schedule runs on."""
