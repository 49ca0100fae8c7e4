"""Kernels of tinychat: the ops, their reference definition in plain torch, and the layouts of 4-bit weights."""
