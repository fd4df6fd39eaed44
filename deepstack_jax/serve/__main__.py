"""Serve a model: `python -m deepstack_jax.serve --model=DIR`, then open http://127.0.0.1:8000."""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from deepstack_jax import cli
from deepstack_jax.api import DTYPES, LMM, ConfigError, load_in_verb
from deepstack_jax.printing import plural, quote
from deepstack_jax.serve.engine import Engine, Limits

USAGE = """
Serve a model: the OpenAI chat API at /v1, and a page to talk to it at /.

  python -m deepstack_jax.serve --model=DIR
  python -m deepstack_jax.serve --model=DIR --port=9000 --slots=8 --context=2048
  DEEPSTACK_API_KEY=... python -m deepstack_jax.serve --model=DIR --host=0.0.0.0

  --model=DIR           Hugging Face folder or hub id (DeepStack, LLaVA-1.5, LLaVA-NeXT), or the workdir of a training run
  --adapter=DIR         LoRA adapters over the model: the workdir of a run that trained some, or a folder of PEFT
  --name=NAME           what the API calls the model; the folder's name if left out
  --host=127.0.0.1      address to listen at; any other than this machine's own wants an API key
  --port=8000           0 = any that is free
  --api_key=KEY         who asks must know it; better given as DEEPSTACK_API_KEY, since others here see a command line
  --allow_urls=HOST     images may be fetched from this host; again for several. Without it only images sent along are read
  --slots=4             answers made at once
  --waiting=64          requests that wait for a slot; one more gets 429
  --context=4096        tokens of a conversation with its images and its answer; at most the model's. Cache memory is for
                        slots x context
  --max_tokens=1024     tokens of an answer where a request says nothing
  --max_images=4        images of a request
  --max_pixels=40000000 width x height of an image
  --max_body=32         MB of a request
  --template=NAME       conversation template in place of the model's own, e.g. v1, phi3_instruct, plain
  --dtype=NAME          float32 or bfloat16; float32 on a CPU and bfloat16 on accelerators if left out

It listens once everything is compiled. Exit codes: 1 a mistake in the input, said in one line; 130 stopped by Ctrl-C.
"""

_LIMITS = Limits()
FLAGS = (
    cli.Flag(flags.DEFINE_string, "model", None, "Model folder, hub id or workdir."),
    cli.Flag(flags.DEFINE_string, "adapter", "", "LoRA adapters over the model."),
    cli.Flag(flags.DEFINE_string, "name", None, "The model's name in the API."),
    cli.Flag(flags.DEFINE_string, "host", "127.0.0.1", "Address to listen at."),
    cli.Flag(flags.DEFINE_integer, "port", 8000, "Port to listen at.", lower_bound=0, upper_bound=65535),
    cli.Flag(flags.DEFINE_string, "api_key", None, "Key that requests must have."),
    cli.Flag(flags.DEFINE_multi_string, "allow_urls", [], "Host that images are fetched from."),
    cli.Flag(flags.DEFINE_integer, "slots", _LIMITS.slots, "Answers made at once.", lower_bound=1),
    cli.Flag(flags.DEFINE_integer, "waiting", _LIMITS.waiting, "Requests that wait.", lower_bound=0),
    cli.Flag(flags.DEFINE_integer, "context", _LIMITS.context, "Tokens of a conversation.", lower_bound=2),
    cli.Flag(flags.DEFINE_integer, "max_tokens", _LIMITS.answer, "Tokens of an answer.", lower_bound=1),
    cli.Flag(flags.DEFINE_integer, "max_images", _LIMITS.images, "Images of a request.", lower_bound=0),
    cli.Flag(flags.DEFINE_integer, "max_pixels", 40_000_000, "Pixels of an image.", lower_bound=1),
    cli.Flag(flags.DEFINE_integer, "max_body", 32, "MB of a request.", lower_bound=1),
    cli.Flag(flags.DEFINE_string, "template", None, "Conversation template."),
    cli.Flag(flags.DEFINE_enum, "dtype", None, "float32 or bfloat16.", enum_values=DTYPES),
)


def main() -> int:
    given: dict[str, Any] = {flag.name: flag.value for flag in FLAGS}
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} is not installed; pip install '.[serve]'")
    if not given["model"]:
        raise ConfigError("--model is missing; e.g. --model=DIR with a Hugging Face folder or the workdir of a training run")
    hosts = tuple(host.lower() for host in given["allow_urls"])
    if wrong := [host for host in hosts if not re.fullmatch(r"[a-z0-9.-]+(:\d+)?", host)]:
        raise ConfigError(f"--allow_urls={quote(wrong[0])[1:-1]} is no host; expected HOST or HOST:PORT, as images.example.org")
    key = given["api_key"] or os.environ.get("DEEPSTACK_API_KEY", "")
    listening = listen(given["host"], given["port"], key)
    lmm = load_in_verb(given["model"], given["dtype"], given["adapter"])
    data = dataclasses.replace(lmm.config.data, max_pixels=min(given["max_pixels"], lmm.config.data.max_pixels))
    lmm = dataclasses.replace(lmm, config=dataclasses.replace(lmm.config, data=data))
    limits = Limits(given["slots"], given["waiting"], given["context"], given["max_images"], given["max_tokens"])
    engine = start_engine(lmm, limits, given["template"])
    name = given["name"] or Path(given["model"]).expanduser().resolve().name
    serve(engine, listening, name, key, hosts, given["max_body"] << 20)
    return cli.EXIT_DONE


def listen(host: str, port: int, key: str) -> socket.socket:
    """The socket, before anything that takes long; whoever connects is refused until the server listens at it.

    Raises:
      ConfigError: an address that others reach, without a key; or one that cannot be had.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not key:
        raise ConfigError(
            f"--host={host} can be reached by others, who need a key: set DEEPSTACK_API_KEY, or leave out --host for this "
            "machine alone"
        )
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        return listening
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror}; choose another with --host or --port") from error


def start_engine(lmm: LMM, limits: Limits, template: str | None) -> Engine:
    """An engine with all its programs compiled, which is said as it goes on."""
    parameters, start = sum(leaf.size for leaf in jax.tree.leaves(lmm.params)), time.perf_counter()
    engine = Engine(lmm.answerer, limits, template)
    if engine.limits.context <= engine.answerer.config.layout.patches and limits.images:
        raise ConfigError(f"--context={limits.context} has no room for an image; raise it, or give --max_images=0")
    print(
        f"{parameters:,} parameters in {lmm.config.train.compute_dtype}; {limits.slots} slots of {engine.limits.context} tokens"
    )
    for number, shape in enumerate(engine.warm_up(), 1):
        seen = f"{shape.length} tokens with {plural(shape.images, 'image')}"
        print(
            f"compiled {number}/{len(engine.shapes)}: {seen}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True
        )
    engine.start()
    return engine


def serve(engine: Engine, listening: socket.socket, name: str, key: str, hosts: tuple[str, ...], body: int) -> None:
    """Answer until a signal comes; whoever waits for an answer then is told."""
    import uvicorn

    from deepstack_jax.serve.app import Settings, make_app

    host, port = listening.getsockname()[:2]

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"{quote(name)} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.close()
            super().handle_exit(sig, frame)

    app = make_app(engine, Settings(name, key, hosts, body))
    most = engine.limits.slots + engine.limits.waiting + 256  # connections; those without a place are told so
    # Idle connections are kept longer than clients keep them: closed here first, one may just be in use again.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        limit_concurrency=most,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )
    Server(config).run(sockets=[listening])


if __name__ == "__main__":
    less = "lower --slots, --context or --max_images, or choose --dtype=bfloat16"
    cli.run(main, USAGE, FLAGS, less)
