"""Requests of strangers: whatever JSON they are, they are a question or one line of error, and no address is opened."""

from __future__ import annotations

import json
import socket

from hypothesis import given
from hypothesis import strategies as st

from deepstack_jax.data.example import ConversationError
from deepstack_jax.errors import UserError
from deepstack_jax.serve.images import image_bytes
from deepstack_jax.serve.protocol import read_request

NAMES = [
    "model",
    "messages",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "stop",
    "seed",
    "stream",
    "stream_options",
    "n",
    "tools",
]
URLS = ["data:image/png;base64,AAAA", "file:///etc/passwd", "http://127.0.0.1/", "https://a.org:99999/", "http://[", "data:,"]
numbers = st.integers() | st.floats() | st.just(10**400)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["user", "assistant", "text", "<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
parts = st.one_of(
    values,
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=8) | values}),
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": st.sampled_from(URLS) | values}) | values}
    ),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", 3]), "content": st.lists(parts, max_size=3) | values}
    )
    | values,
    max_size=4,
)
requests = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=4)


@given(requests, messages | values, st.booleans())
def test_a_request_is_a_question_or_one_line(request, said, usual):
    def closed(*_, **__):
        raise AssertionError("an address was opened")

    body = request | {"messages": said} if not usual else {"messages": [{"role": "user", "content": "hi"}]} | request
    before, socket.create_connection = socket.create_connection, closed
    problem = None
    try:
        asked = read_request(
            json.dumps(body).encode(), "tiny", lambda count: None, lambda url: image_bytes(url, frozenset(["a.org"]), 100)
        )
        roles = [turn.role for turn in asked.turns]
        roles = roles[roles[0] == "system" :]  # all that system messages say is one turn, the first
        assert roles == [("human", "gpt")[number % 2] for number in range(len(roles))]
        assert len(asked.options.sampling(1, 1)) == 1
    except (UserError, ConversationError) as error:
        problem = str(error)
    finally:
        socket.create_connection = before
    assert problem is None or (problem and "\n" not in problem)
