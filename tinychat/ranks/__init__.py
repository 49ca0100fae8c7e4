"""Processes that share one model: rank 0 talks to the user and leads, the others follow, each with its part."""
