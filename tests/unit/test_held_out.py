"""Rows as questions: which turns are asked with what before them, and what a row that cannot be asked does to the others."""

from typing import Any

import numpy as np
import pytest

from deepstack_jax.config import Config
from deepstack_jax.data.example import BadExample, Example, ExampleError, Message
from deepstack_jax.evaluate.ask import ask
from deepstack_jax.evaluate.on_mesh import Measured
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import CutImage, cut_image

PICTURE = np.zeros((40, 20, 3), np.uint8)


class Turns(tuple):
    """An encoded prompt, which knows its size."""

    layouts = ()

    @property
    def length(self) -> int:
        return sum(len(turn.words) for turn in self)


class Echo:
    """Answers with the number of turns that it was given; refuses what is too long, as a model does."""

    config, template, tokenizer = Config(), "v1", None

    def __init__(self) -> None:
        self.asked: list[int] = []  # questions of every call

    def cut_images(self, images: Any, options: Options) -> list[CutImage]:
        return [cut_image(image, self.config, options.exif) for image in images]

    def encode(self, turns: Any, options: Options, *, placed: bool = False) -> Any:
        assert placed
        if len(turns[-1].words) > 50:
            raise RequestError("the prompt takes 60 tokens")
        return Turns(turns)

    def answer_batch(self, prompts: Any, options: Options, batch_size: int) -> list[Measured]:
        self.asked.append(len(prompts))
        assert len(prompts) <= batch_size
        images = [sum(len(turn.images) for turn in turns) for turns in prompts]
        return [Measured(f"{len(turns)} turns {count} images", 3) for turns, count in zip(prompts, images, strict=True)]


class Rows(list):
    """A source; row None cannot be read."""

    def __getitem__(self, index: Any) -> Example:
        if super().__getitem__(index) is None:
            raise ExampleError(f"row {index} is damaged", "x")
        return super().__getitem__(index)


def row(index: int, *texts: str, images: int = 0) -> Example:
    messages = tuple(Message("human" if at % 2 == 0 else "gpt", text) for at, text in enumerate(texts))
    return Example(index, f"row{index}", (PICTURE,) * images, messages)


def asked(rows: list, size: int = 4, limit: int = 99) -> tuple[list[Any], Echo]:
    echo = Echo()
    source: Any = Rows(rows)
    answerer: Any = echo
    batches = ask(Task(source), answerer, Options(), size, range(min(limit, len(rows))))
    return [result for batch in batches for result in batch], echo


def test_every_answered_turn_with_the_true_turns_before_it():
    results, echo = asked([row(0, "<image>\nA?", "a", "And\n<image>", "b", images=2), row(1, "C?", "c")], size=2)
    assert [(p.row, p.turn, p.prediction, p.references) for p in results] == [
        (0, 0, "1 turns 1 images", ["a"]),
        (0, 1, "3 turns 2 images", ["b"]),
        (1, 0, "1 turns 0 images", ["c"]),
    ]
    assert echo.asked == [2, 1]
    assert [prediction.question for prediction in results] == ["A?", "And", "C?"]
    assert results[0].scores == {"exact_match": 0.0, "anls": 0.0}


def test_a_row_or_question_that_cannot_be_asked_spoils_no_other():
    rows = [row(0, "A?", "a"), None, row(2, "B" * 60, "b"), row(3, "<image>", "c"), row(4, "D?"), row(5, "E?", "e")]
    results, _ = asked(rows)
    bad = {result.index: result.reason for result in results if isinstance(result, BadExample)}
    good = [result.row for result in results if isinstance(result, Prediction)]
    assert good == [0, 3, 5]  # row 3 has no image: "<image>" is a word there
    assert bad.keys() == {1, 2, 4}
    assert "row 1 is damaged" in bad[1]
    assert "turn 0: the prompt takes 60 tokens" in bad[2]
    assert "no answered question" in bad[4]


def test_images_and_placeholders_must_agree():
    results, _ = asked([row(0, "A?", "a", images=1)])
    assert isinstance(results[0], BadExample)
    assert "row0: 0 <image> in the text, expected 1, one per image" in results[0].reason


def test_a_row_keeps_its_id_where_its_image_cannot_be_read(tmp_path):
    messages = (Message("human", "<image>"), Message("gpt", "a"))
    damaged = Example(1, "of mine", (b"no image",), messages)
    missing = Example(2, "of yours", (str(tmp_path / "gone.png"),), messages)
    results, _ = asked([row(0, "A?", "a"), damaged, missing])
    assert [(bad.index, bad.name) for bad in results if isinstance(bad, BadExample)] == [(1, "of mine"), (2, "of yours")]


def test_a_limit_and_a_wrong_template():
    results, echo = asked([row(number, "A?", "a") for number in range(5)], limit=3)
    assert (len(results), echo.asked) == (3, [3])
    answerer: Any = Echo()
    source: Any = Rows([])
    with pytest.raises(RequestError, match="unknown template 'v9'"):
        list(ask(Task(source), answerer, Options(template="v9"), 4, range(0)))
