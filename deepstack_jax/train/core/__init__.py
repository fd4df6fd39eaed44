"""The training step and what it consists of, as pure functions: nothing here reads, writes or prints."""
