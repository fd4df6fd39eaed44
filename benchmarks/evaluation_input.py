"""What an evaluation gains by decoding images while the device answers: `python -m benchmarks.evaluation_input`.

  --batches=N     batches of 8 questions, each about a photograph of its own; 12 unless given
  --side=N        pixels of a photograph's side; 1600 unless given
  --device_ms=N   in place of the model a device that only waits so long for a batch, and leaves the host's cores alone as an
                  accelerator does. Without it the model of benchmarks/serve.py answers on these cores, for which both compete

Both ways take turns, three times each, and must give the same answers; the least seconds of each are printed.
"""

import argparse
import io
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from rich.table import Table

from benchmarks.serve import drawn
from deepstack_jax.config import MeshConfig
from deepstack_jax.data.example import Example, Message
from deepstack_jax.evaluate import runner
from deepstack_jax.evaluate.checkpoint import EvalCheckpoint
from deepstack_jax.evaluate.on_mesh import Measured, MeshAnswerer, over_mesh
from deepstack_jax.evaluate.runner import EvaluationRequest, ask_all
from deepstack_jax.evaluate.tasks import Prediction, Task
from deepstack_jax.generate.options import Options
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import Console

BATCH, TURNS, TOKENS = 8, 3, 16


class Photographs(list[Example]):
    """Rows of one question each about a JPEG in memory."""

    def __init__(self, count: int, side: int) -> None:
        rng = np.random.default_rng(0)
        for row in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            turns = (Message("human", "<image>\nWhat is it?"), Message("gpt", "noise"))
            self.append(Example(row, f"row {row}", (file.getvalue(),), turns))


class WaitingDevice(MeshAnswerer):
    """Takes its time and none of the host's."""

    milliseconds: int = 0

    def answer_batch(self, prompts: Any, options: Options, batch_size: int) -> list[Measured]:
        time.sleep(self.milliseconds / 1000)
        return [Measured(str(prompt.pixels[0].sum()), 1, 1.0) for prompt in prompts]


def one_after_the_other(items: Iterator[Any], _ahead: int) -> Iterator[Any]:
    return items


def timed(answerer: MeshAnswerer, source: Photographs, *, background: bool) -> tuple[float, list[Prediction]]:
    rows: Any = source
    evaluation = EvaluationRequest(Task(rows), answerer.config, "drawn", {}, len(source), Options(max_new_tokens=TOKENS), BATCH)
    how = runner.in_background if background else one_after_the_other
    began = time.perf_counter()
    with mock.patch.object(runner, "in_background", how):
        found, _ = ask_all(answerer, evaluation, EvalCheckpoint(None, None), Console(quiet=True))
    return time.perf_counter() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batches", 12), ("side", 1600), ("device_ms", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    source = Photographs(given.batches * BATCH, given.side)
    answerer = over_mesh(drawn().answerer, make_mesh(MeshConfig()))
    if given.device_ms:
        answerer = WaitingDevice(**vars(answerer))
        object.__setattr__(answerer, "milliseconds", given.device_ms)
    timed(answerer, Photographs(BATCH, given.side), background=True)  # compiles
    seconds: dict[bool, list[float]] = {False: [], True: []}
    answers = []
    for _ in range(TURNS):
        for background, found in seconds.items():
            took, predictions = timed(answerer, source, background=background)
            found.append(took)
            answers.append([replace(one, margin=None) for one in predictions])
    assert all(one == answers[0] for one in answers), "the answers are not the same"
    table = Table(
        "images", "seconds", "questions/s", title=f"{len(source)} questions, photographs of {given.side} x {given.side}"
    )
    for background, name in ((False, "decoded between batches"), (True, "decoded while the device answers")):
        least = min(seconds[background])
        table.add_row(name, f"{least:.2f}", f"{len(source) / least:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
