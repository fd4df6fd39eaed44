"""A server of the tiny model on a free port of this machine, in a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from deepstack_jax.serve.app import Settings, make_app
from deepstack_jax.serve.engine import Engine


@contextlib.contextmanager
def served(engine: Engine, settings: Settings) -> Iterator[str]:
    """The address of a server around an engine that has been started."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(make_app(engine, settings), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
