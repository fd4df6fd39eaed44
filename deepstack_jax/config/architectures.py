"""Which classes describe a tower and a decoder, by the value of `architecture`; the families register theirs here.

So a section may have further keys than the plain one, and the configuration need not know who adds them.
"""

from __future__ import annotations

from deepstack_jax.config.schema import DecoderConfig, VisionConfig

# Section of the configuration (its plain class) -> architecture -> the class of its keys.
ARCHITECTURES: dict[type, dict[str, type]] = {VisionConfig: {}, DecoderConfig: {}}
