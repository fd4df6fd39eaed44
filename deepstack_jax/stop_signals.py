"""Remembers the signals that stop a run: train/run/loop.py saves its state, train/run/train.py exits with the code."""

import os
import signal
import sys
import threading
from typing import Any

EXIT_DONE = 0
EXIT_INTERRUPTED = 130  # Ctrl-C, state saved
EXIT_PREEMPTED = 75  # SIGTERM, state saved: requeue


class StopSignals:
    """Remembers Ctrl-C or SIGTERM until the step is done; a second Ctrl-C stops at once.

    Args:
      leave_sigterm: somebody else listens to it: jax's preemption service, where a run has several hosts.
    """

    def __init__(self, *, leave_sigterm: bool = False) -> None:
        self.exit_code = EXIT_DONE
        numbers = (signal.SIGINT,) if leave_sigterm else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}

    @property
    def received(self) -> bool:
        return self.exit_code != EXIT_DONE

    def release(self) -> None:
        """Signals mean again what they meant before: there is nothing left to save."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end_on_sigterm(self) -> None:
        """The state is saved: Ctrl-C means again what it meant before, and SIGTERM ends the process with EXIT_PREEMPTED.

        A thread does it, which hears of the signal even while the main thread waits within jax for another process, one that
        may have ended already.
        """
        self.release()
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # so that Python hears of it at all
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

        def wait() -> None:
            while os.read(told, 1) != bytes([signal.SIGTERM]):
                pass
            print("stopped with the state saved; the same command goes on from here", file=sys.stderr, flush=True)
            os._exit(EXIT_PREEMPTED)

        threading.Thread(target=wait, daemon=True).start()

    def _handle(self, number: int, _: Any) -> None:
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
        signal.signal(signal.SIGINT, signal.default_int_handler)
