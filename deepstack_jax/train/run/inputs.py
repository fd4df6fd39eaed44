"""What a run reads: tokenizer, training rows, and this process' share of them."""

from __future__ import annotations

from functools import partial

from jax.sharding import Mesh

from deepstack_jax.config import Config
from deepstack_jax.data.encode.tokenizer import Tokenizer, open_tokenizer
from deepstack_jax.data.example import Source
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.errors import try_all
from deepstack_jax.parallel.distributed import process_slice
from deepstack_jax.parallel.mesh import check_batch_fits
from deepstack_jax.train.checkpoint.init_weights import find_weights


def open_inputs(config: Config, *, starts: bool) -> tuple[Tokenizer, Source]:
    """The tokenizer and the training data; all that is missing is said at once, weights too where the run starts from them."""
    weights = [partial(find_weights, config)] if starts and config.train.weights else []
    tokenizer, source, *_ = try_all(
        partial(open_tokenizer, config.data_spec), partial(open_source, config.data, "train"), *weights
    )
    return tokenizer, source


def open_stream(config: Config, source: Source, mesh: Mesh) -> TrainingStream:
    """This process' rows of every batch."""
    check_batch_fits(config, mesh)
    mine, shards = process_slice(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    return TrainingStream(source, config.data_spec, process=mine.index, processes=mine.count, devices=shards)
