"""The configuration file that `--config.KEY=VALUE` changes where the command line names none: all defaults."""

from deepstack_jax.config import default_config as get_config  # noqa: F401
