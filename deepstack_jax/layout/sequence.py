"""From one image's crop grid to index arrays: which encoded tokens are in the sequence, which are injected with them.

View 0 of an image is the global one, the next are its crops, row-major; for DeepStack-HD there follow the upsampled crops of
the global view and of every cell. Entries count encoded tokens from the image's first view: view * P + token; `place` moves
them to the image's slots in a row. DeepStack-L, -V and -HD, LLaVA-1.5, LLaVA-NeXT and the paper's ablations differ in nothing
but these arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deepstack_jax.batch import NEWLINE, ZERO
from deepstack_jax.layout.grid import Grid, unpad_box
from deepstack_jax.layout.modes import MODES, ImageMode
from deepstack_jax.layout.stack import SAMPLINGS

SEQUENCES = ("global", "zero", "crops", "global_crops")
STACKS = ("none", "crops", "dummy", "global", "global_crops")
MERGES = ("flat", "spatial", "spatial_unpad")


@dataclass(frozen=True)
class VisualLayout:
    """Index arrays of one image."""

    tokens: np.ndarray  # i32[m] what is in the sequence
    stack: np.ndarray  # i32[J, m] what is added to it, group by group
    views: int  # crop slots the image takes, the global view included

    def place(self, first_slot: int, patches: int) -> VisualLayout:
        """The same layout with the image's views in the slots from `first_slot` on; sentinels stay."""
        shift = first_slot * patches
        moved = [np.where(source >= 0, source + shift, source).astype(np.int32) for source in (self.tokens, self.stack)]
        return VisualLayout(moved[0], moved[1], self.views)


@dataclass(frozen=True)
class LayoutSpec:
    """How images of a run are laid out; `DeepStackConfig.layout` builds it."""

    mode: str  # one of MODES, as `ImageConfig.mode`
    side: int  # tokens along a side of a crop; P = side**2
    num_crops: int  # groups of crops are filled up with exact zeros to it, as upstream; HD: squared crops per view, rounded
    grids: tuple[Grid, ...]  # every crop grid that an image can get; empty if there is the global view alone
    sampling: str  # one of SAMPLINGS
    sequence: str  # one of SEQUENCES
    stack: str  # one of STACKS
    merge: str  # one of MERGES (anyres only)
    taps: int = 0  # further groups, of the global view by other layers of the tower; they come last

    @property
    def kind(self) -> ImageMode:
        """What the mode says of grids and tokens."""
        return MODES[self.mode]

    @property
    def patches(self) -> int:
        """P, tokens per crop."""
        return self.side**2

    @property
    def upsampling(self) -> int:
        """HD: each view is seen again in upsampling x upsampling crops."""
        return math.isqrt(self.num_crops)

    @property
    def groups(self) -> int:
        """J, the groups of the stack."""
        crops = self.upsampling**2 if self.kind.upsampled else self.num_crops
        return {"none": 0, "crops": crops, "dummy": crops, "global": 1, "global_crops": crops + 1}[self.stack] + self.taps

    @property
    def max_views(self) -> int:
        """Most crop slots that an image takes."""
        return max((self.views(grid) for grid in self.grids), default=1)

    @property
    def max_tokens(self) -> int:
        """Most visual tokens that an image puts into the sequence."""
        return max((self.token_count(grid) for grid in self.grids), default=self.patches)

    def views(self, grid: Grid | None) -> int:
        """Crop slots of an image with this grid, the global view included."""
        cells = 0 if grid is None else grid[0] * grid[1]
        return (1 + cells) * (1 + self.upsampling**2) if self.kind.upsampled else 1 + cells

    def token_count(self, grid: Grid | None, size_wh: tuple[int, int] | None = None) -> int:
        """Visual tokens of an image with this grid; without its size, the most that any image with the grid has."""
        if self.kind.mosaic and grid is not None:
            if size_wh is not None:
                return self.layout(grid, size_wh).tokens.size
            newlines = grid[0] * self.side if self.kind.newline(self.merge) else 0
            return self.patches * (1 + grid[0] * grid[1]) + newlines
        return (
            self.patches * {"global": 1, "zero": 1, "crops": self.num_crops, "global_crops": 1 + self.num_crops}[self.sequence]
        )

    def layout(self, grid: Grid | None, size_wh: tuple[int, int]) -> VisualLayout:
        """Layout of one image.

        Args:
          grid: (rows, cols) of its crops, None if there is the global view alone.
          size_wh: (width, height) of the original image in pixels; what `spatial_unpad` cuts away depends on it.
        """
        if grid is None and ("crops" in self.sequence or "crops" in self.stack):
            raise ValueError(
                f"sequence {self.sequence!r} with stack {self.stack!r} needs crops, but image mode {self.mode!r} gives the "
                "global view alone"
            )
        if grid is not None and grid not in self.grids:
            raise ValueError(
                f"grid {grid[0]}x{grid[1]} is none of the {len(self.grids)} that {self.mode!r} cuts; see image_grid"
            )
        if grid is None or not self.kind.mosaic:
            return self._plain(grid)
        return self._hd(grid) if self.kind.upsampled else self._anyres(grid, size_wh)

    def _plain(self, grid: Grid | None) -> VisualLayout:
        """DeepStack-L and -V (paper sections 3.2 and 3.3), LLaVA-1.5 with the stack off, and the ablations."""
        crops = np.full((self.num_crops, self.patches), ZERO, np.int32)
        if grid is not None:
            crops[: grid[0] * grid[1]] = SAMPLINGS[self.sampling](*grid, self.side) + self.patches
        base = np.arange(self.patches, dtype=np.int32)
        tokens = {
            "global": base,
            "zero": np.full(self.patches, ZERO, np.int32),
            "crops": crops.ravel(),
            "global_crops": np.concatenate([base, crops.ravel()]),
        }[self.sequence]
        return VisualLayout(tokens, self._groups(base, crops, tokens.size), self.views(grid))

    def _hd(self, grid: Grid) -> VisualLayout:
        """DeepStack-L-HD: the global view and a mosaic of cells, each with its own stack; every row ends in a newline."""
        views, up = 1 + grid[0] * grid[1], self.upsampling
        plain = np.arange(views * self.patches, dtype=np.int32).reshape(views, -1)
        tokens = _global_and_mosaic(plain, grid, self.side, newline=True)
        first = (views + np.arange(views, dtype=np.int32) * up**2) * self.patches
        dealt = SAMPLINGS[self.sampling](up, up, self.side)
        groups = [_global_and_mosaic(first[:, None] + group, grid, self.side, newline=True) for group in dealt]
        stack = self._groups(tokens, np.stack(groups), tokens.size)
        sequence = tokens if self.sequence == "global" else np.full_like(tokens, ZERO)
        return VisualLayout(sequence, stack, self.views(grid))

    def _anyres(self, grid: Grid, size_wh: tuple[int, int]) -> VisualLayout:
        """LLaVA-NeXT: the global view, then the crops one after another, or as a mosaic, the letterbox cut off."""
        views = 1 + grid[0] * grid[1]
        tokens = np.arange(views * self.patches, dtype=np.int32)
        if self.merge != "flat":
            unpad = self.merge == "spatial_unpad"
            box = unpad_box(size_wh, grid[0] * self.side, grid[1] * self.side) if unpad else None
            tokens = _global_and_mosaic(tokens.reshape(views, -1), grid, self.side, newline=unpad, box=box)
        return VisualLayout(tokens, self._tapped(tokens.size), views)

    def _groups(self, base: np.ndarray, crops: np.ndarray, size: int) -> np.ndarray:
        """The stack i32[J, m] out of what the global view gives and what the crops give."""
        groups = {
            "none": np.zeros((0, size), np.int32),
            "crops": crops,
            "dummy": np.tile(base, (len(crops), 1)),
            "global": base[None],
            "global_crops": np.concatenate([base[None], crops]),
        }[self.stack]
        if groups.shape[1] != size:
            raise ValueError(
                f"stack {self.stack!r} adds {groups.shape[1]} tokens per group to a sequence {self.sequence!r} of {size}"
            )
        return np.concatenate([groups, self._tapped(size)])

    def _tapped(self, size: int) -> np.ndarray:
        """The groups of taps i32[taps, m]: the global view's tokens where the sequence has them, at its beginning."""
        groups = np.full((self.taps, size), ZERO, np.int32)
        groups[:, : self.patches] = np.arange(self.patches)
        return groups


def _global_and_mosaic(
    views: np.ndarray, grid: Grid, side: int, *, newline: bool, box: tuple[slice, slice] | None = None
) -> np.ndarray:
    """i32[m] tokens of the global view, then of the cells row by row across the picture (its part `box`)."""
    rows, cols = grid
    mosaic = views[1:].reshape(rows, cols, side, side).transpose(0, 2, 1, 3).reshape(rows * side, cols * side)
    if box is not None:
        mosaic = mosaic[box]
    if newline:
        mosaic = np.pad(mosaic, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([views[0], mosaic.ravel()]).astype(np.int32)
