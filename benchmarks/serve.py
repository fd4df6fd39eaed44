"""Many requests at once over loopback: none lost, none mixed up, how much faster than one at a time, and flat memory.

  python -m benchmarks.serve
  python -m benchmarks.serve --model=DIR --requests=50 --concurrent=20 --slots=4

  --model=DIR       a folder or workdir; without it a model of 11M parameters is drawn, which says readable bytes
  --requests=N      requests for the memory; 2000 unless given
  --concurrent=N    of them at once, each compared with what `generate` says alone; 200 unless given
  --slots=N         answers that the server makes at once; 8 unless given
  --context=N       tokens of a conversation: its template, two images, 90 of words and answer; 128 unless given

Requests have 0 to 2 images and prompts and answers of mixed lengths, greedy. An answer may part from `generate`'s only where
its two likeliest tokens are nearer than 1e-3. Ends with 1 where an answer is another, or where memory grew by more than 5%
after the first quarter. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import multiprocessing
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import numpy as np
import openai
from flax import linen as nn
from PIL import Image
from rich.table import Table

from benchmarks.soak import memory
from deepstack_jax.api import LMM, Options, load
from deepstack_jax.config import Config, DataConfig, DecoderConfig, ImageConfig, TrainConfig, VisionConfig
from deepstack_jax.data.encode.tokenizer import load_tokenizer
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.prompts import PromptShape, Turn, pad_prompts
from deepstack_jax.printing import Console
from deepstack_jax.serve.__main__ import serve, start_engine
from deepstack_jax.serve.engine import Limits

MARGIN, GROWTH = 1e-3, 0.05
ALONE = 30  # requests that are sent one at a time


class Job(NamedTuple):
    """One request."""

    words: str
    images: list[bytes]
    tokens: int


def drawn() -> LMM:
    """A small model with noise for weights; the same in every process."""
    config = Config(
        image=ImageConfig(size=56, num_crops=4),
        vision=VisionConfig(patch_size=14, width=96, layers=4, heads=3, mlp=384),
        decoder=DecoderConfig("llama", 259, 384, 6, 6, 6, 64, 1024, embed_std=0.5, head_std=0.5),
        data=DataConfig(template="direct", max_length=128, max_images=1),
        train=TrainConfig(compute_dtype="float32"),
    )
    model, blank = build_model(config), pad_prompts([], config, rows=1, shape=PromptShape(64, 1))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), blank)["params"])
    head = params["head"]["kernel"]
    params["head"]["kernel"] = head.at[:, [*range(36), *range(130, head.shape[1])]].set(0)
    return LMM(config, params, load_tokenizer("bytes"), "direct")


def model_of(folder: str) -> LMM:
    """The model that both the server and `generate` here have; greedy answers are compared in float32."""
    return load(folder, "float32") if folder else drawn()


def run_server(folder: str, limits: Limits, told: Connection) -> None:
    """A process of its own, as users run it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    engine = start_engine(model_of(folder), limits, None)
    listening.listen()  # who comes before the server looks, waits
    told.send(listening.getsockname()[1])
    serve(engine, listening, "model", "", (), 32 << 20)


def draw_jobs(count: int) -> list[Job]:
    """Mixed lengths, 0 to 2 images."""
    rng = np.random.default_rng(7)
    jobs = []
    for number in range(count):
        images = []
        for _ in range(number % 3):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), dtype=np.uint8)).save(file, "PNG")
            images.append(file.getvalue())
        words = "".join(map(chr, rng.integers(97, 123, int(rng.integers(3, 60)))))
        jobs.append(Job(words, images, int(rng.integers(4, 33))))
    return jobs


async def ask(client: openai.AsyncOpenAI, job: Job) -> str:
    """The answer, streamed every other time."""
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in job.images]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message: Any = {"role": "user", "content": [*parts, {"type": "text", "text": job.words}]}
    how: dict[str, Any] = {"model": "model", "messages": [message], "temperature": 0, "max_tokens": job.tokens}
    if job.tokens % 2:
        return (await client.chat.completions.create(**how)).choices[0].message.content or ""
    stream = await client.chat.completions.create(**how, stream=True)
    return "".join([piece.choices[0].delta.content or "" async for piece in stream])


async def ask_all(client: openai.AsyncOpenAI, jobs: Sequence[Job], at_once: int) -> tuple[list[str], float]:
    """The answers in the order of the jobs, and seconds."""
    places, start = asyncio.Semaphore(at_once), time.perf_counter()

    async def one(job: Job) -> str:
        async with places:
            return await ask(client, job)

    return list(await asyncio.gather(*map(one, jobs))), time.perf_counter() - start


def is_near_tie(lmm: LMM, job: Job, ours: str, theirs: str) -> bool:
    """Whether the two likeliest tokens are nearer than MARGIN where two answers part."""
    assert lmm.tokenizer is not None
    parts = (at for at, (our, their) in enumerate(zip(ours, theirs, strict=False)) if our != their)
    same = next(parts, min(len(ours), len(theirs)))
    asked = lmm.answerer.encode([Turn("human", job.words, job.images)], Options(max_new_tokens=1))
    ids = np.concatenate([asked.ids, lmm.tokenizer.encode(theirs[:same])[0]])
    best = np.sort(lmm.logits(ids[None], [job.images], np.ones((1, ids.size), bool))[0, -1])
    return bool(best[-1] - best[-2] < MARGIN)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    given = parser.parse_args()
    spawn, console = multiprocessing.get_context("spawn"), Console(width=110)
    hear, told = spawn.Pipe(duplex=False)
    limits = Limits(given.slots, max(64, given.concurrent), given.context, images=2, answer=32)
    server = spawn.Process(target=run_server, args=(given.model, limits, told), daemon=True)
    server.start()
    told.close()
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{hear.recv()}/v1", api_key="unused", max_retries=0, timeout=3600)
    try:
        return asyncio.run(measure(client, server.pid or 0, given, console))
    finally:
        server.kill()


async def measure(client: openai.AsyncOpenAI, server: int, given: argparse.Namespace, console: Console) -> int:
    lmm, jobs = model_of(given.model), draw_jobs(given.concurrent)
    answers, seconds = await ask_all(client, jobs, given.concurrent)
    alone, alone_seconds = await ask_all(client, jobs[:ALONE], 1)
    expected = [lmm.answers([(job.images, job.words)], Options(max_new_tokens=job.tokens))[0] for job in jobs]
    other = [number for number, (ours, theirs) in enumerate(zip(answers, expected, strict=True)) if ours != theirs.text]
    wrong = [number for number in other if not is_near_tie(lmm, jobs[number], answers[number], expected[number].text)]
    tokens = [answer.tokens for answer in expected]
    table = Table("requests", "at once", "slots", "seconds", "tokens/s", title="Tokens per second over loopback")
    for count, at_once, took in ((len(jobs), len(jobs), seconds), (len(alone), 1, alone_seconds)):
        table.add_row(str(count), str(at_once), str(given.slots), f"{took:.1f}", f"{sum(tokens[:count]) / took:.0f}")
    console.print(table)
    same, ties = len(jobs) - len(other), len(other) - len(wrong)
    console.print(f"{len(answers)} of {len(jobs)} answered, {same} equal to generate's, {ties} but for a near tie")
    console.print(f"answers that are another's or wrong: {len(wrong)}")
    grown = []
    while len(grown) < 20:
        share = max(1, given.requests // 20)
        await ask_all(client, [jobs[number % len(jobs)] for number in range(share)], given.concurrent)
        grown.append(memory(server).own)
    console.print("MB of the server after each 5%: " + " ".join(f"{own:.0f}" for own in grown))
    return int(bool(wrong) or grown[-1] > (1 + GROWTH) * grown[4])


if __name__ == "__main__":
    sys.exit(main())
