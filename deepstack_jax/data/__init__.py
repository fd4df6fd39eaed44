"""From files to batches: numpy, PIL and Grain. Never imports jax, so that data workers start fast and own no device."""
