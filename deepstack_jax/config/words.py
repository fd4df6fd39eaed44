"""What a configuration computes, in a line for each of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepstack_jax.config.schema import Config


def parts_in_words(config: Config) -> dict[str, str]:
    """Name of a part -> what it is."""
    image, vision, decoder, stack = config.image, config.vision, config.decoder, config.deepstack
    return {
        "vision": f"{vision.architecture}, {vision.layers} + {vision.post_layers} layers of {vision.width}, {image.size} px",
        "decoder": f"{decoder.architecture}, {decoder.layers} layers of {decoder.width}, vocabulary {decoder.vocab_size:,}",
        "image": f"{image.mode}, {image.num_crops} crops" if stack.stack != "none" else image.mode,
        "deepstack": f"{stack.stack} into {stack.into}, {stack.sampling}" if stack.stack != "none" else "nothing injected",
    }


def as_repr(name: str, parts: dict[str, str]) -> str:
    """How an object with such parts shows itself: a line each."""
    return "\n".join([f"{name}(", *(f"  {part}: {words}" for part, words in parts.items()), ")"])
