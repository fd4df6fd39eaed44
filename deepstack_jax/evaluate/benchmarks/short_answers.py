"""GQA, POPE and ChartQA: one image, a short answer that is right or wrong."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.formats.styles import RecordError
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.coco_vqa import PHRASE
from deepstack_jax.evaluate.benchmarks.rows import (
    Form,
    ListRows,
    Row,
    Rows,
    by_name,
    field,
    first_file,
    one_image,
    parquet,
    read_lines,
    read_list,
    texts,
)
from deepstack_jax.evaluate.scorers.short_answers import GQA_EXACT_MATCH, RELAXED_ACCURACY
from deepstack_jax.evaluate.scorers.texts import Scorer
from deepstack_jax.evaluate.scorers.yes_no import (
    POPE_ACCURACY,
    POPE_PAPER_ACCURACY,
    pope_numbers,
    pope_paper_numbers,
    whole_answer,
    yes_or_no,
)
from deepstack_jax.evaluate.tasks import Prediction, mean_by_kind

WORD = "\nAnswer the question with a single word."
POPE_KINDS = ("random", "popular", "adversarial")


class _TwoTables:
    """GQA's tables: questions in one, which name their image in the other."""

    def __init__(self, questions: Rows, images: Rows) -> None:
        self.path, self._questions, self._images = questions.path, questions, images
        self._places = {row["id"]: number for number, row in enumerate(images.scan()) if isinstance(row, dict)}

    def __len__(self) -> int:
        return len(self._questions)

    def read(self, index: int) -> Any:
        row = self._questions.read(index)
        if (place := self._places.get(row["imageId"])) is None:
            raise RecordError(
                f"names the image {row['imageId']!r:.80}, which {self._images.path} does not hold; fetch both again"
            )
        return row | {"image": self._images.read(place)["image"]}

    def scan(self) -> Iterator[Any]:
        return self._questions.scan()

    def place(self, index: int) -> str:
        return self._questions.place(index)


_GQA_QUESTIONS = parquet(("testdev_balanced_instructions/testdev-*.parquet",), ("id", "imageId", "question", "answer"), ())
_GQA_IMAGES = parquet(("testdev_balanced_images/testdev-*.parquet",), ("id",))


def _gqa_tables(folder: str, limits: LimitsConfig) -> Rows | None:
    questions, images = _GQA_QUESTIONS.open(folder, limits), _GQA_IMAGES.open(folder, limits)
    return _TwoTables(questions, images) if questions and images else None


GQA = Benchmark(
    title="GQA, balanced test-dev",
    folder="gqa",
    origin="from the GQA site of Stanford, or lmms-lab/GQA of the Hugging Face hub (testdev_balanced_*)",
    metric="exact_match",
    forms=(
        by_name(("testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json"), "id", "images"),
        Form("testdev_balanced_instructions/ and testdev_balanced_images/ (parquet)", _gqa_tables),
    ),
    item=lambda row, _number: Item(str(field(row, "id")), field(row, "question", str), texts(row.get("answer"))),
    images=one_image("imageId", "images/{}.jpg", "{}.jpg"),
    protocols={
        "own": Protocol(
            words="exact match, lower case, without punctuation",
            suffix=PHRASE,
            scorers={"exact_match": GQA_EXACT_MATCH},
            max_new_tokens=16,
        )
    },
    paper={"DeepStack-L": "63.1", "DeepStack-V": "64.1", "DeepStack-L-HD": "65.2"},
)


def _pope_lines(folder: str, _limits: LimitsConfig) -> Rows | None:
    names = {kind: (f"coco_pope_{kind}.json", f"output/coco/coco_pope_{kind}.json") for kind in POPE_KINDS}
    if not any(first_file(folder, found) for found in names.values()):
        return None
    rows = []
    for kind, found in names.items():
        for row in read_lines(first_file(folder, found) or f"{folder}/{found[0]}"):
            told = row if isinstance(row, dict) else {}
            known = {"question": told.get("text"), "answer": told.get("label"), "image_source": told.get("image")}
            rows.append({"category": kind, "question_id": told.get("question_id")} | known)
    return ListRows(f"{folder}/coco_pope_*.json", rows)


def _pope_item(row: Row, _number: int) -> Item:
    kind, answer = field(row, "category", str), field(row, "answer", str)
    if answer.lower().strip() not in ("yes", "no"):
        raise RecordError(f"answer is {answer!r:.80}, expected yes or no; fetch the file again")
    return Item(f"{kind}_{field(row, 'question_id')}", field(row, "question", str), (answer,), kind=kind)


def pope_aggregate(
    numbers: Callable[[Sequence[str], Sequence[str]], dict[str, float]], words: str, predictions: Sequence[Prediction]
) -> dict[str, dict[str, Any]]:
    """The five numbers over all answers, and over those of each way in which POPE chooses what to ask for.

    Args:
      numbers: (what answers say, what is right) -> the five.
      words: what they mean.
    """
    groups: dict[str, list[Prediction]] = {}
    for one in predictions:
        groups.setdefault(one.kind, []).append(one)
    found = numbers([one.parsed for one in predictions], [one.references[0] for one in predictions])
    by_kind = {
        kind: numbers([one.parsed for one in group], [one.references[0] for one in group]) for kind, group in groups.items()
    }
    return {
        name: {"score": score, "by_kind": {kind: by_kind[kind][name] for kind in sorted(by_kind)}, "protocol": words}
        for name, score in found.items()
    }


def _pope(words: str, scorer: Scorer, parse: Callable[[str], str], numbers: Callable) -> Protocol:
    return Protocol(
        words=words,
        body=lambda item: item.question.strip(),
        suffix=PHRASE,
        scorers={"accuracy": scorer},
        parse=lambda _question, answer: parse(answer),
        aggregate=lambda predictions: pope_aggregate(numbers, words, predictions),
        max_new_tokens=128,
    )


POPE = Benchmark(
    title="POPE over COCO: random, popular, adversarial",
    folder="pope",
    origin="from RUCAIBox/POPE on GitHub (output/coco, and COCO's val2014 images), or lmms-lab/POPE of the Hugging Face hub",
    metric="f1_score",
    forms=(
        Form("coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, val2014/", _pope_lines),
        parquet(("data/test-*.parquet", "test-*.parquet"), ("question_id", "question", "answer", "category")),
    ),
    item=_pope_item,
    images=one_image("image_source", "val2014/{}", "{}"),
    protocols={
        "own": _pope("POPE's own reading of answers, yes-ratio of the answers", POPE_ACCURACY, yes_or_no, pope_numbers),
        "deepstack-paper": _pope(
            'only "yes" and "no" count, yes-ratio of the right answers', POPE_PAPER_ACCURACY, whole_answer, pope_paper_numbers
        ),
    },
    paper={"DeepStack-L": "86.7", "DeepStack-V": "87.6", "DeepStack-L-HD": "86.5"},
)


def _chartqa_json(folder: str, _limits: LimitsConfig) -> Rows | None:
    names = {"human_test": "test/test_human.json", "augmented_test": "test/test_augmented.json"}
    if not any(first_file(folder, (name,)) for name in names.values()):
        return None
    rows = []
    for kind, name in names.items():
        for row in read_list(f"{folder}/{name}"):
            told = row if isinstance(row, dict) else {}
            rows.append(told | {"question": told.get("query"), "answer": told.get("label"), "type": kind})
    return ListRows(f"{folder}/test/test_*.json", rows)


def _chartqa_item(row: Row, number: int) -> Item:
    kind = "human" if field(row, "type", str) == "human_test" else "augmented"
    return Item(str(number), field(row, "question", str), texts(row.get("answer")), kind=kind)


CHARTQA = Benchmark(
    title="ChartQA, test",
    folder="chartqa",
    origin="from vis-nlp/ChartQA on GitHub, or lmms-lab/ChartQA of the Hugging Face hub",
    metric="relaxed_accuracy",
    forms=(
        Form("test/test_human.json, test/test_augmented.json, test/png/", _chartqa_json),
        parquet(("data/test-*.parquet", "test-*.parquet"), ("type", "question", "answer")),
    ),
    item=_chartqa_item,
    images=one_image("imgname", "test/png/{}", "{}"),
    protocols={
        "own": Protocol(
            words="relaxed accuracy, 5%",
            suffix=WORD,
            scorers={"relaxed_accuracy": RELAXED_ACCURACY},
            max_new_tokens=16,
            aggregate=mean_by_kind,
        )
    },
    paper={"DeepStack-L": "19.2", "DeepStack-V": "20.6", "DeepStack-L-HD": "56.3"},
)
