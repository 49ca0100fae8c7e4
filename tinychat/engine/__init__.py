"""Steps 3 to 6 of the data path: prefill, decode, choose a token, stop, turn tokens into text."""
