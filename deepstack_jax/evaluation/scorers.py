"""Scores of answers against references, by their published definitions."""

from __future__ import annotations


def exact_match(prediction: str, reference: str) -> float:
    """1 if the two strings are equal after stripping white space at the ends, else 0. Case and punctuation count."""
    return float(prediction.strip() == reference.strip())
