"""What every worker process does first."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import threading


def live_and_die_with_the_run() -> None:
    """A terminal and a job scheduler signal every process of a run: its workers go on, so that it can save and end them.

    They end by themselves when the run was killed; without that they would wait for it forever.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow(run: multiprocessing.process.BaseProcess) -> None:
        run.join()
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, args=(parent,), daemon=True).start()
