"""Conversations as text: templates are data, and one function renders them and marks what the model learns to say."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from deepstack_jax.data.example import IMAGE_MARK, ConversationError, Message
from deepstack_jax.printing import plural


@dataclass(frozen=True)
class Rendered:
    """Prompt text and half-open character spans of it."""

    text: str
    spans: tuple[tuple[int, int], ...]  # what is trained: every answer with its end of turn
    words: tuple[tuple[int, int], ...] = ()  # what the turns themselves say; all else is the template's
    bos: bool = True  # whether the tokenizer's BOS goes in front; a model's own template writes that itself


class AnyTemplate(ABC):
    """What renders conversations: a `Template`, or the chat template of a model (`chat_template.ChatTemplate`)."""

    image: str  # what stands for an image once `images_to_front` has moved it to the front

    @property
    @abstractmethod
    def stop(self) -> str:
        """What ends an answer."""

    @property
    @abstractmethod
    def opening(self) -> str:
        """What stands between a prompt and the words of its answer."""

    @property
    @abstractmethod
    def fixed(self) -> str:
        """All that the template itself writes."""

    @property
    @abstractmethod
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system text."""

    @abstractmethod
    def render(self, messages: Sequence[Message], *, complete: bool = True) -> Rendered:
        """See the function `render`."""


@dataclass(frozen=True)
class Template(AnyTemplate):
    """The fixed text around the turns, in order: start question ask lead answer end (again question ask lead answer end)* tail.

    A generation prompt stops after `ask`, so everything after it, `lead` included, is what the model must say itself
    and is supervised. That is where the official labels begin and end, and it holds for every tokenizer: one that keeps
    a space with the word after it and one that does not.
    """

    start: str
    ask: str
    end: str
    lead: str = ""
    again: str = ""
    tail: str = ""
    image: str = IMAGE_MARK
    caption: bool = False  # exactly one exchange, whose question keeps nothing but its images
    prompting: "Template | None" = None  # where the official code prompts with another text than it trains on

    @property
    def takes_system(self) -> bool:
        return False  # each of these has one of its own

    @property
    def stop(self) -> str:
        return (self.prompting or self).end

    @property
    def opening(self) -> str:
        return (self.prompting or self).lead

    @property
    def fixed(self) -> str:
        return " ".join(map(str, astuple(self)))

    def render(self, messages: Sequence[Message], *, complete: bool = True) -> Rendered:
        template = self if complete or self.prompting is None else self.prompting
        turns = checked_turns(messages, complete)
        if turns[0].role == "system":
            raise ConversationError(
                "turn 0 is a system prompt, but a template with a name holds its own (data.template); remove the turn, put its "
                "words into the first question, or use the chat template of a model (data.template=model)"
            )
        if template.caption:
            images = turns[0].text.count(IMAGE_MARK)
            if len(turns) != 2 or not images:
                raise ConversationError(
                    f"template 'plain' got {plural(len(turns), 'turn')} and {plural(images, 'image')} in the first; expected "
                    f"one human turn with {IMAGE_MARK} and one answer; use a chat template for other data"
                )
            turns[0] = Message("human", IMAGE_MARK * images)

        text, spans, words = "", [], []
        for number, message in enumerate(turns):
            start = len(text)
            asks = message.role == "human"
            text += (template.again if number else template.start) if asks else template.lead
            words.append((len(text), len(text) + len(message.text)))
            text += message.text + (template.ask if asks else template.end)
            if not asks:
                spans.append((start, len(text)))
        return Rendered(text + template.tail * complete, tuple(spans), tuple(words))


def _v0(system: str, image: str = IMAGE_MARK) -> Template:
    prompting = Template(start=f"{system}###Human: ", ask="###Assistant:", lead=" ", end="###", again="Human: ", image=image)
    return replace(
        prompting,
        start=f"{system}\n\n### Human: ",
        ask="\n### Assistant:",
        end="\n###",
        again=" Human: ",
        tail=" ",
        prompting=prompting,
    )


def _v1(system: str, image: str = IMAGE_MARK) -> Template:
    return Template(start=f"{system} USER: ", ask=" ASSISTANT:", lead=" ", end="</s>", again="USER: ", image=image)


def _llama_2(system: str) -> Template:
    start = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n"
    return Template(start=start, ask=" [/INST]", lead=" ", end=" </s>", again="<s>[INST] ")


def _chatml(system: str) -> Template:
    again = "<|im_start|>user\n"
    start = f"<|im_start|>system\n{system}<|im_end|>{again}"
    return Template(start=start, ask="<|im_end|><|im_start|>assistant\n", end="<|im_end|>", again=again)


def _llama_3(system: str) -> Template:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return Template(
        start=f"{header('system')}{system}<|eot_id|>{header('user')}",
        ask=f"<|eot_id|>{header('assistant')}",
        end="<|eot_id|>",
        again=header("user"),
    )


_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = _HUMAN.replace("curious human", "curious user").replace("human's", "user's")
_VISION = "You are able to understand the visual content that the user provides, and assist the user with a variety of tasks"
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. "
    + _VISION.replace("You are", "The assistant is")
    + " using natural language.The visual content will be provided with the following format: <Image>visual content</Image>."
)
_TAG = f"<Image>{IMAGE_MARK}</Image>"
_LLAVA = f"You are a helpful language and vision assistant. {_VISION} using natural language."
_META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_PLAIN = Template(start="", ask="", end="\n", caption=True, prompting=Template(start="", ask="\n", end="\n"))
_MISTRAL = Template(start="[INST] ", ask=" [/INST]", lead=" ", end=" </s>", again="[INST] ")

TEMPLATES: dict[str, Template] = {
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "default": _v0(_HUMAN),
    "v0": _v0(_HUMAN),
    "llava_v0": _v0(_HUMAN),
    "v0_mmtag": _v0(_TAGGED, _TAG),
    "v1": _v1(_USER),
    "vicuna_v1": _v1(_USER),
    "llava_v1": _v1(_HUMAN),
    "v1_mmtag": _v1(_TAGGED, _TAG),
    "llama_2": _llama_2(_META),
    "llava_llama_2": _llama_2(_LLAVA),
    "mistral": _MISTRAL,
    "mistral_instruct": _MISTRAL,
    "mpt": _chatml(_MPT),
    "chatml": _chatml("Answer the questions."),
    "chatml_direct": _chatml("Answer the questions."),
    "mistral_direct": _chatml("Answer the questions."),
    "llama_3": _llama_3(_LLAVA),
    "phi3_instruct": Template(
        start="<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n",
        ask="<|end|>\n<|assistant|>\n",
        end="<|end|>",
        again="\n<|user|>\n",
    ),
    "direct": Template(start="", ask="", lead=" ", end="", again=" "),
}


def get_template(name: str) -> Template:
    """The template registered under `name`; a ValueError names the nearest valid one, as a typo must not train the default."""
    if name not in TEMPLATES:
        nearest = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown template {name!r}; nearest valid: {nearest!r}; all: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def images_to_front(messages: Sequence[Message], template: AnyTemplate) -> tuple[Message, ...]:
    """Turns of a sample that has images, every image moved to the front of its turn on a line of its own.

    A text-only record must not pass through here: there a literal "<image>" is a word. Unlike upstream, which leaves
    one, a turn with several images keeps their number, so that every image file still has its place.
    """

    def move(text: str) -> str:
        if not (count := text.count(IMAGE_MARK)):
            return text
        return (f"{template.image}\n" * count + text.replace(IMAGE_MARK, "").strip()).strip()

    return tuple(Message(message.role, move(message.text)) for message in messages)


def render(messages: Sequence[Message], template: AnyTemplate, *, complete: bool = True) -> Rendered:
    """Text of a conversation and the character spans of its answers.

    Args:
      messages: alternating human and gpt turns; one leading gpt turn is dropped, as upstream does.
      complete: True renders a training text, which ends with an answer; False renders a generation prompt, whose last
        message is the open question, in the form that the official code prompts with.

    Returns:
      The text and one span per answer, `lead` and end of turn included. An empty answer has its span like any other, so
      the model learns to say nothing; upstream leaves out its end of turn and runs into the next question.

    Raises:
      ConversationError: turns do not alternate, the last one is of the wrong side, or a caption template gets anything
        but one exchange with an image. Going on would train on the user's words or on no image.
    """
    return template.render(messages, complete=complete)


def checked_turns(messages: Sequence[Message], complete: bool) -> list[Message]:
    """The turns without a leading answer; ConversationError where they do not alternate, or end on the wrong side.

    A system turn may come before all others.
    """
    front = list(messages[:1]) if messages and messages[0].role == "system" else []
    spoken = messages[len(front) :]
    dropped = 1 if spoken and spoken[0].role != "human" else 0
    turns = list(spoken[dropped:])
    for number, message in enumerate(turns):
        expected = ("human", "gpt")[number % 2]
        if message.role != expected:
            place = number + dropped + len(front)
            raise ConversationError(f"turn {place}: got {message.role!r}, expected {expected!r}; turns alternate, human first")
    last = "gpt" if complete else "human"
    if not turns or turns[-1].role != last:
        got = f"ends with {turns[-1].role!r} at turn {len(messages) - 1}" if turns else "has no human turn"
        need = "an answer to train on" if complete else "an open question to generate from"
        raise ConversationError(f"conversation {got}; expected its last turn to be {last!r}: {need}")
    return front + turns
