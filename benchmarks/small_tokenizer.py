"""The training of a small tokenizer, for models that are trained from nothing."""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from deepstack_jax.data.encode.fast_tokenizer import HFTokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path, more: tuple[str, ...] = ()) -> HFTokenizer:
    """Trains a byte-level BPE on `texts` and writes `path`/tokenizer.json; equal texts give an equal file.

    Ids 0, 1, 2 are <pad>, <s>, </s>, then come `more`, all recognised anywhere in a text; BOS is added in front. At least 259
    ids are needed.
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size is {vocab_size}; expected at least 259: 256 bytes and 3 special tokens")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special, alphabet = ["<pad>", "<s>", "</s>", *more], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore[reportAttributeAccessIssue]
    Path(path).mkdir(parents=True, exist_ok=True)
    bpe.save(str(Path(path) / "tokenizer.json"))
    return HFTokenizer(path)
