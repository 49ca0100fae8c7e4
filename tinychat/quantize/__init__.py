"""A float model becomes a 4-bit one: streamed block by block from one folder into another."""
