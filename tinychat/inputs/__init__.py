"""Step 1: messages with pictures become token ids with image slots, and pixels."""
