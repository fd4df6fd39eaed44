"""Files for judges: benchmarks whose answers a language model grades; no score is invented here."""

import json
from collections.abc import Mapping


def mmvet_judge_line(question: str, answer: str, reply: str) -> str:
    """What MM-Vet appends to its few-shot prompt for the judge: the question, its ground truth and the reply as a table row."""
    truth = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"\n{question} | {truth} | {reply} |"


def mmvet_file(replies: Mapping[str, str]) -> str:
    """MM-Vet's own format, which its online evaluator takes: question id ("v1_0") -> reply."""
    return json.dumps(dict(replies), indent=2)
