"""From one image's crop grid to index arrays: which encoded tokens stand in the sequence, which are injected with them.

View 0 of an image is the global one, views 1.. are its crops, row-major. Entries count encoded tokens from the image's first
view: view * P + patch; `place` moves them to the image's slots in a row. The paper's ablations
differ in nothing but these arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepstack_jax.batch import ZERO
from deepstack_jax.layout.stack import SAMPLINGS

SEQUENCES = ("global", "zero", "crops", "global_crops")
STACKS = ("none", "crops", "dummy", "global", "global_crops")


@dataclass(frozen=True)
class VisualLayout:
    """Index arrays of one image."""

    tokens: np.ndarray  # i32[m] what stands in the sequence
    stack: np.ndarray  # i32[J, m] what is added to it, group by group
    views: int  # crop slots the image takes, the global view included

    def place(self, first_slot: int, patches: int) -> VisualLayout:
        """The same layout with the image's views in the slots from `first_slot` on; sentinels stay."""
        shift = first_slot * patches
        moved = [np.where(source >= 0, source + shift, source).astype(np.int32) for source in (self.tokens, self.stack)]
        return VisualLayout(moved[0], moved[1], self.views)


def group_count(stack: str, num_crops: int) -> int:
    """J, the groups that a stack of this kind has room for."""
    return {"none": 0, "crops": num_crops, "dummy": num_crops, "global": 1, "global_crops": num_crops + 1}[stack]


def visual_token_count(sequence: str, num_crops: int, patches: int) -> int:
    """m, the visual tokens that one image puts into the sequence; the same for every image, whatever its grid."""
    return patches * {"global": 1, "zero": 1, "crops": num_crops, "global_crops": num_crops + 1}[sequence]


def image_layout(
    grid: tuple[int, int] | None, side: int, *, num_crops: int, sampling: str, sequence: str, stack: str
) -> VisualLayout:
    """Layout of one image (DeepStack-L, its ablations, and LLaVA-1.5 with `grid=None`, `stack="none"`).

    Args:
      grid: (rows, cols) of the crops, None if there is the global view alone.
      side: patches along a side of a crop; P = side**2.
      num_crops: groups of crops are filled up with exact zeros to this number, as upstream.
      sampling: "2d" | "1d" | "grid".
      sequence: one of SEQUENCES. stack: one of STACKS.

    Raises:
      ValueError: the grid has more cells than num_crops, or the variant needs crops and there are none.
    """
    patches = side**2
    global_tokens = np.arange(patches, dtype=np.int32)
    crops = np.full((num_crops, patches), ZERO, np.int32)
    if grid is not None:
        rows, cols = grid
        if rows * cols > num_crops:
            raise ValueError(f"grid {rows}x{cols} has more cells than num_crops {num_crops}; choose grids with image.num_crops")
        crops[: rows * cols] = SAMPLINGS[sampling](rows, cols, side) + patches
    elif "crops" in sequence or "crops" in stack:
        raise ValueError(f"sequence {sequence!r} with stack {stack!r} needs crops, but image.mode gives the global view alone")
    tokens = {
        "global": global_tokens,
        "zero": np.full(patches, ZERO, np.int32),
        "crops": crops.ravel(),
        "global_crops": np.concatenate([global_tokens, crops.ravel()]),
    }[sequence]
    groups = {
        "none": np.zeros((0, tokens.size), np.int32),
        "crops": crops,
        "dummy": np.tile(global_tokens, (num_crops, 1)),
        "global": global_tokens[None],
        "global_crops": np.concatenate([global_tokens[None], crops]),
    }[stack]
    if groups.shape[1] != tokens.size:
        raise ValueError(f"stack {stack!r} adds {groups.shape[1]} tokens per group to a sequence {sequence!r} of {tokens.size}")
    return VisualLayout(tokens, groups, 1 + (0 if grid is None else grid[0] * grid[1]))
