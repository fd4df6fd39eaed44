"""The OpenAI chat API as data: a request's JSON becomes turns and options or an error, an answer becomes JSON."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepstack_jax.data.example import IMAGE_MARK
from deepstack_jax.errors import UserError, nearest
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import Turn
from deepstack_jax.printing import quote

# What a request may say beside what is read below. Of the first only the values that change nothing, of the second anything:
# labels for whoever keeps accounts.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_LENGTHS = ("max_completion_tokens", "max_tokens")
_OPTIONS = ("temperature", "top_p", "top_k", "stop", "seed")
_READ = ("model", "messages", "stream", "stream_options", *_LENGTHS, *_OPTIONS)
_DETAILS = (None, "auto", "low", "high")


class ModelError(UserError):
    """Another model than the one that is here."""


@dataclass(frozen=True)
class ChatRequest:
    """What is asked.

    Attributes:
      whole: nobody said how long the answer may be.
      usage: "" for no count of tokens in a stream, "last" for one at its end, "all" for one in every piece.
    """

    turns: tuple[Turn, ...]
    options: Options
    whole: bool
    stream: bool
    usage: str


def read_request(
    body: bytes, model: str, check_images: Callable[[int], None], read_image: Callable[[object], bytes]
) -> ChatRequest:
    """The request of POST /v1/chat/completions.

    Args:
      model: the only name that there is.
      check_images: refuses a number of images by a RequestError, before any is read.
      read_image: the encoded picture that a URL means; it refuses by a UserError.

    Raises:
      RequestError: one line. ModelError: another model is asked for.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise RequestError(f"the request is {quote(given)}, expected a JSON object with messages")
    given = {name: value for name, value in given.items() if value is not None}
    _check_names(given)
    if given.get("model", model) != model:
        raise ModelError(f"there is no model {quote(given['model'])} here; the one that is here is {quote(model)}")
    said = [name for name in _LENGTHS if name in given]
    if len(said) > 1:
        raise RequestError(f"the request has both {' and '.join(said)}; leave one out")
    if not isinstance(given.get("seed", 0), int):  # `generate` takes one for each of several prompts
        raise RequestError(f"seed got {quote(given['seed'])}, expected a whole number")
    chosen = {"seed": secrets.randbits(31)}  # or what is drawn would always be the same
    chosen |= {name: given[name] for name in _OPTIONS if name in given} | ({"max_new_tokens": given[said[0]]} if said else {})
    try:
        options = Options().replace(chosen)
    except RequestError as error:
        raise RequestError(str(error).replace("max_new_tokens", "".join(said))) from error
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages got {quote(messages)}, expected a list with at least one message")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    check_images(sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts))
    turns = read_turns(messages, read_image)
    return ChatRequest(turns, options, not said, _flag(given, "stream"), _usage(given.get("stream_options", {})))


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            allowed = " or ".join(json.dumps(one) for one in _NEUTRAL[name])
            raise RequestError(
                f"{name} got {quote(value)}, expected {allowed}: this server has no more than that; leave it out"
            )
        if name not in (*_NEUTRAL, *_LABELS, *_READ):
            raise RequestError(f"unknown key {quote(name)}; {nearest(name, (*_READ, *_NEUTRAL))}")


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} got {quote(value)}, expected true or false")
    return value


def _usage(given: Any) -> str:
    if not isinstance(given, dict):
        raise RequestError(f'stream_options got {quote(given)}, expected an object such as {{"include_usage": true}}')
    return "" if not _flag(given, "include_usage") else "all" if _flag(given, "continuous_usage_stats") else "last"


def read_turns(messages: list[Any], read_image: Callable[[object], Any]) -> tuple[Turn, ...]:
    """The conversation; what system messages say is its first turn. A template without a place for that puts it in front of the
    first question."""
    system, turns = [], []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer") and not turns:
            words, images = _content(message.get("content"), number, read_image)
            if images:
                raise RequestError(f"messages[{number}]: a system message has an image; put it into the user's message")
            system.append(words)
            continue
        expected = ("user", "assistant")[len(turns) % 2]
        if role != expected:
            got = quote(role) if role is not None else quote(message)
            order = "a system message first, then user and assistant in turn"
            raise RequestError(f"messages[{number}] is from {got}, expected {expected!r}: {order}")
        words, images = _content(message.get("content"), number, read_image)
        if role == "assistant":
            if images:
                raise RequestError(f"messages[{number}]: an answer has an image; images come with the user's messages")
            turns.append(Turn("gpt", words.replace(IMAGE_MARK, "")))  # or the prompt would look for one image more
        else:
            turns.append(Turn("human", words, images))
    if len(turns) % 2 == 0:
        raise RequestError("messages end without a question; the last one must be from 'user'")
    return (*([Turn("system", "\n\n".join(system))] if system else []), *turns)


def _content(content: Any, number: int, read_image: Callable[[object], Any]) -> tuple[str, list[Any]]:
    """The words of a message, a line for each part, and its images in order."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise RequestError(f"messages[{number}].content got {quote(content)}, expected a string or a list of parts")
    words, images = [], []
    for at, part in enumerate(content):
        where = f"messages[{number}].content[{at}]"
        match part:
            case {"type": "text", "text": str(text)}:
                words.append(text)
            case {"type": "image_url", "image_url": {"url": url, **more}} if more.get("detail") in _DETAILS:
                try:
                    images.append(read_image(url))
                except UserError as error:
                    raise RequestError(f"{where}: {error}") from error
            case _:
                raise RequestError(f"{where} is {quote(part)}, expected a part of type text, or image_url with a url in it")
    return "\n".join(words), images


@dataclass(frozen=True)
class Answering:
    """What all JSON about one answer has in common."""

    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, tokens: int, reason: str) -> dict[str, Any]:
        """The answer at once."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": reason}
        return self._object("chat.completion", [choice]) | {"usage": self.usage(tokens)}

    def piece(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        """A part of a stream."""
        return self._object("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": reason}])

    def count(self, tokens: int) -> dict[str, Any]:
        """The end of a stream for who wants the number of tokens."""
        return self._object("chat.completion.chunk", []) | {"usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        """Tokens of the prompt, images included, and of the answer."""
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def error_object(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """What went wrong, as clients of the API read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")
