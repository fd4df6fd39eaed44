"""Train a model: `python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack`."""

from pathlib import Path

import jax
from absl import flags

from deepstack_jax import cli
from deepstack_jax.errors import ConfigError
from deepstack_jax.evaluate.in_training import TrainingEvaluation
from deepstack_jax.parallel.distributed import is_first_host
from deepstack_jax.parallel.processes import join_processes
from deepstack_jax.printing import Console
from deepstack_jax.train.account.report import report
from deepstack_jax.train.run.lock import lock_workdir
from deepstack_jax.train.run.replay import replay_file
from deepstack_jax.train.run.train import train

USAGE = """
Train a DeepStack model; run the same command again to go on where it stopped.

  python -m deepstack_jax.train --config=finetune.py --config.train.weights=DIR --config.data.train=mine.json --workdir=runs/a
  python -m deepstack_jax.train --config=configs/demo.py --workdir=runs/demo/deepstack
  python -m deepstack_jax.train --config=configs/receipts.py --config.data.root=DIR --workdir=runs/receipts
  python -m deepstack_jax.train --config=configs/demo.py:baseline --config.train.steps=100 --workdir=runs/short
  python -m deepstack_jax.train --report=runs/receipts
  python -m deepstack_jax.train --replay=runs/receipts/replay/step-123.json

  --config=FILE[:ARGUMENT]   configuration file; --config.KEY=VALUE overrides any key of it
  --workdir=DIR              checkpoints, metrics.jsonl, tensorboard/, predictions.jsonl and results.json go here
  --report=WORKDIR           where the time of a run went, and curves as PNG; trains nothing
  --replay=FILE              do a skipped step again, from the checkpoint before it, and say what in it is not finite
  --coordinator_address=HOST:PORT --process_count=N --process_id=I
                             several processes that are not on a TPU pod or under SLURM or Open MPI 4, which need none;
                             under Open MPI 5 and MPICH the address alone

Exit codes: 0 done; 1 a mistake in the input, said in one line; 75 stopped by SIGTERM and 130 by Ctrl-C, state saved.
"""

NEEDS_LESS_MEMORY = (
    "raise config.train.accumulation, set config.decoder.remat=block or config.train.frozen_dtype=bfloat16, lower "
    "config.data.max_length, or cut the model over more devices with config.mesh.fsdp, all but the last in a new --workdir; "
    "python -m deepstack_jax.plan tells what a configuration needs"
)

FLAGS = (
    (WORKDIR := cli.Flag(flags.DEFINE_string, "workdir", None, "Folder for everything that the run writes.")),
    (REPORT := cli.Flag(flags.DEFINE_string, "report", None, "Where the time of the run in this workdir went, and curves.")),
    (REPLAY := cli.Flag(flags.DEFINE_string, "replay", None, "A file of WORKDIR/replay/: do that step again.")),
    *cli.PROCESSES,
    cli.CONFIG,
)


def main() -> int:
    if REPORT.value:
        report(Path(REPORT.value), Console())
        return cli.EXIT_DONE
    join_processes(*(flag.value for flag in cli.PROCESSES))
    console = Console(quiet=not is_first_host())
    if REPLAY.value:
        given = None if cli.CONFIG.value is None else cli.parse_config(Path(REPLAY.value).parents[1])
        replay_file(Path(REPLAY.value), given, console)
        return cli.EXIT_DONE
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = cli.parse_config(WORKDIR.value and Path(WORKDIR.value).expanduser(), dtype=dtype)
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing; e.g. --workdir=runs/demo")
    workdir = cli.writable_folder(WORKDIR.value, "workdir")
    with lock_workdir(workdir):
        return train(config, workdir, console, TrainingEvaluation(config, workdir, console))


if __name__ == "__main__":
    cli.run(main, USAGE, FLAGS, NEEDS_LESS_MEMORY)
