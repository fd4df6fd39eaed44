"""Questions to answers on the host's side: encode, batch, decode chunk by chunk, and turn tokens into text."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deepstack_jax.config import Config
from deepstack_jax.data.encode.batch_rows import EncodedExample
from deepstack_jax.data.encode.tokenizer import Tokenizer
from deepstack_jax.data.example import IMAGE_MARK
from deepstack_jax.generate.decoding import CHUNK, answer_ids
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import (
    CutImage,
    Turn,
    bucket,
    check_context,
    cut_image,
    encode_turns,
    find_template,
    image_list,
    pad_prompts,
)
from deepstack_jax.generate.sampling import Sampling
from deepstack_jax.generate.text import AnswerText, end_of_turn
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.types import PyTree

STREAM_EVERY = 4  # tokens between two pieces of a stream


class Answer(NamedTuple):
    """What a model said to one prompt."""

    text: str
    tokens: int  # made for it, end of turn not counted


@dataclass(frozen=True)
class Answerer:
    """A model with all that it takes to talk to it. `tokenizer` may be None; then every question is refused."""

    model: DeepStack
    params: PyTree
    config: Config
    tokenizer: Tokenizer | None
    template: str
    ends: tuple[int, ...] = ()  # ids that end an answer besides the tokenizer's and the template's

    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          RequestError: there is none.
        """
        if self.tokenizer is None:
            raise RequestError(
                "this checkpoint has no tokenizer, so it cannot read a prompt; put tokenizer.model or tokenizer.json into its "
                "folder, or use `logits`, which takes token ids"
            )
        return self.tokenizer

    def answers(self, conversations: Sequence[Sequence[Turn]], options: Options, batch_size: int) -> list[Answer]:
        """One answer per conversation, `batch_size` at a time; all are checked before the first is computed.

        Raises:
          RequestError: as `encode`.
        """
        if batch_size < 1:
            raise RequestError(f"batch_size got {batch_size}, expected 1 or more")
        return self.answer_encoded([self.encode(turns, options) for turns in conversations], options, batch_size)

    def cut_images(self, images: Sequence[Any], options: Options) -> list[CutImage]:
        """The images of a conversation as the model takes them; ImageError where one cannot be read."""
        return [cut_image(image, self.config, options.exif) for image in images]

    def encode(self, turns: Sequence[Turn], options: Options, *, placed: bool = False, answer: str = "") -> EncodedExample:
        """A conversation as token ids and crops, checked against the context; `placed` and `answer` as in `encode_turns`.

        Raises:
          RequestError: the model cannot be asked this. ImageError: an image cannot be read.
        """
        tokenizer = self.needed_tokenizer()
        template = find_template(options.template or self.template, tokenizer)
        encoded = encode_turns(turns, self.config, tokenizer, template, options.exif, placed=placed, answer=answer)
        check_context(encoded.length, options.max_new_tokens, self.config)
        return encoded

    def answer_encoded(self, prompts: Sequence[EncodedExample], options: Options, batch_size: int) -> list[Answer]:
        """One answer per conversation of `encode`."""
        rows = min(batch_size, 1 << max(0, len(prompts) - 1).bit_length())
        answers: list[Answer] = []
        for number, sampling in enumerate(options.sampling(len(prompts), rows)):
            batch = prompts[number * rows : (number + 1) * rows]
            texts = [self.new_text(options) for _ in batch]
            for _ in self._decode(batch, texts, sampling, options, CHUNK):
                pass
            answers += [Answer(text.text, text.tokens) for text in texts]
        return answers

    def stream(self, turns: Sequence[Turn], options: Options) -> Iterator[str]:
        """The answer to one conversation in pieces. What is wrong with it is raised here, not at the first piece."""
        encoded, text, (sampling,) = self.encode(turns, options), self.new_text(options), options.sampling(1, 1)
        return (piece for (piece,) in self._decode([encoded], [text], sampling, options, STREAM_EVERY) if piece)

    def new_text(self, options: Options) -> AnswerText:
        """What collects the tokens of an answer, up to a stop string or the end of the turn."""
        return AnswerText(self.needed_tokenizer(), (*self.ends_of(options)[1], *options.stops))

    def ends_of(self, options: Options) -> tuple[list[int], tuple[str, ...]]:
        """Ids and strings that end an answer, but for the options' own."""
        tokenizer = self.needed_tokenizer()
        ids, strings = end_of_turn(find_template(options.template or self.template, tokenizer), tokenizer)
        return sorted({*ids, *self.ends}), strings

    def _decode(
        self, prompts: Sequence[EncodedExample], texts: Sequence[AnswerText], sampling: Sampling, options: Options, every: int
    ) -> Iterator[list[str]]:
        """Make tokens until every answer has ended; yields what each of them can newly show."""
        made = answer_ids(
            self.model,
            self.params,
            pad_prompts(prompts, self.config, rows=len(sampling.seed)),
            sampling,
            stop_ids=self.ends_of(options)[0],
            max_new_tokens=options.max_new_tokens,
            room=bucket(options.max_new_tokens),
            every=every,
        )
        for ids in made:
            yield [text.feed(row[row >= 0].tolist()) for text, row in zip(texts, ids, strict=False)]
            if all(text.stopped for text in texts):
                break
        yield [text.close() for text in texts]


class Chat:
    """A conversation: every question is read together with all turns before it.

    Attributes:
      turns: what was said so far, the images cut already.
    """

    def __init__(self, answerer: Answerer, options: Options) -> None:
        self._answerer, self._options = answerer, options
        self.turns: tuple[Turn, ...] = ()

    def ask(self, prompt: str, images: Any = (), **options: Any) -> str:
        """The answer to the next question, which may bring images; options override those of the conversation."""
        return "".join(self.stream(prompt, images, **options))

    def stream(self, prompt: str, images: Any = (), **options: Any) -> Generator[str, None, None]:
        """The same in pieces. An answer that is not read to its end is remembered as far as it was read.

        What raises leaves the conversation as it was.
        """
        chosen, given = self._options.replace(options), image_list(images)
        if not isinstance(given, list | tuple):
            raise RequestError(f"images is a {type(images).__name__}, expected an image or a list of them")
        asked = (*self.turns, Turn("human", prompt, self._answerer.cut_images(given, chosen)))
        return self._remember(asked, self._answerer.stream(asked, chosen))

    def clear(self) -> None:
        """Forget all turns and images."""
        self.turns = ()

    def _remember(self, asked: tuple[Turn, ...], pieces: Iterator[str]) -> Generator[str, None, None]:
        said = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            answer = "".join(said).replace(IMAGE_MARK, "")  # or the next prompt would look for one image more
            self.turns = (*asked, Turn("gpt", answer))
