"""One optimizer step, what it updates, and what is saved of it."""
