"""docs/serve.md against a server: what its blocks send is answered, and the numbers in it are those that a script prints."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the extra `serve` is not installed; pip install '.[dev]'")
pytest.importorskip("openai", reason="the client is not installed; pip install '.[dev]'")

from deepstack_jax.serve.app import Settings
from deepstack_jax.serve.engine import Engine
from tests.docs.blocks import blocks
from tests.unit.serving import served
from tests.unit.talker import LIMITS, talker

BLOCKS = [block.text for block in blocks() if block.document == "docs/serve.md"]
ADDRESS, NAME = "http://127.0.0.1:8000", "llava-1.5"


@pytest.fixture(scope="module")
def address():
    engine = Engine(talker().answerer, LIMITS)
    engine.start()
    with served(engine, Settings(NAME)) as address:
        yield address
    engine.close()


def test_the_client_prints_an_answer_twice(address):
    (text,) = (text for text in BLOCKS if "import openai" in text)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(text.replace(ADDRESS, address), {})
    whole, streamed = printed.getvalue().split("\n")
    assert whole
    assert whole == streamed


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl_sends_a_picture(address, tmp_path):
    (text,) = (text for text in BLOCKS if "curl" in text)
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "photo.jpg")
    command = ["bash", "-euc", text.replace(ADDRESS, address)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 16
