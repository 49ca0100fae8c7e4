"""Runs the CUDA kernels on a CPU, for tests: one fiber a CUDA thread, blocks over OS threads. Never shipped."""
