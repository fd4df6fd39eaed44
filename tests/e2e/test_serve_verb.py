"""The serve verb as a user runs it: it answers as `generate` does, and a stream that it cannot finish ends in an error."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed; pip install '.[dev]'")
openai = pytest.importorskip("openai", reason="the client is not installed; pip install '.[dev]'")
from tests.e2e.verb import ENVIRONMENT, REPOSITORY, TIMEOUT, verb  # noqa: E402
from tests.parity.goldens import GOLDEN, write_folder  # noqa: E402

PICTURE = GOLDEN / "images" / "img0.png"
FLAGS = ("--template=vicuna_v1", "--context=1024", "--max_images=1", "--slots=2", "--port=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The golden checkpoint "generate" with its tokenizer."""
    folder = write_folder("generate", tmp_path_factory.mktemp("model"))
    shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", folder, dirs_exist_ok=True)
    return folder


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "deepstack_jax.serve", *flags]


@contextlib.contextmanager
def running(model: Path) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """A server that listens, and a client of it."""
    errors = model.parent / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            command(f"--model={model}", *FLAGS), cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        address = next((found[1] for line in lines if (found := re.search(r"at (http://\S+)", line))), "")
        assert address, errors.read_text()
        yield process, openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=TIMEOUT)
    finally:
        process.kill()
        process.wait(TIMEOUT)


def unfinished(client: openai.OpenAI):
    """The last of many long answers, whose stream has begun: those before it, two at a time, take longer than any signal."""
    ask = functools.partial(client.chat.completions.create, model="hf", stream=True, temperature=1, max_tokens=900)
    streams = [iter(ask(messages=[{"role": "user", "content": "tell"}])) for _ in range(40)]
    while not next(streams[0]).choices[0].delta.content:
        pass
    assert next(streams[-1]).choices[0].delta.role == "assistant"
    return streams[-1]


def test_it_answers_as_the_official_code_does_and_a_signal_is_told(model):
    info = json.loads((GOLDEN / "generate" / "case.json").read_text())
    words = info["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    content = [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": url}}]
    with running(model) as (process, client):
        answer = client.chat.completions.create(model="hf", messages=[{"role": "user", "content": content}], max_tokens=12)
        assert answer.choices[0].message.content == info["decoded"][0].strip()
        pieces = unfinished(client)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(pieces)
        assert process.wait(TIMEOUT) == -signal.SIGTERM


def test_killed_in_the_middle_of_a_stream_it_leaves_an_error(model):
    with running(model) as (process, client):
        pieces = unfinished(client)
        process.kill()
        with pytest.raises(Exception, match=r".") as caught:  # of openai, or of what it sends with
            list(pieces)
        assert caught.typename in ("APIConnectionError", "RemoteProtocolError", "ReadError")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "--model is missing; e.g. --model=DIR"),
        (
            ("--model=nowhere", "--host=0.0.0.0"),
            "--host=0.0.0.0 can be reached by others, who need a key: set DEEPSTACK_API_KEY",
        ),
        (("--model=nowhere", "--port=0"), "no folder 'nowhere'"),
        (("--model=nowhere", "--port=70000"), "port"),
        (
            ("--model=nowhere", "--allow_urls=https://a.org/"),
            "--allow_urls=https://a.org/ is no host; expected HOST or HOST:PORT",
        ),
    ],
)
def test_a_mistake_is_one_line(flags, expected):
    done = verb("serve", *flags)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert expected in done.stderr.splitlines()[-1]
