"""The generate verb as a user runs it: answers, JSON, pipes, a conversation, Ctrl-C, and what it says to a mistake."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deepstack_jax as dsx
from deepstack_jax.printing import printable
from tests.e2e.verb import ENVIRONMENT, REPOSITORY, TIMEOUT, verb
from tests.parity.goldens import GOLDEN, write_folder

PICTURE = GOLDEN / "images" / "img0.png"
WORDS = "Describe the picture in detail."
FLAGS = ("--template=vicuna_v1", "--max_new_tokens=12")


def command(model: Path | str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "deepstack_jax.generate", f"--model={model}", *flags]


def generate(model: Path | str, *flags: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return verb("generate", f"--model={model}", *flags, typed=typed)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The golden checkpoint "generate" with its tokenizer."""
    folder = write_folder("generate", tmp_path_factory.mktemp("model"))
    shutil.copytree(GOLDEN / "tokenizer" / "llama_legacy_false", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def expected(model) -> str:
    """What the official code answers; `test_generate_goldens` compares the API with it."""
    return json.loads((GOLDEN / "generate" / "case.json").read_text())["decoded"][0].strip()


def test_json_for_several_prompts(model, expected, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(PICTURE.parent))  # where no shell has made a path of the tilde
    done = generate(model, f"--image=~/{PICTURE.name}", f"--prompt={WORDS}", "--prompt=What?", "--json", *FLAGS)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt"] for record in records] == [WORDS, "What?"]
    assert records[0]["answer"] == expected
    assert records[0]["tokens"] == 12
    assert all(record["images"] == [str(PICTURE)] and record["seconds"] > 0 for record in records)
    assert "236,144 parameters in float32" in done.stderr
    assert "2/2 answered" in done.stderr


def test_a_conversation_through_a_pipe(model, expected):
    """The picture comes by /image; after /clear the first question has the first answer again; mistakes do not end it."""
    asked = f"/image {PICTURE}\n{WORDS}\n"
    typed = asked + "And <image>?\n/image nowhere.png\n/bogus\n/clear\n" + asked + "/exit\nnever asked\n"
    done = generate(model, "--chat", *FLAGS, typed=typed)
    assert done.returncode == 0, done.stderr
    shown = printable(expected.replace("\r\n", "\n"))
    assert done.stdout == f"{shown}\n{shown}\n"
    for part in ("comes with the next question", "1 <image> placeholder for 0 images", "cannot read image nowhere.png"):
        assert part in done.stderr
    assert "/bogus is not a command; use /image FILE, /clear or /exit" in done.stderr


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends(model):
    """On a terminal: an answer of 1900 tokens is cut short, the next question is still answered."""
    done, printed = on_a_terminal(model, ["tell\r", signal.SIGINT, "again\r", signal.SIGINT, "\x04"])
    assert done == 0, printed
    assert printed.count("stopped") == 2, printed
    assert "Traceback" not in printed


def on_a_terminal(model: Path, script: list[str | signal.Signals]) -> tuple[int, str]:
    """Run a chat on a pseudo terminal: types the strings at the prompt, sends the signals while it answers."""
    main, side = pty.openpty()
    flags = ("--chat", "--max_new_tokens=1900", "--temperature=1")
    process = subprocess.Popen(
        command(model, *flags), cwd=REPOSITORY, env=ENVIRONMENT, stdin=side, stdout=side, stderr=side, start_new_session=True
    )
    os.close(side)
    printed, deadline = "", time.monotonic() + TIMEOUT

    def read_until(ready: Callable[[str], bool]) -> None:
        nonlocal printed
        while not ready(plain(printed)) and process.poll() is None:
            assert time.monotonic() < deadline, printed
            if select.select([main], [], [], 0.1)[0]:
                try:
                    printed += os.read(main, 4096).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    return

    try:
        for number, step in enumerate(script):
            if isinstance(step, str):
                read_until(lambda text: text.endswith("> "))
                os.write(main, step.encode())
            else:
                read_until(lambda text: len(text.rpartition("> ")[2].strip()) > 20)  # the line typed and some of the answer
                process.send_signal(step)
                read_until(lambda text, times=(number + 1) // 2: text.count("stopped") == times)
        return process.wait(TIMEOUT), printed
    finally:
        process.kill()
        os.close(main)


def plain(text: str) -> str:
    """Without the sequences by which a terminal is told how to show it."""
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)


MISTAKES = {
    "no prompt": (["--model=MODEL"], ["no prompt", '--prompt="..."']),
    "image": (["--model=MODEL", "--prompt=x", "--image=none.png"], ["cannot read image none.png: No such file"]),
    "context": (
        ["--model=MODEL", "--prompt=x", "--max_new_tokens=5000"],
        ["model is 2048", "lower max_new_tokens"],
    ),
    "chat": (["--model=MODEL", "--prompt=x", "--chat"], ["--chat asks for prompts itself", "leave out"]),
    "flag": (["--modle=MODEL"], ["Unknown command line flag 'modle'", "model"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, model):
    flags, expected = MISTAKES[case]
    done = verb("generate", *(flag.replace("MODEL", str(model)) for flag in flags))
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert [part for part in expected if part not in last] == [], last


def test_help_has_examples():
    done = generate("DIR", "--help")
    assert done.returncode == 0
    assert "python -m deepstack_jax.generate --model=DIR --image=photo.jpg" in done.stdout


def change(folder: Path, model: Path, **values) -> Path:
    """A copy of the checkpoint with keys of its config.json changed."""
    shutil.copytree(model.parent, folder)
    file = folder / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder / "hf"


def test_checkpoints_of_another_kind_are_refused(model, tmp_path):
    """In this process: what the verb prints is the error's text."""
    for number, (values, expected) in enumerate(
        (
            ({"model_type": "mpt"}, "'mpt'"),
            ({"deepstack_args_for_ablation": "dummy_locl"}, "dummy_local"),
            ({"hidden_size": 64}, "64"),
        )
    ):
        with pytest.raises(ValueError) as caught:
            dsx.load(change(tmp_path / str(number), model, **values))
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
