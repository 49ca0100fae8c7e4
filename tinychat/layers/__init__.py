"""Modules that know no model: linear, attention, KV cache, rotary positions, norm, tensor parallelism."""
