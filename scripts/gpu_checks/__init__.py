"""The stages of scripts/gpu_check.py: correctness, sanitize, kernels, endtoend."""
