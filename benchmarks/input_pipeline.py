"""Speed of the input: images per second of one core beside the straightforward way, and how long training waits for data.

  python -m benchmarks.input_pipeline
  python -m benchmarks.input_pipeline --receipts=DIR --photos=DIR --authors=PYTHON --output=FILE

  --receipts=DIR    a folder with images/ (gray) and train.json in LLaVA JSON, for configs/receipts.py
  --photos=DIR      a folder of RGB images
  --authors=PYTHON  interpreter that has the authors' repository, its torch and its transformers, to measure them too
  --output=FILE     where the report goes; docs/input_pipeline.md unless given

Every image is checked for equal pixels in all ways before anything is timed. Takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.input_ways import NUM_CROPS, SIDE
from configs import demo, receipts
from deepstack_jax.config import Config, build_config
from deepstack_jax.data.open import open_source
from deepstack_jax.data.pipeline import TrainingStream
from deepstack_jax.train.run.metrics import read_metrics

REPOSITORY = Path(__file__).parents[1]
OUTPUT = REPOSITORY / "docs" / "input_pipeline.md"
DATA = REPOSITORY.parent / "shared" / "data"
LABELS = {
    "authors": "the authors' code, float32",
    "transformers": "official procedure, CLIPImageProcessor of transformers 5, float32",
    "plain_numpy": "official procedure, bare numpy, float32",
    "pil": "the same views by PIL, uint8",
    "ours": "**here**, uint8",
    "decode_and_resize": "here, decoding and resizing alone",
    "decode": "here, decoding alone",
}
YIELD_PIXELS = ("authors", "transformers", "plain_numpy", "pil", "ours")
MOST_FILES = 40  # of a folder, evenly spaced in the order of their names
LEAST_VISITS = 400  # of files in all rounds over a folder
LEAST_ROUNDS = 10
WARM_UP = 10  # steps and batches that are not counted
STEPS = {"demo": 110, "receipts": 30}


class BenchmarkError(ValueError):
    """Nothing can be measured; the message is one line that says why."""


class Worker:
    """A process that goes one way, with the libraries of that way only."""

    def __init__(self, python: str, way: str) -> None:
        self.way = way
        command = [python, "-m", "benchmarks.input_ways", way]
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task: str) -> str:
        """Raises BenchmarkError where the process ended instead of answering; its own message is on stderr by then."""
        source, sink = self._process.stdin, self._process.stdout
        answer = ""
        if source is not None and sink is not None:
            try:
                source.write(task + "\n")
                source.flush()
                answer = sink.readline()
            except BrokenPipeError:
                pass
        if not answer:
            raise BenchmarkError(
                f"the process of way {self.way!r} ended at {task!r}, expected an answer; see its message above"
            )
        return answer.strip()

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Timed:
    """Time of every round, in which each way took each file once: f64[rounds, ways], in seconds per image."""

    ways: list[str]
    cpu: np.ndarray
    wall: np.ndarray

    def faster_than(self, way: str, clock: np.ndarray) -> np.ndarray:
        """f64[3]: quartiles over the rounds of how often our time fits into that of `way` in the same round."""
        return np.percentile(clock[:, self.ways.index(way)] / clock[:, self.ways.index("ours")], [25, 50, 75])


def check_identical(workers: list[Worker], path: Path) -> None:
    """All ways yield the same pixels of this file, to the bit.

    Raises:
      BenchmarkError: they do not. Their speeds would say nothing.
    """
    digests = {worker.way: worker.ask(f"digest {path}") for worker in workers if worker.way in YIELD_PIXELS}
    differing = [way for way, value in digests.items() if value != digests["ours"]]
    if differing:
        raise BenchmarkError(
            f"{path}: {', '.join(differing)} got other pixels than ours; run `make test ARGS=tests/unit/test_image.py`"
        )


def time_ways(workers: list[Worker], paths: list[Path]) -> Timed:
    """Let all ways take turns on each file, in an order that changes, so that a busy machine slows all of them alike."""
    rounds = max(LEAST_ROUNDS, LEAST_VISITS // len(paths))
    wall, cpu = np.zeros((2, rounds, len(workers)))
    numbered = list(enumerate(workers))
    for turn in range(rounds):
        start = turn // 2 % len(workers)
        order = (numbered[start:] + numbered[:start])[:: 1 if turn % 2 else -1]
        for path in paths:
            for number, worker in order:
                seconds = [float(part) for part in worker.ask(f"time {path}").split()]
                wall[turn, number] += seconds[0] / len(paths)
                cpu[turn, number] += seconds[1] / len(paths)
    return Timed([worker.way for worker in workers], cpu, wall)


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Keep this process, and those that it starts, on `count` cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def image_files(folder: Path, flag: str) -> list[Path]:
    """At most MOST_FILES files of the folder, evenly spaced."""
    known = Image.registered_extensions()
    files = sorted(path.resolve() for path in folder.iterdir() if path.suffix.lower() in known) if folder.is_dir() else []
    if not files:
        got = "holds no images" if folder.is_dir() else "is not a folder"
        raise BenchmarkError(f"{folder} {got}, expected a folder of image files; name another with --{flag}=DIR")
    return [files[len(files) * number // MOST_FILES] for number in range(MOST_FILES)] if len(files) > MOST_FILES else files


def describe(paths: list[Path]) -> str:
    """Number, colours, format and sizes of the files."""
    kinds, sizes = Counter(), []
    for path in paths:
        with Image.open(path) as image:
            kinds[f"{'gray' if image.mode == 'L' else image.mode} {image.format}"] += 1
            sizes.append(image.size)
    if len(paths) > 3:
        shape = "{:.0f}x{:.0f} pixels in the median".format(*np.median(sizes, axis=0))
    else:
        shape = " and ".join(f"{width}x{height}" for width, height in sizes) + " pixels"
    return f"{', '.join(f'{count} {kind}' for kind, count in kinds.items())}, {shape}"


def measure_images(title: str, workers: list[Worker], paths: list[Path]) -> str:
    """The section of the report on one folder."""
    for path in paths:
        check_identical(workers, path)
    timed = time_ways(workers, paths)
    lines = ["| way | images/s per core | ms per image | here is faster by (quartiles) |", "|---|---|---|---|"]
    for number, way in enumerate(timed.ways):
        seconds = float(np.median(timed.cpu[:, number]))
        faster = ""
        if way in YIELD_PIXELS and way != "ours":
            faster = "{1:.2f}x ({0:.2f} to {2:.2f})".format(*timed.faster_than(way, timed.cpu))
        lines.append(f"| {LABELS[way]} | {1 / seconds:.0f} | {1000 * seconds:.1f} | {faster} |")
        print(f"{title} {lines[-1]}", flush=True)
    first = timed.ways[0]
    by_wall = f"By the wall clock {timed.faster_than(first, timed.wall)[1]:.2f}x against {LABELS[first].partition(',')[0]}."
    return f"## {title}\n\n" + "\n".join(lines) + f"\n\n{len(timed.cpu)} rounds over {describe(paths)}. {by_wall}\n"


def measure_folders(folders: dict[str, list[Path]], authors: str) -> tuple[str, list[str]]:
    """What was measured on, in words, and a section of the report per folder; `authors` is an interpreter or empty."""
    interpreters = dict.fromkeys(LABELS, sys.executable)
    if authors:
        found = shutil.which(authors)
        if found is None:
            raise BenchmarkError(f"--authors={authors} is not a program, expected a Python interpreter; give its path")
        interpreters["authors"] = os.path.abspath(found)
    else:
        del interpreters["authors"]
    about = (
        f"{os.cpu_count()} cores of {processor_name()} ({platform.machine()}), load average {os.getloadavg()[0]:.1f} at first."
    )
    with ExitStack() as stack, on_cores(1):
        workers = []
        for way, python in interpreters.items():
            workers.append(Worker(python, way))
            stack.callback(workers[-1].close)
        about += f" {workers[-1].ask('versions')}."
        if authors:
            about += f" The authors' code: {workers[0].ask('versions')}."
        return about, [measure_images(title, workers, paths) for title, paths in folders.items()]


def measure_training(name: str, overrides: dict[str, str]) -> str:
    """The row of the report on one configuration: `train` on two cores, then its input alone on one."""
    settings = {"demo": demo, "receipts": receipts}[name].get_config()
    settings.update_from_flattened_dict(overrides)
    config = build_config(settings)
    per_batch = time_stream(config, STEPS[name])
    with tempfile.TemporaryDirectory() as workdir, on_cores(2):
        command = [sys.executable, "-m", "deepstack_jax.train", f"--config=configs/{name}.py", f"--workdir={workdir}"]
        # Logging waits for the device: else the host runs ahead, and its waiting hides behind steps that are still computing.
        flags = {**overrides, "train.log_every": 1, "train.steps": STEPS[name]}
        command += [f"--config.{key}={value}" for key, value in flags.items()]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BenchmarkError(
                f"configs/{name}.py ended with exit code {done.returncode}: {reason}; try {' '.join(command[1:3])}"
            )
        records = [record for record in read_metrics(Path(workdir)) if "data_wait" in record][WARM_UP:]
    seconds, shares = (np.array([record[key] for record in records]) for key in ("seconds_per_step", "data_wait"))
    wait, per_step = seconds @ shares / seconds.sum(), np.median(seconds)
    row = f"| configs/{name}.py | {config.train.batch_size} | {len(seconds)} | {per_step:.2f} | {wait:.2%} | "
    row += f"{shares.max():.1%} | {1000 * per_batch:.0f} | {per_step / per_batch:.0f}x |"
    print(row, flush=True)
    return row


def time_stream(config: Config, batches: int) -> float:
    """Seconds of one core that the input takes per batch, with nothing else going on."""
    stream = TrainingStream(open_source(config.data, "train"), config.data_spec)
    with on_cores(1):
        for _ in range(WARM_UP):  # beyond those made ahead
            next(stream)
        began = time.process_time()
        for _ in range(batches):
            next(stream)
        seconds = time.process_time() - began
    stream.close()
    return seconds / batches


def processor_name() -> str:
    """Of the first core, as the system calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


NOTES = """## What the numbers say

- The official procedure resizes the image to the grid, cuts it, and passes each view by itself through CLIP's image processor,
  which copies it into numpy, scales it in float64 and normalises it in float32. Here the views stay uint8, in one array, and
  the device normalises them: a quarter of the transfer. Gray files are resized as gray and become RGB at the very end.
- The `CLIPImageProcessor` measured is `CLIPImageProcessorPil`, which transformers 5 uses where there is no torchvision. Bare
  numpy is the same arithmetic with no library around it.
- Every process keeps the memory that it frees, as `data/encode/image.py` arranges for its own. By default glibc hands it back
  and faults it in again for every image: then all ways take longer, and those with float arrays lose most.
- Decoding and resizing by Pillow are the floor and nearly all of the time. JPEG's draft mode and `reducing_gap` would lower it,
  but yield other pixels. An RGB picture gains only what comes after the resizing; a gray one gains in it, too.
- There are few photographs: read their numbers as those of these pictures.
"""


def report(sections: list[str], rows: list[str], about: str) -> str:
    """The whole page."""
    return f"""# Speed of the input

From a file to the views that the vision tower sees: the global one and up to {NUM_CROPS} crops, {SIDE} pixels a side.
Written by `python -m benchmarks.input_pipeline`; its `--help` tells what it needs.

Measured on {about} Every way runs in a process of its own, held to one core. Its CPU time counts, with reading the file
(from the system's cache) and decoding. The ways take turns on every file; medians are over rounds, ratios those within a round.
Before that, the pixels of every file were equal to the bit in all ways, after normalisation to float32.

{chr(10).join(sections)}
{NOTES}
## Waiting for data

`train` on two cores, the input in a thread of the same process (`data.workers=0`), logged after every step so that nothing is
computing while the host waits. With a longer `train.log_every` the host is one step ahead of the
device, and `data_wait` in metrics.jsonl also counts waiting that costs nothing. The first {WARM_UP} steps are left out. The
input alone is CPU time of one core.

| configuration | batch | steps | s/step | data wait | its worst step | input alone, ms/batch | step / input |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The demo draws its pages; the receipts are decoded from files. The input works on the cores that compute the steps.

## The ceiling on 16 cores, and what one H100 takes

<!-- ceiling -->
Not written yet: `python -m benchmarks.input_ceiling`.
<!-- end of ceiling -->
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receipts", type=Path, default=DATA / "receipts", help=argparse.SUPPRESS)
    parser.add_argument("--photos", type=Path, default=DATA / "photos", help=argparse.SUPPRESS)
    parser.add_argument("--authors", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        folders = {
            "Receipts": image_files(arguments.receipts / "images", "receipts"),
            "Photographs": image_files(arguments.photos, "photos"),
        }
        about, sections = measure_folders(folders, arguments.authors)
        rows = [
            measure_training("demo", {}),
            measure_training("receipts", {"data.root": str(arguments.receipts.resolve()), "data.validation": ""}),
        ]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.output.write_text(report(sections, rows, about))
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
