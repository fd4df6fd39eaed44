"""Four fields of scanned receipts, in rows of LLaVA JSON as `train` reads them; every field is a question of its own."""

from deepstack_jax.config import LimitsConfig
from deepstack_jax.data.example import IMAGE_MARK
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark, Item, Protocol
from deepstack_jax.evaluate.benchmarks.rows import Form, ListRows, Row, Rows, field, first_file, read_list
from deepstack_jax.evaluate.scorers.texts import ANLS, EXACT_MATCH, WORD_F1


def field_of(question: str) -> str:
    """Which field a question asks for, by its first line; "" where it asks for another thing.

    "What is the name of the company ...?", "What is the address of the company ...?": an address is always a company's.
    """
    words = question.strip().split("\n")[0].lower()
    return next((name for name in ("address", "date", "total", "company") if name in words), "")


def _open(folder: str, _limits: LimitsConfig) -> Rows | None:
    path = first_file(folder, ("val.json",))
    if path is None:
        return None
    found = []
    for number, row in enumerate(read_list(path)):
        turns = field(row, "conversations", list, f"{path} record {number}")
        for asked, said in zip(turns[::2], turns[1::2], strict=False):
            where = f"{path} record {number}"
            words = field(asked, "value", str, where).replace(IMAGE_MARK, "").strip()
            if kind := field_of(words):
                found.append(row | {"kind": kind, "question": words, "answer": field(said, "value", str, where)})
    return ListRows(path, found)


def _item(row: Row, _number: int) -> Item:
    answer = field(row, "answer", str)
    return Item(f"{field(row, 'id')}/{row['kind']}", row["question"], (answer,) if answer else (), kind=row["kind"])


RECEIPTS = Benchmark(
    title="company, date, total and address of scanned receipts",
    folder="receipts",
    origin="scans of ICDAR 2019 SROIE as LLaVA JSON, a row of questions for every receipt",
    metric="exact_match",
    forms=(Form("val.json and images/", _open),),
    item=_item,
    images=lambda row, _folder: [field(row, "image", str)],
    protocols={
        "own": Protocol(
            words="exact match, ANLS and F1 over words",
            scorers={"exact_match": EXACT_MATCH, "anls": ANLS, "word_f1": WORD_F1},
            max_new_tokens=64,
        )
    },
)
