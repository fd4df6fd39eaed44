"""Held-out loss, answers, and how they are scored."""
