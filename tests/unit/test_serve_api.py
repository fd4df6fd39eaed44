"""The OpenAI chat API by its own client, over loopback, and by hand where that client would not do such a thing."""

import base64
import contextlib
import http.client
import http.server
import io
import json
import re
import socket
import threading
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed; pip install '.[dev]'")
openai = pytest.importorskip("openai", reason="the client is not installed; pip install '.[dev]'")

from deepstack_jax.api import Options  # noqa: E402
from deepstack_jax.generate.prompts import Turn  # noqa: E402
from deepstack_jax.serve import images  # noqa: E402
from deepstack_jax.serve.app import Settings, make_app, policy  # noqa: E402
from deepstack_jax.serve.engine import DEFECT, STOPPING, Engine  # noqa: E402
from deepstack_jax.serve.images import UrlError, image_bytes  # noqa: E402
from tests.unit.serving import served, until  # noqa: E402
from tests.unit.talker import LIMITS, picture, started, talker  # noqa: E402

BODY = 100_000


@pytest.fixture(scope="module")
def lmm():
    return talker()


@pytest.fixture(scope="module")
def engine(lmm):
    with started(lmm) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with served(engine, Settings("tiny", body=BODY)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def user(words: str, *pictures) -> dict:
    shown = [{"type": "image_url", "image_url": {"url": data_url(image), "detail": "auto"}} for image in pictures]
    return {"role": "user", "content": [*shown, {"type": "text", "text": words}]}


def ask(client, *messages, **more):
    return client.chat.completions.create(model="tiny", messages=list(messages), **{"temperature": 0} | more)


def post(address: str, path: str, body: bytes | str, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    read = answer.status, json.loads(answer.read())
    connection.close()
    return read


def counted(address: str) -> dict[str, int]:
    """Chat requests that are over, by status."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    found = re.findall(r'deepstack_requests_total{path="/v1/chat/completions",status="(\d+)"} (\d+)', text)
    return {status: int(count) for status, count in found}


def chat_body(**more) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}]} | more)


def test_an_answer_and_its_stream_are_what_generate_says(client, lmm):
    pictures = [picture(1), picture(2, 8, 24)]
    expected = lmm.generate(pictures, "same?", max_new_tokens=12)
    whole = ask(client, user("same?", *pictures), max_tokens=12)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    prompt = lmm.answerer.encode([Turn("human", "same?", pictures)], Options()).length
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 12)
    parts = list(ask(client, user("same?", *pictures), max_tokens=12, stream=True, stream_options={"include_usage": True}))
    pieces = [part.choices[0].delta.content for part in parts if part.choices]
    assert "".join(piece or "" for piece in pieces) == expected
    assert len([piece for piece in pieces if piece]) > 2
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 12
    assert len({part.id for part in parts}) == 1


def test_options_are_those_of_generate(client, lmm):
    drawn = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
    again = [ask(client, user("go"), max_tokens=16, **drawn).choices[0].message.content for _ in range(2)]
    assert again == [lmm.generate(None, "go", max_new_tokens=16, **drawn)] * 2
    assert len({ask(client, user("go"), temperature=2).choices[0].message.content for _ in range(4)}) > 1, (
        "no seed, no sameness"
    )
    free = ask(client, user("go"), max_completion_tokens=16).choices[0].message.content
    cut = ask(client, user("go"), max_tokens=16, stop=[free[6:8]], extra_body={"top_k": 3})
    assert cut.choices[0].message.content == free[: free.index(free[6:8])].strip()
    assert cut.choices[0].finish_reason == "stop"


def test_a_conversation_with_a_system_message(client, lmm):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("hi", picture(3)),
        {"role": "assistant", "content": "<image>ho"},
    ]
    said = ask(client, *messages, user("and?"), max_tokens=9).choices[0].message.content
    turns = [Turn("human", "Be brief.\n\nhi", [picture(3)]), Turn("gpt", "ho"), Turn("human", "and?")]
    assert said == "".join(lmm.answerer.stream(turns, Options(max_new_tokens=9)))


def test_models_health_and_metrics(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 64
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; the one that is here is 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        client.chat.completions.create(model="gpt", messages=[user("hi")])
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok", "model": "tiny"}
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert 'deepstack_requests_total{path="/v1/chat/completions",status="200"}' in text
    for name in ("deepstack_slots 3.0", "deepstack_waiting 0.0", "deepstack_answer_tokens_total", "first_token_seconds_bucket"):
        assert name in text
    connection.request("GET", "/nowhere")
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["message"]) == (404, "there is nothing at /nowhere")
    assert client.models.with_raw_response.list().headers["content-type"] == "application/json"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
MISTAKES = [
    ({"messages": []}, 400, "messages got [], expected a list with at least one message"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, 400, "messages[0] is from 'assistant', expected 'user'"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content got 3, expected a string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "messages[0].content[0] is {'type': 'video'}"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "cannot read image <3 bytes>: not in any image format"),
    ({"messages": [{"role": "user", "content": [IMAGE] * 3}]}, 400, "3 images in a request, expected at most 2; send fewer"),
    ({"messages": [{"role": "user", "content": "<image>?"}]}, 400, "the prompt has 1 <image> placeholder for 0 images"),
    (
        {"messages": [{"role": "user", "content": "x" * 99}], "max_tokens": 9},
        400,
        "takes 100 tokens with its images and the answer",
    ),
    ({"messages": [{"role": "user", "content": "x" * 9999}]}, 400, "the prompt has 9,999 characters, the context"),
    ({"temperature": -1}, 400, "temperature got -1, expected 0 (greedy) or more"),
    ({"temperature": 10**400}, 400, "temperature got 1000"),
    ({"temperature": "hot"}, 400, "temperature got 'hot'"),
    ({"max_tokens": 0}, 400, "max_tokens got 0, expected a whole number from 1 on"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "both max_completion_tokens and max_tokens"),
    ({"seed": [1, 2]}, 400, "seed got [1, 2], expected a whole number"),
    ({"n": 2}, 400, "n got 2, expected 1"),
    ({"temprature": 1}, 400, "unknown key 'temprature'; nearest valid name: 'temperature'"),
    ({"stream": 1}, 400, "stream got 1, expected true or false"),
    ({"stop": [""]}, 400, "stop got '', expected strings that are not empty"),
]


@pytest.mark.parametrize(("more", "status", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line(more, status, expected, address):
    found, answer = post(address, "/v1/chat/completions", chat_body(**more))
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert expected in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_what_is_no_request_is_refused(address):
    path = "/v1/chat/completions"
    assert post(address, path, "{")[1]["error"]["message"].startswith("the request is no JSON: ")
    assert post(address, path, "[" * 50_000)[0] == 400
    assert post(address, path, "[]")[0] == 400
    assert post(address, path, chat_body(), **{"Content-Type": "text/plain"})[0] == 415
    assert post(address, path, "x" * (BODY + 1))[0] == 413
    unsaid = iter([b"x" * 60_000] * 2)  # in chunks, its length not said
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("POST", path, unsaid, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert post(address, path, chat_body())[0] == 200


def test_pages_of_other_sites_and_strangers_names_are_refused(address):
    path = "/v1/chat/completions"
    assert post(address, path, chat_body(), Origin="http://evil.example")[0] == 403
    assert post(address, path, chat_body(), Host="evil.example")[0] == 403
    assert post(address, path, chat_body(), Origin=address)[0] == 200


def test_a_key_is_asked_for_but_at_the_page_and_health(engine):
    with served(engine, Settings("tiny", api_key="secret")) as address:
        good = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert ask(good, user("hi"), max_tokens=2).usage.completion_tokens == 2
        bad = openai.OpenAI(base_url=f"{address}/v1", api_key="secreT", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            ask(bad, user("hi"))
        codes = {}
        for path in ("/", "/health", "/metrics", "/v1/models"):
            connection = http.client.HTTPConnection(urlsplit(address).netloc)
            connection.request("GET", path)
            codes[path] = connection.getresponse().status
        assert codes == {"/": 200, "/health": 200, "/metrics": 401, "/v1/models": 401}


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "http://localhost/a.png", "https://u@example.org/a.png", "data:text/html,x", 7]
)
def test_nothing_but_a_picture_that_was_sent_is_read(url, address, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("an address was opened"))
    with pytest.raises(UrlError):
        image_bytes(url, frozenset(["example.org"]), 1000)


class _Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        file = io.BytesIO()
        picture(1).save(file, "PNG")
        self.send_response(302 if self.path == "/moved" else 200)
        self.send_header("Location", "/picture")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(file.getvalue() if self.path == "/picture" else b"x" * 5000)

    def log_message(self, *_):
        pass


def test_an_allowed_host_is_fetched_from_and_no_redirect_followed():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as pictures:
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        port = pictures.server_address[1]
        host, allowed = f"http://127.0.0.1:{port}", [f"127.0.0.1:{port}", f"localhost:{port}"]
        assert image_bytes(f"{host}/picture", allowed, 4000).startswith(b"\x89PNG")
        for url, expected in (
            (f"{host}/moved", "it answers 302, expected 200; redirects are not followed"),
            (f"{host}/large", "it is larger than 4,000 bytes"),
            (f"http://localhost:{port}/picture", "its name leads to a private address"),
        ):
            with pytest.raises(images.ImageError, match=expected):
                image_bytes(url, allowed, 4000)
        with pytest.raises(UrlError, match="does not open"):
            image_bytes(f"{host}/picture", ["127.0.0.1"], 4000)
        pictures.shutdown()


def test_a_full_queue_answers_429_and_who_leaves_makes_room(lmm, caplog):
    """Nothing is answered, for the engine has not been started: one place is taken, the next request is refused."""
    engine = Engine(lmm.answerer, LIMITS._replace(slots=1, waiting=0, images=0))
    with served(engine, Settings("tiny")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        stream = ask(client, user("hi"), stream=True)
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        with pytest.raises(
            openai.RateLimitError, match="the server is full: 1 request is answered or waits; ask again in a moment"
        ):
            ask(client, user("hi"))
        stream.close()
        until(lambda: not engine.load[1])
        until(lambda: counted(address) == {"429": 1, "499": 1})
        stream = ask(client, user("hi"), stream=True)
        engine.close()
        engine.start()
        with pytest.raises(openai.APIError, match=STOPPING):
            list(stream)
        with pytest.raises(openai.InternalServerError, match=STOPPING):
            ask(client, user("hi"))
        until(lambda: counted(address) == {"429": 1, "499": 1, "503": 2})
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503


def test_a_defect_in_the_middle_of_a_stream_is_an_error_event(lmm, caplog, monkeypatch):
    engine = Engine(lmm.answerer, LIMITS._replace(images=0))
    calls, real = [], engine._decode

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        real()

    monkeypatch.setattr(engine, "_decode", fails)
    engine.start()
    with served(engine, Settings("tiny")) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        stream, said = ask(client, user("hi"), stream=True), []
        with pytest.raises(openai.APIError, match=DEFECT):
            said += [part.choices[0].delta.content for part in iter(stream)] or []
        until(lambda: counted(address) == {"503": 1})
        monkeypatch.setattr(engine, "encode", lambda *_, **__: 1 / 0)
        with pytest.raises(openai.InternalServerError, match=DEFECT):
            ask(client, user("hi"))
        assert counted(address) == {"500": 1, "503": 1}
    engine.close()


def test_what_the_model_sees_of_a_picture(address):
    status, seen = post(address, "/v1/sight", json.dumps({"image": data_url(picture(5, 40, 20))}))
    assert status == 200
    assert [one["title"] for one in seen["pictures"]][:3] == ["Original", "Global view", "Crops"]
    assert "Crops by layer" in [one["title"] for one in seen["pictures"]]
    assert all(one["uri"].startswith("data:image/webp;base64,") for one in seen["pictures"])
    assert seen["tags"][0]["label"].startswith("layer 1: 4 tokens")
    for body, expected in (({"image": "data:image/png;base64,AAAA"}, "cannot read image"), ({}, "an image's url is None")):
        status, answer = post(address, "/v1/sight", json.dumps(body))
        assert status == 400
        assert expected in answer["error"]["message"]


def test_the_page_runs_its_own_script_alone(address, engine):
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/")
    answer = connection.getresponse()
    html = answer.read().decode()
    said = answer.headers["Content-Security-Policy"]
    assert said == policy(html)
    assert said.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in said
    assert html.count("<script>") == html.count("<style>") == 1
    assert not [mark for mark in ("http://", "https://", " style=", " onclick=", "@import", "url(") if mark in html]
    assert make_app(engine, Settings("tiny")) is not None
