"""Scores of every next token for the official code's own inputs: token ids with -200 where an image is."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.labels import IMAGE_TOKEN
from deepstack_jax.generate.options import RequestError
from deepstack_jax.generate.prompts import check_context, cut_image, example, image_list, pad_prompts
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.printing import plural


@partial(jax.jit, static_argnames=("model",))
def _scores(model: DeepStack, params: Any, batch: Batch) -> Float[Array, "B T V"]:
    variables = {"params": params}
    return model.apply(variables, model.apply(variables, batch).hidden, method="logits")


def next_token_logits(
    model: DeepStack, params: Any, config: Config, input_ids: Any, images: Any, attention_mask: Any, pad_id: int, exif: str
) -> np.ndarray:
    """As `api.LMM.logits`, where the arguments are described."""
    ids = _array("input_ids", input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise RequestError(
            f"input_ids got {ids.dtype}{list(ids.shape)}, expected integers [rows, tokens]; pad the rows to one length"
        )
    mask = real_tokens(ids, pad_id) if attention_mask is None else _as_mask(attention_mask, ids.shape)
    allowed = (ids == IMAGE_TOKEN) | ((ids >= 0) & (ids < config.decoder.vocab_size))
    if not allowed[mask].all():
        bad = int(ids[mask & ~allowed][0])
        raise RequestError(
            f"input_ids holds {bad}, expected 0..{config.decoder.vocab_size - 1}, or {IMAGE_TOKEN} where an image is"
        )
    rows = _rows(ids, mask, images, config, exif)
    lengths = [row.length for row in rows]
    for number, length in enumerate(lengths):
        check_context(length, 0, config, f"row {number}")
    scores = np.asarray(_scores(model, params, pad_prompts(rows, config)))
    longest, left = max(lengths), padded_left(mask)
    out = np.zeros((len(rows), longest, scores.shape[-1]), np.float32)
    for row, length in enumerate(lengths):
        start = longest - length if left else 0
        out[row, start : start + length] = scores[row, :length]
    return out


def real_tokens(ids: np.ndarray, pad_id: int) -> np.ndarray:
    """bool[B, T]: False in the runs of `pad_id` at both ends of a row; inside it is a token like any other."""
    other = ids != pad_id
    return np.logical_or.accumulate(other, axis=1) & np.logical_or.accumulate(other[:, ::-1], axis=1)[:, ::-1]


def padded_left(mask: np.ndarray) -> bool:
    """Whether rows are padded in front, and none at the end."""
    return not mask[:, 0].all() and bool(mask[:, -1].all())


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise RequestError(f"{name} has rows of several lengths, expected one; pad them (with an attention_mask)") from error


def _as_mask(attention_mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    mask = _array("attention_mask", attention_mask)
    if mask.shape != shape:
        raise RequestError(f"attention_mask got shape {list(mask.shape)}, expected that of input_ids, {list(shape)}")
    if not np.isin(mask, (0, 1)).all():
        raise RequestError(f"attention_mask holds {mask[~np.isin(mask, (0, 1))][0]}, expected 1 at tokens and 0 at padding")
    return mask.astype(bool)


def _rows(ids: np.ndarray, mask: np.ndarray, images: Any, config: Config, exif: str) -> list[EncodedExample]:
    """Every row without its padding, and with its images cut."""
    images = [None] * len(ids) if images is None else images
    if not isinstance(images, list | tuple):
        raise RequestError(f"images is a {type(images).__name__}, expected one list of images per row of input_ids")
    if len(images) != len(ids):
        lists, rows = plural(len(images), "list"), plural(len(ids), "row")
        raise RequestError(f"images got {lists} for {rows} of input_ids; give one per row, [] for text")
    images = [image_list(given) for given in images]
    kept = [row[real] for row, real in zip(ids, mask, strict=True)]
    for number, (row, given) in enumerate(zip(kept, images, strict=True)):
        if not isinstance(given, list | tuple):
            raise RequestError(f"images[{number}] is a {type(given).__name__}, expected a list of images, one list per row")
        wanted, count = int((row == IMAGE_TOKEN).sum()), len(given)
        if not row.size:
            raise RequestError(f"row {number} of input_ids holds nothing but padding; leave it out")
        if wanted != count:
            marks = plural(wanted, "image token")
            raise RequestError(f"row {number} has {marks} ({IMAGE_TOKEN}) and {plural(count, 'image')}; give one for each")
    cut = [[cut_image(image, config, exif) for image in given] for given in images]
    return [example(row, mine) for row, mine in zip(kept, cut, strict=True)]
