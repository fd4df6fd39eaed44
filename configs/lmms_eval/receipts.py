"""What receipts.yaml does to rows of LLaVA JSON: every answered turn is a question of its own."""

from pathlib import Path

from datasets import Dataset
from PIL import Image

FIELDS = ("address", "date", "total", "company")


def questions(rows):
    """A document for every question that asks for one of the fields."""
    found = []
    for row in rows:
        turns = row["conversations"]
        for asked, said in zip(turns[::2], turns[1::2], strict=False):
            words = asked["value"].replace("<image>", "").strip()
            if any(field in words.split("\n")[0].lower() for field in FIELDS):
                found.append({"id": row["id"], "image": row["image"], "question": words, "answer": said["value"]})
    return Dataset.from_list(found)


def pictures(document):
    """The scan."""
    return [Image.open(Path(__file__).parent / "receipts" / document["image"]).convert("RGB")]
