"""Scores of answers against references, by their published definitions."""
