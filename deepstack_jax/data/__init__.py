"""From files to batches: numpy, PIL and Grain. Never imports jax, so that data workers start fast and own no device.

A *record* is what is in a file, an *example* is a conversation with its images, whatever it was read from, and a *row* is a
row of a batch, which holds one example or, packed, several.
"""
