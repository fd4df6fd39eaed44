"""Models for lmms-eval, by its entry points: `python -m lmms_eval --model deepstack_jax --model_args pretrained=DIR`.

The one module that imports lmms-eval, and torch with it. Nothing imports this one but lmms-eval.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]

from deepstack_jax.api import load
from deepstack_jax.config import MeshConfig
from deepstack_jax.errors import ConfigError, UserError, nearest
from deepstack_jax.evaluate.on_mesh import over_mesh, share_of
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.serve.protocol import read_turns

MAX_NEW_TOKENS = 1024  # of lmms-eval's models, where a task says nothing
# Generation settings of tasks that change nothing here: of beams there is one, and how an image is cut is the checkpoint's.
_NEUTRAL = ("do_sample", "num_beams", "top_p", "top_k", "image_aspect_ratio", "use_cache")


def manifest() -> ModelManifest:
    """What the entry point names."""
    return ModelManifest("deepstack_jax", chat_class_path=f"{__name__}.DeepStackChat", aliases=("deepstack",))


class DeepStackChat(lmms):
    """A model as lmms-eval asks it: its messages are read as `serve` reads those of a client, over all devices.

    Args of --model_args:
      pretrained: what `evaluate` takes as --model; `adapter`, `template` and `dtype` as there.
      batch_size: questions answered at once.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        adapter: str = "",
        template: str = "",
        dtype: str = "",
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        if unknown := next((name for name in others if name != "max_batch_size"), None):
            known = ("pretrained", "adapter", "template", "dtype", "batch_size")
            raise ConfigError(f"lmms-eval gives {unknown!r}; {nearest(unknown, known)}")
        if not pretrained or not str(batch_size).isdecimal() or int(batch_size) < 1:
            got = f"pretrained={pretrained!r} and batch_size={batch_size!r}"
            raise ConfigError(f"lmms-eval gives {got}, expected --model_args pretrained=DIR and a whole number --batch_size=N")
        mesh = make_mesh(MeshConfig())
        self.answerer = over_mesh(load(pretrained, dtype or None, adapter=adapter, template=template).answerer, mesh)
        self.rows = share_of(mesh, int(batch_size))
        self.exif = self.answerer.config.data.exif  # as `evaluate`: as in training

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests; an empty one where a question cannot be asked, which is logged.

        Raises:
          RequestError: a task that wants sampled answers.
        """
        options = [options_of(request.args[2], request.task_name).replace({"exif": self.exif}) for request in requests]
        found: list[GenerationResult] = []
        for same, numbers in groupby(range(len(requests)), key=options.__getitem__):
            alike = [requests[number] for number in numbers]
            for first in range(0, len(alike), self.rows):
                found += self._answers(alike[first : first + self.rows], same)
        return found

    def _answers(self, requests: Sequence[Instance], options: Options) -> list[GenerationResult]:
        prompts = {}
        for number, request in enumerate(requests):
            _, to_messages, _, document, task, split = request.args
            try:
                turns = read_turns(as_openai(to_messages(self.task_dict[task][split][document])), lambda picture: picture)
                prompts[number] = self.answerer.encode(turns, options)
            except UserError as error:
                logger.error(f"{task}, document {document}: an empty answer, which counts as wrong: {error}")
        made = self.answerer.answer_batch([*prompts.values()], options, self.rows) if prompts else []
        answers = dict(zip(prompts, made, strict=True))
        return [
            GenerationResult(answers[number].text, TokenCounts(output_tokens=answers[number].tokens))
            if number in answers
            else GenerationResult("", TokenCounts(output_tokens=0))
            for number in range(len(requests))
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Not here: lmms-eval asks models of messages for answers alone."""
        raise NotImplementedError(
            "lmms-eval asks for a likelihood, expected an answer in words; see evaluate --tasks=NAME:likelihood"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Any:
        """Not here."""
        raise NotImplementedError("lmms-eval asks in rounds, expected one question at a time; choose another task")


def as_openai(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of lmms-eval as those of OpenAI's API, but that a picture stands in the place of its URL."""

    def part(content: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": "image_url", "image_url": {"url": content["url"]}} if content["type"] == "image" else content

    return [{"role": one["role"], "content": [part(content) for content in one["content"]]} for one in messages]


def options_of(given: Mapping[str, Any], task: str) -> Options:
    """A task's generation settings.

    Raises:
      RequestError: it wants answers that are sampled or searched for, or a value is out of range.
    """
    sampled = given.get("temperature") and given.get("do_sample") is not False
    if sampled or (given.get("num_beams") or 1) != 1:
        raise RequestError(
            f"{task} has the generation settings {dict(given)!r}, expected greedy answers; give --gen_kwargs temperature=0, or "
            "sample through a server of deepstack_jax.serve"
        )
    read = ("max_new_tokens", "temperature", "until", *_NEUTRAL)
    if unknown := [name for name in given if name not in read]:
        logger.warning(f"{task}: the generation settings {', '.join(unknown)} change nothing here")
    until = given.get("until") or ()
    stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return Options().replace({"max_new_tokens": given.get("max_new_tokens", MAX_NEW_TOKENS), "stop": stops})
