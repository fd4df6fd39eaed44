"""A run from its inputs to its scores: the loop, and what it writes and prints."""
