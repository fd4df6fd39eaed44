"""MM-Vet: open answers that a language model judges; what is written here is its input."""

import json
from collections.abc import Sequence

from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.rows import Row, by_name, field, one_image, parquet, texts
from deepstack_jax.evaluate.scorers.judged import mmvet_file, mmvet_judge_line
from deepstack_jax.evaluate.tasks import Prediction

THINK = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"


def _item(row: Row, _number: int) -> Item:
    answers, question = texts(row.get("answer")), field(row, "question", str)
    details = {"question": question, "answer": answers[0] if answers else ""}
    return Item(str(field(row, "question_id")), question, answers, details=details)


def mmvet_submission(predictions: Sequence[Prediction]) -> dict[str, str]:
    """MM-Vet's own file for its evaluator, and the rows that its few-shot prompt for a judge ends with, one a line."""
    lines = [
        {"question_id": one.id, "row": mmvet_judge_line(one.details["question"], one.details["answer"], one.prediction.strip())}
        for one in predictions
    ]
    file = mmvet_file({one.id: one.prediction.strip() for one in predictions})
    return {"mm-vet.json": file, "mm-vet-judge.jsonl": "".join(f"{json.dumps(line)}\n" for line in lines)}


def _protocol(words: str, before: str) -> Protocol:
    return Protocol(words=words, body=lambda item: before + item.question, scorers={}, max_new_tokens=1024)


MMVET = Benchmark(
    title="MM-Vet",
    folder="mmvet",
    origin="from yuweihao/MM-Vet on GitHub, or lmms-lab/MMVet of the Hugging Face hub",
    metric="",
    forms=(
        by_name(("mm-vet.json",), "question_id", "images"),
        parquet(("data/test-*.parquet", "test-*.parquet"), ("question_id", "question", "answer")),
    ),
    item=_item,
    images=one_image("imagename", "images/{}", "{}"),
    protocols={
        "own": _protocol("a judge's; the question alone", ""),
        "deepstack-paper": _protocol("a judge's (gpt-4); the question alone", ""),
        "lmms-eval": _protocol("a judge's; asked to think step by step first, as later releases of lmms-eval do", THINK),
    },
    submission=mmvet_submission,
    paper={"DeepStack-L": "29.9", "DeepStack-V": "33.0", "DeepStack-L-HD": "37.5"},
)
