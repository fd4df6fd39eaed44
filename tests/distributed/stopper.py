"""One of several processes, the second of which is told to stop before the first step: which call of the loop hears of it."""

import os
import signal
import sys
import time
from pathlib import Path

import jax

from deepstack_jax.parallel.distributed import PreemptionSync
from deepstack_jax.parallel.processes import join_processes


def main(folder: str, address: str, count: str, number: str) -> None:
    address, count, number = (flag.split("=")[1] for flag in (address, count, number))
    join_processes(address, int(count), int(number))
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # jax's service looks once a second
    told = PreemptionSync(lambda: False)
    calls = [told() for _ in range(3)]
    (Path(folder) / f"{jax.process_index()}.txt").write_text(str(calls))


if __name__ == "__main__":
    main(*sys.argv[1:])
