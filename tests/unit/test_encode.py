"""What is checked of template and tokenizer together, before anything is encoded."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from deepstack_jax.data.encode.tokenizer import HFTokenizer, check_template


def test_an_end_of_turn_that_is_the_unknown_token_is_refused(tmp_path):
    """A tokenizer that joins what it does not know gives one token for anything; learnt as the end, it would end nothing."""
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(tmp_path)
    check_template("v1", tokenizer)
    with pytest.raises(ValueError, match=r"ends a turn with <\|eot_id\|>, .* reads as its unknown token \(0\), expected"):
        check_template("llama_3", tokenizer)
