"""Scripts that measure, and write the numbers and pictures that README and docs show; anyone can run them again."""
