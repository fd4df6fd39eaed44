"""The older of XLA's code generators for the CPU, with the same results: a small program compiles in a third of the time."""

from jaxlib.version import __version_info__ as jaxlib

QUICK_COMPILATION = "--xla_cpu_use_fusion_emitters=false" if jaxlib < (0, 11) else ""  # later ones have the new one alone
