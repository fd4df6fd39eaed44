"""Jinja templates rendered by transformers in a process of their own.

They come with models from anywhere. The sandbox of transformers lets them reach nothing, but no sandbox of Python bounds their
time and memory: for that process the operating system does, and this one never imports transformers.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepstack_jax.data.encode.tokenizer_files import TokenizerError
from deepstack_jax.printing import label

_SCRIPT = Path(__file__).with_name("template_process.py")
_BESIDE = 1 << 17  # characters that a template may write beside the words of a conversation, which it may write twice


class TemplateError(TokenizerError):
    """A chat template that cannot be used; one line."""


class Text(NamedTuple):
    """A rendered conversation."""

    text: str
    spans: tuple[tuple[int, int], ...]  # of its `{% generation %}` blocks


def render_texts(
    template: str,
    variables: Mapping[str, str],
    date: str,
    messages: Sequence[Mapping[str, Any]],
    renders: Sequence[tuple[int, bool]],
    *,
    marked: bool,
) -> list[Text | str]:
    """Render beginnings of a conversation.

    Args:
      template: jinja. variables: what it may read besides.
      date: YYYY-MM-DD that it is taken to be; "" = today.
      messages: role and content of every turn.
      renders: how many of them, and whether the beginning of an answer follows.
      marked: whether `{% generation %}` blocks are looked for.

    Returns:
      For each of `renders` its text, or what the template raised.

    Raises:
      TemplateError: it takes more time or memory than there is for a conversation.
    """
    request = {"template": template, "variables": dict(variables), "date": date, "marked": marked}
    request |= {"messages": list(messages), "renders": list(renders)}
    words = sum(len(json.dumps(message, ensure_ascii=False)) for message in messages)
    reply = _process().ask(request | {"most": 2 * words + _BESIDE})
    if "failed" in reply:
        raise TemplateError(f"chat templates cannot be rendered: {label(reply['failed'])}; repair the installation")
    if "error" in reply:
        raise TemplateError(f"the chat template {label(reply['error'])}; choose another with data.template=NAME")
    return [
        label(one["error"]) if "error" in one else Text(one["text"], tuple((start, end) for start, end in one["spans"]))
        for one in reply["renders"]
    ]


class _Process:
    """The process, begun with the first request and again where one has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            child = self._child or self._begin()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # it has said why it ends
                    child.stdin.write(json.dumps(request) + "\n")
                    child.stdin.flush()
                line = child.stdout.readline()
            except BaseException:  # a reply that nobody has read would be taken for that to the next request
                self._end()
                raise
            if line.endswith("\n"):
                return json.loads(line)
            self._end()
        return {"error": "takes more time or memory than there is for a conversation"}

    def _begin(self) -> subprocess.Popen[str]:
        # In a session of its own, so that a Ctrl-C in the terminal does not end it; it ends with its standard input.
        command = [sys.executable, "-P", str(_SCRIPT)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._child = subprocess.Popen(command, **pipes, text=True, encoding="utf-8", start_new_session=True)
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def close(self) -> None:
        with self._lock:
            self._end()


_processes: dict[int, _Process] = {}


def _process() -> _Process:
    """That of this process: a forked one would read the replies of the other."""
    if (found := _processes.get(os.getpid())) is None:
        found = _processes.setdefault(os.getpid(), _Process())
        atexit.register(found.close)
    return found
