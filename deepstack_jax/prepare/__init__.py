"""Building and checking datasets: `python -m deepstack_jax.prepare`."""
