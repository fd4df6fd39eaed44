"""The ways in which an image becomes views and tokens, one row each: what grids it may get, and what follows from that."""

from collections.abc import Sequence
from dataclasses import dataclass

from deepstack_jax.layout.grid import Grid, anyres_grids, candidate_grids, square_grid


@dataclass(frozen=True)
class ImageMode:
    """One value of `config.image.mode`."""

    name: str
    grids: str  # where its crop grids come from: "num_crops" (all of so many cells), "pinpoints", or "" (the global view alone)
    fill: (
        str  # of the global view: "stretch", "pad" (squared with the mean colour), "centre" (shorter side resized, centre cut)
    )
    mosaic: bool = False  # the crops' tokens are in the sequence, row by row of the whole picture, and not in the stack
    upsampled: bool = False  # every view is seen again in upsampled crops, which make the stack
    letterbox: bool = False  # its crops always keep the image's aspect

    @property
    def single(self) -> bool:
        """Whether there is the global view alone."""
        return not self.grids

    @property
    def stacks_crops(self) -> bool:
        """Whether groups of the stack can be made of its crops."""
        return self.grids == "num_crops"

    def newline(self, merge: str) -> bool:
        """Whether the model has an `image_newline`: upstream makes one where a mosaic may want it."""
        return self.upsampled or merge == "spatial_unpad"

    def possible_grids(
        self, num_crops: int, *, square: bool, pinpoints: Sequence[tuple[int, int]], size: int
    ) -> tuple[Grid, ...]:
        """Every crop grid that an image of a run can get, in order of preference; empty where it has the global view alone.

        Args:
          square: one grid for all images. pinpoints: (width, height) in pixels. size: side of a crop in pixels.
        """
        if self.grids == "pinpoints":
            return anyres_grids(pinpoints, size)
        if self.single:
            return ()
        return (square_grid(num_crops),) if square else candidate_grids(num_crops)


MODES = {
    mode.name: mode
    for mode in (
        ImageMode("deepstack", "num_crops", "stretch"),  # DeepStack-L and -V
        ImageMode("hd", "num_crops", "stretch", mosaic=True, upsampled=True),  # DeepStack-L-HD
        ImageMode("anyres", "pinpoints", "stretch", mosaic=True, letterbox=True),  # LLaVA-NeXT
        ImageMode("pad", "", "pad"),  # LLaVA-1.5
        ImageMode("square", "", "centre"),  # CLIP's own preprocessing
        ImageMode("stretch", "", "stretch"),  # DeepStack's global view alone; SigLIP's own preprocessing
    )
}
