"""Chat templates of models (jinja): what they write, as transformers renders it, and which of it the model learns to say."""

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deepstack_jax.config.chat_template import chat_source
from deepstack_jax.data.encode.rendering import TemplateError, Text, render_texts
from deepstack_jax.data.encode.templates import AnyTemplate, Rendered, checked_turns, get_template
from deepstack_jax.data.example import IMAGE_MARK, ConversationError, Message
from deepstack_jax.printing import quote

if TYPE_CHECKING:
    from deepstack_jax.data.encode.tokenizer import Tokenizer

SPECIAL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What a template may write that is a special token: <|end|>, [/INST]."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# Words that no template looks for, none a part of another.
_SYSTEM, _ASKED, _SAID, _AGAIN, _LAST = (f"qz{name}zq" for name in ("system", "asked", "said", "again", "last"))
_PROBE = (Message("human", _ASKED), Message("gpt", _SAID), Message("human", _AGAIN), Message("gpt", _LAST))
_OTHER = "choose another with data.template=NAME"


class Shape(NamedTuple):
    """What a template writes around words."""

    start: str  # before the first question of a conversation without a system text
    ask: str  # between a question and its answer
    again: str  # between an answer and the next question
    final: str  # after the last answer
    end: str  # what ends an answer: how `again` and `final` begin alike, as far as their first special token
    opening: str  # between a prompt and the last answer of a conversation
    system: str | None  # between a system text and the first question; None where it takes no such text


@dataclass(frozen=True)
class ChatTemplate(AnyTemplate):
    """A chat template, used like a `templates.Template`.

    Attributes:
      text: jinja.
      date: as in `config.chat_template.ChatSource`.
      variables: special tokens by their role, as the tokenizer's files name them.
      control: texts of the control tokens, which words may spell.
    """

    text: str
    date: str
    variables: tuple[tuple[str, str], ...]
    control: tuple[str, ...]
    image = IMAGE_MARK

    @property
    def stop(self) -> str:
        return self.shape.end

    @property
    def opening(self) -> str:
        return self.shape.opening

    @property
    def fixed(self) -> str:
        return " ".join(filter(None, self.shape))

    @property
    def takes_system(self) -> bool:
        return self.shape.system is not None

    @functools.cached_property
    def shape(self) -> Shape:
        """What the template writes around words.

        Raises:
          TemplateError: it cannot be used.
        """
        whole, first = self._probe(4, prompt=False), self._probe(1, prompt=True)
        again, final = whole.partition(_SAID)[2].partition(_AGAIN)[0], whole.partition(_LAST)[2]
        common = again[: _alike(again, final)]
        special = re.match(rf"\s*(?:{SPECIAL.pattern})", common)
        (asked,) = self._texts([Message("system", _SYSTEM), _PROBE[0]], [(2, True)])
        system = re.search(f"{_SYSTEM}(.*){_ASKED}", "" if isinstance(asked, str) else asked.text, re.DOTALL)
        start, _, ask = first.partition(_ASKED)
        opening = whole.partition(_AGAIN)[2].partition(_LAST)[0].removeprefix(ask)
        return Shape(start, ask, again, final, special[0] if special else common, opening, system[1] if system else None)

    def _probe(self, turns: int, *, prompt: bool) -> str:
        """The text of the first turns that nobody has said."""
        (text,) = self._texts(_PROBE, [(turns, prompt)])
        if isinstance(text, str):
            raise TemplateError(f"the chat template cannot be used: {text}; {_OTHER}")
        places = [text.text.find(turn.text) for turn in _PROBE[:turns]]
        if min(places) < 0 or places != sorted(places):
            raise TemplateError(f"the chat template does not write what is said, turn after turn; {_OTHER}")
        return text.text

    @functools.cached_property
    def _in_parts(self) -> bool:
        """Whether the template reads a turn as a list of parts, as those of some processors do, and not as a text."""
        text, parts = (self._texts(_PROBE[:1], [(1, False)], in_parts=form)[0] for form in (False, True))
        holds = [isinstance(found, Text) and _ASKED in found.text for found in (text, parts)]
        return holds[1] and not holds[0]

    def render(self, messages: Sequence[Message], *, complete: bool = True) -> Rendered:
        """As `templates.render`; a system turn may come first.

        What is trained stands in the template's `{% generation %}` blocks. Where it has none, it begins where the prompt for an
        answer ends, as `add_generation_prompt` makes it of the turns before, and ends with the end of turn; so each of these
        prompts has to be the beginning of the whole.

        Raises:
          ConversationError: turns do not alternate, the template refuses them, or it writes those before an answer otherwise
            than a prompt has them: the model would be asked in another form than it was trained in.
          TemplateError: the template cannot be used.
        """
        turns = checked_turns(messages, complete)
        if turns[0].role == "system" and not self.takes_system:
            raise ConversationError(
                "turn 0 is a system prompt, which this chat template does not take; remove the turn, or put its words into the "
                "first question"
            )
        answers = [number for number, turn in enumerate(turns) if turn.role == "gpt"]
        found = self._texts(turns, [(len(turns), not complete), *((number, True) for number in answers)])
        texts = [text for text in found if isinstance(text, Text)]
        if len(texts) < len(found):
            why = next(text for text in found if isinstance(text, str))
            raise ConversationError(f"the chat template refuses the conversation: {why}; repair or drop the record")
        whole, prompts = texts[0], {at: text.text for at, text in zip(answers, texts[1:], strict=True)}
        marked = bool(_MARKED.search(self.text))
        try:
            spans, words = _find_parts(turns, whole.text, prompts, self.shape)
        except ConversationError:
            if (complete and not marked) or self._spells_control(turns):
                raise
            spans, words = (), ()
        return Rendered(whole.text, whole.spans if marked else spans, words, bos=False)

    def _spells_control(self, turns: Sequence[Message]) -> bool:
        """Whether words spell a control token: then they have to be told apart from what the template writes."""
        said = unicodedata.normalize("NFKC", "\n".join(turn.text for turn in turns)).casefold()
        return any(token.casefold() in said for token in self.control)

    def _texts(
        self, turns: Sequence[Message], renders: Sequence[tuple[int, bool]], in_parts: bool | None = None
    ) -> list[Text | str]:
        """For each (number of turns, whether an answer is to follow) their text, or why there is none."""
        parts = self._in_parts if in_parts is None else in_parts
        contents = [[{"type": "text", "text": turn.text}] if parts else turn.text for turn in turns]
        messages = [{"role": _ROLES[turn.role], "content": said} for turn, said in zip(turns, contents, strict=True)]
        marked = bool(_MARKED.search(self.text))
        return render_texts(self.text, dict(self.variables), self.date, messages, renders, marked=marked)


def open_template(name: str, tokenizer: "Tokenizer | None" = None) -> AnyTemplate:
    """The template that a value of `config.data.template` means.

    Args:
      tokenizer: whose special tokens a chat template may write.

    Raises:
      ValueError: there is none of that name; the nearest is named.
    """
    source = chat_source(name)
    if source is None:
        return get_template(name)
    if tokenizer is None:
        return _chat_template(*source, (), ())
    return _chat_template(*source, tuple(tokenizer.special_tokens.items()), tuple(tokenizer.control_tokens.values()))


@functools.lru_cache(maxsize=16)
def _chat_template(text: str, date: str, variables: tuple[tuple[str, str], ...], control: tuple[str, ...]) -> ChatTemplate:
    """Kept, since it knows its own shape once it was looked for."""
    return ChatTemplate(text, date, variables, control)


_Spans = tuple[tuple[int, int], ...]


def _find_parts(turns: Sequence[Message], whole: str, prompts: Mapping[int, str], shape: Shape) -> tuple[_Spans, _Spans]:
    """Spans of the answers with their ends of turn, and of the words of all turns.

    Args:
      whole: the rendered conversation. prompts: by the turn that it is to be answered with.
    """
    spans, words = list[tuple[int, int]](), list[tuple[int, int]]()
    begin = 0  # of the answer before
    first = 2 if turns[0].role == "system" else 1
    open_end = {} if turns[-1].role == "gpt" else {len(turns): whole}
    for number, prompt in {**prompts, **open_end}.items():
        if not whole.startswith(prompt):
            at = _alike(whole, prompt)
            raise ConversationError(
                f"turn {number}: the chat template prompts for this answer with {quote(prompt[at : at + 40])} where the whole "
                f"conversation has {quote(whole[at : at + 40])}, expected the same; drop the record, mark the answers in the "
                f"template by {{% generation %}}, or {_OTHER}"
            )
        before = shape.again if number > first else (shape.system or "") if first == 2 else ""
        asked = _place(whole, len(prompt) - len(shape.ask), turns[number - 1].text, before)
        if asked is None or not prompt.endswith(shape.ask):
            raise _rewritten(number - 1)
        if number > first:
            end = asked[0] - len(before)
            words.append(_place(whole, end, turns[number - 2].text, "", begin) or (begin, end))
            spans.append((begin, end + len(shape.end)))
        elif first == 2:
            system = _place(whole, asked[0] - len(before), turns[0].text, "")
            if system is None:
                raise _rewritten(0)
            words.append(system)
        words.append(asked)
        begin = len(prompt)
    if not open_end:
        end = len(whole) - len(shape.final)
        if not whole.endswith(shape.final) or end < begin:
            raise _rewritten(len(turns) - 1)
        words.append(_place(whole, end, turns[-1].text, "", begin) or (begin, end))
        spans.append((begin, end + len(shape.end)))
    return tuple(spans), tuple(words)


def _place(whole: str, end: int, words: str, before: str, first: int = 0) -> tuple[int, int] | None:
    """Where words stand that end there, as they are or without white space around, with a fixed text before them."""
    for written in (words, words.strip()):
        start = end - len(written)
        if start >= first + len(before) and whole.startswith(written, start) and whole.endswith(before, 0, start):
            return start, end
    return None


def _rewritten(number: int) -> ConversationError:
    return ConversationError(
        f"turn {number}: the chat template writes other words than the turn's, or other text around them than in a plain "
        f"conversation, expected the same; drop the record, or {_OTHER}"
    )


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
