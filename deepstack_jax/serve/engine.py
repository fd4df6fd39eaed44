"""Many answers at once from one device: a thread that puts prompts into free slots between two calls of the decoding loop."""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from deepstack_jax.batch import Batch
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.generate.answers import STREAM_EVERY, Answerer
from deepstack_jax.generate.decoding import prefill, stop_array
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import PromptShape, Turn, check_context, pad_prompts
from deepstack_jax.generate.sampling import Sampling, greedy_sampling
from deepstack_jax.generate.slots import Slots, empty_slots, go_on, put
from deepstack_jax.generate.text import AnswerText
from deepstack_jax.printing import plural

CHARACTERS = 64  # that no tokenizer has more of in a token, on average
SHORTEST = 64  # tokens of the smallest prompt that a program is compiled for
DEFECT = "the server failed while it answered; its log says how; ask again"
STOPPING = "the server is stopping; ask again when it is back"


class Limits(NamedTuple):
    """How much is done at once; each is decided when the server starts."""

    slots: int = 4  # answers made at once
    waiting: int = 64  # requests that wait for a slot
    context: int = 4096  # tokens of a conversation with its images and its answer; at most the model's
    images: int = 4  # of a request
    answer: int = 1024  # tokens of an answer where a request says nothing


class Busy(Exception):
    """As many requests as there is room for are being answered or wait."""


class Failed(Exception):
    """An answer that cannot be finished, by no fault of who asked."""


class Piece(NamedTuple):
    """What is newly said. The last piece has a reason: "stop" at an end of turn or a stop string, "length" at the limit."""

    text: str
    tokens: int  # made so far
    reason: str = ""


@dataclass(eq=False)
class Ticket:
    """A request's place. `leave` gives it back, and may be called at any time, by any thread, more than once.

    Attributes:
      emit: gets every Piece, or a Failed in place of the rest; called by the engine's thread, so it must not wait.
    """

    engine: Engine
    emit: Callable[[Piece | Failed], None] = lambda _: None
    prompt: Batch | None = None
    sampling: Sampling = field(default_factory=lambda: greedy_sampling(1))
    options: Options = field(default_factory=Options)
    text: AnswerText | None = None
    made: int = 0
    left: bool = False

    def leave(self) -> None:
        """Whoever asked has gone, or has all of the answer."""
        self.engine._give_back(self)


class Engine:
    """A model that answers many at once.

    Attributes:
      shapes: of prompts, every one that there is a program for.
      problem: why nothing is answered any more; "" while all is well.
    """

    def __init__(self, answerer: Answerer, limits: Limits, template: str | None = None) -> None:
        """
        Args:
          template: as in `Options`, of all answers.
        """
        self.answerer, self.template = answerer, template
        context = min(limits.context, answerer.config.decoder.max_positions)
        self.limits = limits._replace(context=context, answer=min(limits.answer, context))
        self.shapes = prompt_shapes(self.limits, answerer.config.layout.patches)
        self.problem = ""
        self._stops = stop_array(answerer.ends_of(Options(template=template))[0])
        self._tickets = 0
        self._waiting: deque[Ticket] = deque()
        self._rows: list[Ticket | None] = [None] * limits.slots
        self._changed = threading.Condition()
        self._slots = self._empty()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def warm_up(self) -> Iterator[PromptShape]:
        """Compile all that any request needs, one program at a time; yields what each is for."""
        for shape in self.shapes:
            blank = pad_prompts([], self.answerer.config, rows=1, shape=shape)
            self._prefill(0, blank, greedy_sampling(1), 1)
            yield shape
        self._decode()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self, problem: str = STOPPING) -> None:
        """Fail what is being answered and all that comes. It does not wait, so a signal handler may call it."""
        self.problem = self.problem or problem
        if self._changed.acquire(blocking=False):  # else whoever holds it looks at `problem` before it waits
            self._changed.notify_all()
            self._changed.release()

    def enter(self) -> Ticket:
        """A place for a request, to be taken before anything costly is done for it.

        Raises:
          Busy: there is none. Failed: nothing is answered any more.
        """
        with self._changed:
            if self.problem:
                raise Failed(self.problem)
            if self._tickets >= self.limits.slots + self.limits.waiting:
                many = plural(self._tickets, "request is answered or waits", "requests are answered or wait")
                raise Busy(f"the server is full: {many}; ask again in a moment")
            self._tickets += 1
            return Ticket(self)

    def encode(self, turns: Sequence[Turn], options: Options, *, whole: bool) -> tuple[EncodedExample, Options]:
        """A conversation checked and ready, in the caller's thread; `whole`: `max_new_tokens` is lowered to what there is room
        for, since nobody asked for so many.

        Raises:
          RequestError, ImageError, ConversationError: as `generate` would say it.
        """
        self.check_images(sum(len(turn.images) for turn in turns))
        context = self.limits.context
        characters = sum(len(turn.words) for turn in turns)
        if characters > CHARACTERS * context:  # or the tokenizer would read for minutes
            raise RequestError(f"the prompt has {characters:,} characters, the context of this server is {context}; shorten it")
        options = options.replace({"template": self.template} | ({"max_new_tokens": 1} if whole else {}))
        encoded = self.answerer.encode(turns, options)
        if context < self.answerer.config.decoder.max_positions:
            check_context(encoded.length, options.max_new_tokens, self.answerer.config, most=context)
        if whole:
            options = options.replace({"max_new_tokens": min(self.limits.answer, context - encoded.length)})
        return encoded, options

    def check_images(self, count: int) -> None:
        """Raise RequestError where a request has more than there are programs for."""
        if count > self.limits.images:
            raise RequestError(f"{plural(count, 'image')} in a request, expected at most {self.limits.images}; send fewer")

    def submit(self, ticket: Ticket, prompt: EncodedExample, options: Options, emit: Callable[[Piece | Failed], None]) -> None:
        """Begin to answer what `encode` gave. All that may fail by what was asked is done here, in the caller's thread."""
        wanted = PromptShape(prompt.length, len(prompt.layouts))
        shape = next(one for one in self.shapes if one.length >= wanted.length and one.images >= wanted.images)
        ticket.prompt = pad_prompts([prompt], self.answerer.config, shape=shape)
        (ticket.sampling,) = options.sampling(1, 1)
        ticket.options, ticket.emit, ticket.text = options, emit, self.answerer.new_text(options)
        with self._changed:
            if not self.problem:
                self._waiting.append(ticket)
                self._changed.notify_all()
                return
        emit(Failed(self.problem))

    @property
    def load(self) -> tuple[int, int]:
        """How many slots are taken, and how many requests wait for one."""
        return sum(ticket is not None for ticket in self._rows), len(self._waiting)

    def _give_back(self, ticket: Ticket) -> None:
        with self._changed:
            if not ticket.left:
                ticket.left = True
                self._tickets -= 1
                if ticket in self._waiting:
                    self._waiting.remove(ticket)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._rows = [None if ticket is None or ticket.left else ticket for ticket in self._rows]
                while not (self.problem or self._waiting or any(self._rows)):
                    self._changed.wait(1)
                if self.problem:
                    self._fail(self.problem)
                    return
            try:
                self._fill()
                if any(self._rows):
                    self._decode()
            except Exception:  # of the device, whose state is lost: who waits is told, the others are answered
                logging.exception("an answer failed")
                with self._changed:
                    self._fail(DEFECT, waiting=False)
                try:
                    self._slots = self._empty()
                except Exception:  # the device is lost for good: /health and every request say so from now on
                    self.problem = DEFECT

    def _fill(self) -> None:
        """Read waiting prompts into free slots, oldest first."""
        while None in self._rows:
            with self._changed:
                if not self._waiting or self.problem:
                    return
                row, ticket = self._rows.index(None), self._waiting.popleft()
                self._rows[row] = ticket
            assert ticket.prompt is not None
            first = self._prefill(row, ticket.prompt, ticket.sampling, ticket.options.max_new_tokens)
            ticket.prompt = None  # its pixels are of no more use
            self._say(row, first, ended=bool(first[0] < 0) or ticket.options.max_new_tokens == 1)

    def _prefill(self, row: int, batch: Batch, sampling: Sampling, most: int) -> np.ndarray:
        answerer = self.answerer
        prompt = prefill(answerer.model, answerer.params, batch, sampling, self._stops, room=0)
        self._slots = put(self._slots, np.int32(row), prompt, sampling, np.int32(most))
        return np.asarray(prompt.token)

    def _decode(self) -> None:
        """One call of the loop, and what it made to those who wait for it."""
        wanted = np.array([ticket is not None and not ticket.left for ticket in self._rows])
        model, params = self.answerer.model, self.answerer.params
        self._slots, made, left = go_on(model, params, self._slots, wanted, self._stops, steps=STREAM_EVERY)
        made, left = jax.device_get((made, left))
        for row in np.flatnonzero(wanted).tolist():
            self._say(row, made[row], ended=left[row] == 0)

    def _say(self, row: int, ids: np.ndarray, *, ended: bool) -> None:
        """Give new tokens to who waits for them; the slot is free if they are the last."""
        ticket = self._rows[row]
        assert ticket is not None
        try:
            piece = _piece(ticket, ids[ids >= 0].tolist(), ended=ended)
            if piece.reason:
                self._rows[row] = None
                ticket.leave()
            if piece.text or piece.reason:
                ticket.emit(piece)
        except Exception:  # of one answer's text, or of who waits for it: the others go on
            logging.exception("an answer failed")
            ticket.leave()
            self._rows[row] = None
            ticket.emit(Failed(DEFECT))

    def _fail(self, problem: str, *, waiting: bool = True) -> None:
        lost = [ticket for ticket in (*self._rows, *(self._waiting if waiting else ())) if ticket is not None]
        self._rows = [None] * self.limits.slots
        if waiting:
            self._waiting.clear()
        for ticket in lost:
            if not ticket.left:
                ticket.emit(Failed(problem))

    def _empty(self) -> Slots:
        return empty_slots(self.answerer.model, rows=self.limits.slots, context=self.limits.context)


def _piece(ticket: Ticket, new: list[int], *, ended: bool) -> Piece:
    text, most = ticket.text, ticket.options.max_new_tokens
    assert text is not None
    ticket.made += len(new)
    said = text.feed(new)
    if not (ended or text.stopped):
        return Piece(said, text.tokens)
    reason = "stop" if text.stopped or ticket.made < most else "length"
    return Piece(said + text.close(), text.tokens, reason)


def prompt_shapes(limits: Limits, patches: int) -> tuple[PromptShape, ...]:
    """Padded shapes of prompts, the cheapest first: lengths and numbers of images double, so that they are few.

    Args:
      patches: fewest tokens of an image.
    """
    lengths = [length for length in (SHORTEST << power for power in range(32)) if length < limits.context] + [limits.context]
    images, room = [0], 1
    while images[-1] < limits.images:
        images.append(min(room, limits.images))
        room *= 2
    found = []
    for fewer, count in zip([-1, *images], images, strict=False):
        fewest = (fewer + 1) * patches  # tokens, or a smaller number of images would do
        found += [PromptShape(length, count) for length in lengths if length >= fewest]
    return tuple(found)


class Compilations:
    """Counts the programs that jax compiles in this process, from its making on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_: object, **__: object) -> None:
        self.count += event.endswith("backend_compile_duration")


@functools.cache
def compilations() -> Compilations:
    """The one counter: jax has no way to take a listener back."""
    return Compilations()
