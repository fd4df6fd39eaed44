"""Whether a tokenizer fits the template and the decoder, known before anything is compiled."""

from __future__ import annotations

import re

from deepstack_jax.config import DataSpec
from deepstack_jax.data.encode.templates import get_template
from deepstack_jax.data.encode.tokenizer import Tokenizer, load_tokenizer
from deepstack_jax.errors import ConfigError, fetch_command

_NO_TOKEN = "<|\uf8ff|>"  # of a private character, so that no tokenizer has it: what this becomes, anything unknown does


def open_tokenizer(spec: DataSpec) -> Tokenizer:
    """The tokenizer, checked against template and decoder before anything is compiled."""
    if not spec.data.tokenizer:
        raise ConfigError("config.data.tokenizer is empty: give a folder with tokenizer.model with --config.data.tokenizer=DIR")
    try:
        tokenizer = load_tokenizer(spec.data.tokenizer)
        check_end_of_turn(spec.data.template, tokenizer)
    except (ValueError, OSError) as error:
        fetch = fetch_command(spec.data.tokenizer) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"config.data: {error}" + (f": {fetch}" if fetch else "")) from error
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, config.decoder.vocab_size is {spec.vocab_size}; raise it"
        )
    return tokenizer


def check_end_of_turn(template: str, tokenizer: Tokenizer) -> None:
    """Refuse a template whose end of turn is a special token that the tokenizer does not have.

    Spelt out in pieces it would be learnt as text, and an answer would never end at the token that stops it.

    Raises:
      ConversationError: no such template. ValueError: the end of turn is not one token.
    """
    end = get_template(template).end.strip()
    if not re.fullmatch(r"<[^<>\s]+>", end):
        return
    ids = known_ids(end, tokenizer)
    if len(ids) != 1 or ids == known_ids(_NO_TOKEN, tokenizer):
        what = f"{len(ids)} tokens" if len(ids) != 1 else f"its unknown token ({ids[0]})"
        raise ValueError(
            f"template {template!r} ends a turn with {end}, which the tokenizer reads as {what}, expected one "
            "special token; choose the template that the tokenizer was made for, or add the token to it"
        )


def known_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids; none where the tokenizer has no word for it."""
    try:
        return tokenizer.encode(text)[0].tolist()
    except ValueError:
        return []
