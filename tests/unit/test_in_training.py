"""What a run leaves at its end: scores that are computed once, and again where the file is damaged."""

import json

import numpy as np
import pytest

from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.evaluate.in_training import TrainingEvaluation, first_sizes
from deepstack_jax.printing import Console
from tests.unit.made_examples import MadeExamples
from tests.unit.tiny import tiny_config


def test_results_are_made_once_and_again_where_they_are_damaged(tmp_path, capsys):
    config = tiny_config(
        {"data.tokenizer": "bytes", "data.template": "direct", "data.max_length": 96, "decoder.vocab_size": 259}
    )

    def end(**facts):
        evaluation = TrainingEvaluation(config, tmp_path, Console())
        evaluation.train = MadeExamples(4)
        evaluation.finish(None, {"steps": 3, **facts})
        return json.loads((tmp_path / "results.json").read_text())

    assert end(parameters=7)["parameters"] == 7
    assert end(parameters=8)["parameters"] == 7, "they are there"
    for left in (b"", b'{"steps": 3, "na', b"[3]", b"\0\xff"):
        (tmp_path / "results.json").write_bytes(left)
        capsys.readouterr()
        assert end(parameters=9)["parameters"] == 9
        assert "results.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("images", [1, 2])
def test_visual_tokens_are_those_of_an_example_and_not_of_a_row(images):
    """With one example in a row they are counted in the batch, the outside reference; packing is to change nothing."""
    settings = {"data.tokenizer": "bytes", "data.template": "direct", "data.max_length": 96, "data.buckets": (48, 64)}
    config = tiny_config(settings | {"decoder.vocab_size": 259, "data.max_images": images, "data.max_bad_fraction": 1.0})
    source = MadeExamples(24, broken=(1,), refused=(8,))
    first = next(stream := TrainingStream(source, config.data_spec)).batch
    stream.close()
    rows = [np.append(tokens, stack) for tokens, stack in zip(first.token_source, first.stack_source, strict=True)]
    most = max(np.unique(row[row >= 0]).size for row in rows)
    assert first_sizes(source, config) == {"context_length": first.tokens.shape[1], "visual_tokens": most}
    packed = tiny_config(
        settings | {"decoder.vocab_size": 259, "data.max_images": images, "data.packing.enabled": True, "data.buckets": ()}
    )
    assert first_sizes(source, packed) == {"context_length": 96, "visual_tokens": most}
