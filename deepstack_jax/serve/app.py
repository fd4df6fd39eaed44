"""The rim: HTTP in and out, asyncio, and nothing that computes for long on the loop's own thread."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deepstack_jax.data.example import ConversationError
from deepstack_jax.errors import UserError
from deepstack_jax.printing import one_line
from deepstack_jax.serve.engine import DEFECT, Busy, Engine, Failed, Piece, Ticket
from deepstack_jax.serve.images import image_bytes
from deepstack_jax.serve.metrics import Metrics
from deepstack_jax.serve.protocol import Answering, ChatRequest, ModelError, error_object, event, read_request
from deepstack_jax.serve.sight import look

BODY_SECONDS = 60  # that sending a request may take
_GONE = 499  # the status of who left before the end, which nobody reads
_OPEN = ("/", "/health")  # without a key
_LOCAL = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """What a server was started with.

    Attributes:
      name: of the model, in the API.
      api_key: "" where none is asked for; then only this machine's own names lead here.
      hosts: that images are fetched from, HOST or HOST:PORT.
      body: most bytes of a request.
    """

    name: str
    api_key: str = ""
    hosts: tuple[str, ...] = ()
    body: int = 32 << 20


def make_app(engine: Engine, settings: Settings) -> ASGIApp:
    """The whole server; the engine has been started."""
    api = _Api(engine, settings)
    routes = [
        Route("/", api.page),
        Route("/health", api.health),
        Route("/metrics", api.show_metrics),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.counted(api.chat), methods=["POST"]),
        Route("/v1/sight", api.counted(api.sight), methods=["POST"]),
    ]
    return _Door(Starlette(routes=routes, exception_handlers={HTTPException: _http_error}), settings)


def _error(status: int, message: str, code: str | None = None) -> JSONResponse:
    kind = (
        "invalid_request_error" if status < 500 and status != 429 else "server_error" if status >= 500 else "rate_limit_error"
    )
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_object(one_line(message), kind, code), status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {request.url.path}", 405: f"{request.url.path} takes no {request.method}"}
    return _error(error.status_code, said.get(error.status_code, error.detail))


class _Door:
    """Who may come in. A page of somebody's in a browser on this machine may not: it gives itself away by Host or Origin."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._key = app, settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _error(403, "requests of other sites' pages are refused")
        if not self._key:
            return None if _LOCAL.fullmatch(host) else _error(403, "without an API key this server is localhost alone")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if request.url.path in _OPEN or (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self._key)):
            return None
        return _error(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key")


@dataclass
class _Ending:
    """How a stream ended, as the status that it would have had if all of it had been known at its beginning."""

    status: int = _GONE


class _Stream(StreamingResponse):
    """Gives the place back whatever becomes of the stream, also where it never begins, and has it counted by how it ended."""

    def __init__(self, content: AsyncIterator[bytes], ticket: Ticket, ending: _Ending) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._ticket, self._ending = ticket, ending
        self.count: Callable[[int], None] = lambda _: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.leave()
            self.count(self._ending.status)


class _Api:
    """The routes."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics(engine)
        self._started = int(time.time())
        self._html = resources.files("deepstack_jax.serve").joinpath("page.html").read_text("utf-8")
        self._looking = asyncio.Semaphore(2)  # a look costs as much as a question, and waits for no slot
        self._picture = read = partial(image_bytes, allowed=frozenset(settings.hosts), most=settings.body)
        self._read = partial(read_request, model=settings.name, check_images=engine.check_images, read_image=read)

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self._html, headers={"Content-Security-Policy": policy(self._html), **_CAREFUL})

    async def health(self, _: Request) -> Response:
        problem = self.engine.problem
        return JSONResponse({"status": problem or "ok", "model": self.settings.name}, 503 if problem else 200)

    async def show_metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.media_type)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.settings.name:
            return _error(
                404, f"there is no model {name!r} here; the one that is here is {self.settings.name!r}", "model_not_found"
            )
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        limits = self.engine.limits
        more = {
            "max_model_len": limits.context,
            "max_images": limits.images,
            "layers": self.engine.answerer.config.decoder.layers,
        }
        return {"id": self.settings.name, "object": "model", "created": self._started, "owned_by": "deepstack_jax", **more}

    def counted(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A route whose mistakes become one JSON object each, and whose answers are counted by status."""

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except Busy as error:
                response = _error(429, str(error), "queue_full")
            except Failed as error:
                response = _error(503, str(error))
            except HTTPException as error:
                response = _error(error.status_code, error.detail)
            except ModelError as error:
                response = _error(404, str(error), "model_not_found")
            except (UserError, ConversationError) as error:
                response = _error(400, str(error))
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except (
                Exception
            ):  # a defect of ours: the client gets an error object, the log the traceback, and the server goes on
                logging.exception("a request failed")
                response = _error(500, DEFECT)
            if isinstance(response, _Stream):
                response.count = partial(self._count, request.url.path)
            else:
                self._count(request.url.path, response.status_code)
            return response

        return answer

    def _count(self, path: str, status: int) -> None:
        self.metrics.requests.labels(path, status).inc()

    async def chat(self, request: Request) -> Response:
        ticket = self.engine.enter()
        try:
            body = await self._body(request)
            began = time.perf_counter()
            asked, answering, events = await self._ask(ticket, body)
            pieces = self._pieces(request, events, answering, began)
            if asked.stream:
                ending = _Ending()
                return _Stream(_events(pieces, asked, answering, ending), ticket, ending)
            said, last = [], None
            async for last in pieces:
                said.append(last.text)
            if last is None or not last.reason:
                raise ClientDisconnect
            result = JSONResponse(answering.whole("".join(said), last.tokens, last.reason))
        except BaseException:
            ticket.leave()
            raise
        ticket.leave()
        return result

    async def _body(self, request: Request) -> bytes:
        """The request's body, of a bounded size and sent in a bounded time."""
        most = self.settings.body
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the request is not application/json; say so in Content-Type")
        too_large = HTTPException(413, f"the request is larger than {most:,} bytes; send fewer or smaller images")
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError as error:
            raise HTTPException(408, f"the request took longer than {BODY_SECONDS} s to arrive") from error
        return bytes(body)

    async def _ask(self, ticket: Ticket, body: bytes) -> tuple[ChatRequest, Answering, asyncio.Queue]:
        asked = await asyncio.to_thread(self._read, body)
        prompt, options = await asyncio.to_thread(self.engine.encode, asked.turns, asked.options, whole=asked.whole)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(piece: Piece | Failed) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, piece)

        await asyncio.to_thread(self.engine.submit, ticket, prompt, options, emit)
        self.metrics.prompt_tokens.inc(prompt.length)
        return replace(asked, turns=()), Answering(self.settings.name, prompt.length), events

    async def _pieces(
        self, request: Request, events: asyncio.Queue, answering: Answering, began: float
    ) -> AsyncIterator[Piece]:
        """The answer as it comes; it ends early where the client goes. Failed where the engine fails."""
        gone, first = asyncio.create_task(_until_gone(request, events)), True
        try:
            while (piece := await events.get()) is not None:
                if isinstance(piece, Failed):
                    raise piece
                if first:
                    self.metrics.first_token.observe(time.perf_counter() - began)
                    first = False
                yield piece
                if piece.reason:
                    self.metrics.answer_tokens.inc(piece.tokens)
                    self.metrics.answer_seconds.observe(time.perf_counter() - began)
                    return
        finally:
            gone.cancel()

    async def sight(self, request: Request) -> Response:
        """POST {"image": URL}: what the model sees of it."""
        async with self._looking:
            try:
                given = json.loads(await self._body(request))
            except (ValueError, RecursionError) as error:
                raise HTTPException(400, f"the request is no JSON: {error}") from error
            url = given.get("image") if isinstance(given, dict) else None

            def draw() -> dict[str, Any]:
                return look(self._picture(url), self.engine.answerer.config)

            return JSONResponse(await asyncio.to_thread(draw))


async def _until_gone(request: Request, events: asyncio.Queue) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def _events(
    pieces: AsyncIterator[Piece], asked: ChatRequest, answering: Answering, ending: _Ending
) -> AsyncIterator[bytes]:
    """The stream of an answer as server-sent events; where it cannot be finished the last of them is an error."""
    try:
        yield event(answering.piece({"role": "assistant", "content": ""}))
        async for piece in pieces:
            usage = {"usage": answering.usage(piece.tokens)} if asked.usage == "all" else {}
            if piece.text:
                yield event(answering.piece({"content": piece.text}) | usage)
            if piece.reason:
                yield event(answering.piece({}, piece.reason))
                if asked.usage:
                    yield event(answering.count(piece.tokens))
                ending.status = 200
                yield event("[DONE]")
    except Failed as error:
        ending.status = 503
        yield event(error_object(str(error), "server_error"))
    except Exception:  # a defect of ours, where the status is sent already: only an event can still say that this is no end
        logging.exception("a stream failed")
        ending.status = 500
        yield event(error_object(DEFECT, "server_error"))


_CAREFUL = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def policy(html: str) -> str:
    """The Content-Security-Policy: nothing but the page's own script and style run, and only this server is asked."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
