"""The batch contract between the pipeline and the model, and the axis letters used everywhere. Imports numpy only.

Axis letters (annotations, einsums and docs use these):

    B batch rows            T sequence              S keys
    D decoder width         F mlp width             N query heads
    K key/value heads       H head dim              V vocabulary
    L layers                C crop slots per row    P patches per crop
    E vision width          M visual tokens per row J injected stack groups
    G examples per row      y, x  pixel rows and columns

Grids are always `(rows, cols)`.
"""

from typing import Any, NamedTuple

import numpy as np

# Entries of `token_source` and `stack_source` below zero name no encoded token.
ZERO = -1  # exactly zero after projection: projector(0) is not 0
NEWLINE = -2  # the learned `image_newline`, which lives in decoder width

# Entry of `visual_index` at a position that holds text.
TEXT = -1


# numpy arrays on the host, jax arrays inside a step: a type checker that is told one of them is wrong in the other place.
AnyArray = Any


class Batch(NamedTuple):
    """One global (or per-host) batch with static shapes; a pytree of numpy or jax arrays.

    `visual_index` is the only source of visual positions: the merge into the sequence and every injection read it.
    Each entry 0..M-1 is at most once in a row of `visual_index`.
    """

    tokens: AnyArray  # i32[B, T] token ids; 0 under a visual token and in the padding
    targets: AnyArray  # i32[B, T] the token after t in its own segment
    loss_weights: AnyArray  # f32[B, T] 0 where nothing is predicted
    positions: AnyArray  # i32[B, T] restart at every segment
    segment_ids: AnyArray  # i32[B, T] 1.. per example, 0 = padding
    pixels: AnyArray  # u8[B, C, y, x, 3] crop slots shared by all images of the row
    token_source: AnyArray  # i32[B, M] encoded token (crop * P + patch) of each visual token, or ZERO, NEWLINE
    stack_source: AnyArray  # i32[B, J, M] the same for each injected group
    visual_index: AnyArray  # i32[B, T] which of the M is here, TEXT = -1
    example_id: AnyArray  # i64[B, G] records of the source; -1 = none


class BatchShape(NamedTuple):
    """The static sizes of a batch, all that a compiled step depends on."""

    rows: int  # B
    length: int  # T
    crops: int  # C
    crop_size: int  # y = x
    visual: int  # M
    groups: int  # J
    examples: int  # G


def empty_batch(shape: BatchShape) -> Batch:
    """A batch of padding: no example, no visual token, zero loss weight everywhere."""
    b, t = shape.rows, shape.length
    return Batch(
        tokens=np.zeros((b, t), np.int32),
        targets=np.zeros((b, t), np.int32),
        loss_weights=np.zeros((b, t), np.float32),
        positions=np.zeros((b, t), np.int32),
        segment_ids=np.zeros((b, t), np.int32),
        pixels=np.zeros((b, shape.crops, shape.crop_size, shape.crop_size, 3), np.uint8),
        token_source=np.full((b, shape.visual), ZERO, np.int32),
        stack_source=np.full((b, shape.groups, shape.visual), ZERO, np.int32),
        visual_index=np.full((b, t), TEXT, np.int32),
        example_id=np.full((b, shape.examples), -1, np.int64),
    )


def check_batch(batch: Batch, patches: int) -> None:
    """Raise ValueError where a host-built batch breaks the contract; a silent misalignment would train on wrong pixels.

    `patches` is P, the tokens that one crop gives. Costs a few comparisons per row: the pipeline runs it on every batch.
    """
    visual = batch.token_source.shape[1]
    encoded = batch.pixels.shape[1] * patches
    for name, source in (("token_source", batch.token_source), ("stack_source", batch.stack_source)):
        if source.size and (source.max() >= encoded or source.min() < NEWLINE):
            raise ValueError(f"{name} spans {source.min()}..{source.max()}, expected {NEWLINE}..{encoded - 1}")
    if batch.visual_index.max(initial=TEXT) >= visual or batch.visual_index.min(initial=TEXT) < TEXT:
        raise ValueError(f"visual_index reaches {batch.visual_index.max()}, expected {TEXT}..{visual - 1}")
    for row, index in enumerate(batch.visual_index):
        placed = index[index >= 0]
        if np.unique(placed).size != placed.size:
            raise ValueError(f"row {row}: a visual token is at two positions; every visual token is placed at most once")
    if np.any(batch.loss_weights[batch.segment_ids == 0]):
        raise ValueError("loss_weights are not zero in the padding")
