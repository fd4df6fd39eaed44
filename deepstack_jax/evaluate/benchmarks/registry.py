"""Every benchmark by its name: `TASKS` says what there is, `find_task` opens one."""

from dataclasses import replace

from deepstack_jax.config import LIMITS, LimitsConfig
from deepstack_jax.data.formats import files
from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.evaluate.benchmarks.benchmark import Benchmark
from deepstack_jax.evaluate.benchmarks.choices import AI2D, MMMU, SEED_ALL, SEED_IMAGE
from deepstack_jax.evaluate.benchmarks.coco_vqa import OKVQA, VQAV2, VQAV2_TESTDEV
from deepstack_jax.evaluate.benchmarks.documents import (
    DOCVQA,
    DOCVQA_TEST,
    INFOVQA,
    INFOVQA_TEST,
    MULTIDOCVQA,
    TEXTVQA,
    TEXTVQA_OCR,
)
from deepstack_jax.evaluate.benchmarks.mmvet import MMVET
from deepstack_jax.evaluate.benchmarks.receipts import RECEIPTS
from deepstack_jax.evaluate.benchmarks.short_answers import CHARTQA, GQA, POPE
from deepstack_jax.evaluate.benchmarks.videos import ACTIVITYNETQA, EGOSCHEMA, MSVDQA, NEXTQA, NEXTQA_TEST
from deepstack_jax.evaluate.tasks import Task

TASKS: dict[str, Benchmark] = {
    "vqav2": VQAV2,
    "vqav2_testdev": VQAV2_TESTDEV,
    "okvqa": OKVQA,
    "gqa": GQA,
    "textvqa": TEXTVQA,
    "textvqa_ocr": TEXTVQA_OCR,
    "docvqa": DOCVQA,
    "docvqa_test": DOCVQA_TEST,
    "infovqa": INFOVQA,
    "infovqa_test": INFOVQA_TEST,
    "multidocvqa": MULTIDOCVQA,
    "chartqa": CHARTQA,
    "seed": SEED_ALL,
    "seed_image": SEED_IMAGE,
    "ai2d": AI2D,
    "mmmu": MMMU,
    "pope": POPE,
    "mmvet": MMVET,
    "egoschema": EGOSCHEMA,
    "nextqa": NEXTQA,
    "nextqa_test": NEXTQA_TEST,
    "msvdqa": MSVDQA,
    "activitynetqa": ACTIVITYNETQA,
    "receipts": RECEIPTS,
}


def find_task(name: str, root: str, protocol: str = "own", limits: LimitsConfig = LIMITS, suffix: str | None = None) -> Task:
    """The task of that name over its files below `root`.

    Args:
      root: folder or URL that holds a folder for every benchmark (`Benchmark.folder`).
      protocol: one of `Benchmark.protocols`: "own" is the benchmark's own definition, "deepstack-paper" what the numbers of the
        paper mean, "likelihood" a choice by the likelihood of the letters.
      limits: what a row and a row group of its tables may take.
      suffix: what follows every question, in place of the protocol's own.

    Raises:
      ConfigError: no such task or protocol; the nearest is named.
      SourceError: its files are not there, damaged, or of another split; the message says where they come from.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r:.80}; {nearest(name, TASKS)}")
    benchmark = TASKS[name]
    if protocol not in benchmark.protocols:
        raise ConfigError(f"task {name} has no protocol {protocol!r:.80}; {nearest(protocol, benchmark.protocols)}")
    task = benchmark.open(files.join(root, benchmark.folder), protocol, limits, suffix)
    return replace(task, name=name, protocol=protocol)
