"""Load a model, ask it about images, read its scores, save it: `import deepstack_jax as dsx; lmm = dsx.load("folder")`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.typing import DTypeLike

from deepstack_jax.config import Config, MeshConfig
from deepstack_jax.config.chat_template import own_template, template_in_words
from deepstack_jax.config.words import as_repr, parts_in_words
from deepstack_jax.data.encode.rendering import TemplateError
from deepstack_jax.data.encode.templates import TEMPLATES
from deepstack_jax.data.encode.tokenizer import (
    Tokenizer,
    fitting_templates,
    lacking_end_of_turn,
    load_tokenizer,
    template_problem,
    tokenizer_files,
)
from deepstack_jax.data.formats.image_files import ImageError
from deepstack_jax.errors import ConfigError, flags_as
from deepstack_jax.families.build import build_model
from deepstack_jax.generate.answers import Answer, Answerer, Chat
from deepstack_jax.generate.logits import next_token_logits
from deepstack_jax.generate.options import Options, RequestError
from deepstack_jax.generate.prompts import Turn, find_template, image_list
from deepstack_jax.generate.text import ends_beside
from deepstack_jax.model.attention import AttentionFn, dot_product
from deepstack_jax.parallel.kernels import attentions, kernels_for
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.printing import label, one_line, quote
from deepstack_jax.train.checkpoint.adapter import open_adapter, over_base
from deepstack_jax.train.checkpoint.init_weights import draw_absent, run_leaves
from deepstack_jax.train.checkpoint.reading import CheckpointError
from deepstack_jax.train.checkpoint.restore_params import is_workdir
from deepstack_jax.train.core.optimizer import flatten, unflatten
from deepstack_jax.types import PyTree
from deepstack_jax.weights.adapters import is_adapter, merged
from deepstack_jax.weights.load import load_params, stored_leaves
from deepstack_jax.weights.open_checkpoint import StoredModel, find_folder, open_checkpoint
from deepstack_jax.weights.save import LeafLike, save_checkpoint

__all__ = ["LMM", "Answer", "Chat", "CheckpointError", "ImageError", "Options", "RequestError", "load", "save_hf"]

DTYPES = ("float32", "bfloat16")
UNKNOWN = 0  # id of `<unk>` in the vocabularies of LLaMA and Phi-3


@dataclass(frozen=True, repr=False)
class LMM:
    """A large multimodal model, ready to answer.

    Attributes:
      config: the run or checkpoint; `config.train.compute_dtype` is that of the activations.
      params: the parameter tree.
      tokenizer: None where the checkpoint has none; then `logits` works and `generate` does not.
      template: of conversations, as `config.data.template` says it: a name, or the text of the model's own chat template.
      pad_id: the token that `logits` takes for padding at the ends of a row.
      tokenizer_folder: where the tokenizer came from, "" without files; `save_hf` copies them.
      passthrough: keys of the checkpoint's config.json that `config` does not describe; `save_hf` writes them again.
      ends: ids that end an answer besides the tokenizer's and the template's.
    """

    config: Config
    params: PyTree
    tokenizer: Tokenizer | None
    template: str
    pad_id: int = 0
    tokenizer_folder: str = ""
    passthrough: Mapping[str, Any] = field(default_factory=dict)
    ends: tuple[int, ...] = ()

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        words = {
            **parts_in_words(self.config),
            "parameters": f"{size:,} in {self.config.train.compute_dtype}",
            "template": template_in_words(self.template),
            "tokenizer": self.tokenizer_folder or (type(self.tokenizer).__name__ if self.tokenizer is not None else "none"),
        }
        return as_repr(type(self).__name__, words)

    @cached_property
    def answerer(self) -> Answerer:
        """What answers; it keeps the one module that all compiled programs belong to."""
        model = build_model(self.config, *_kernels(self.config, self.params))
        return Answerer(model, self.params, self.config, self.tokenizer, self.template, self.ends)

    def generate(self, images: Any, prompt: str | Sequence[str], *, batch_size: int = 8, **options: Any) -> Any:
        """Answer a prompt about images, or a list of prompts.

        Args:
          images: of one prompt, a path, PIL image, u8[y, x, 3] array or encoded bytes, a list of them, or None; of several
            prompts, a list with one of these for each, or None.
          prompt: the user's words. With as many `<image>` as images, each is where the words put it; without any, the
            images come first.
          batch_size: prompts that are answered at once; what is said does not depend on it.
          options: max_new_tokens=64, temperature=0.0, top_p=1.0, top_k=0, stop=(), seed=0, template=None, exif="apply"; see
            `Options`.

        Returns:
          The answer, or a list of answers.

        Raises:
          RequestError: an option out of range, images that do not fit the placeholders, a prompt that does not fit the context,
            no tokenizer.
          ImageError: an image that cannot be read.
        """
        if isinstance(prompt, str):
            return self.answers([(images, prompt)], Options().replace(options), batch_size=batch_size)[0].text
        if not isinstance(prompt, list | tuple):
            raise RequestError(f"prompt is a {type(prompt).__name__}, expected a string or a list of strings")
        if not isinstance(images, list | tuple | None):
            raise RequestError(f"images is a {type(images).__name__}, expected a list of image lists, one per prompt")
        given = [()] * len(prompt) if images is None else list(images)
        if len(given) != len(prompt):
            raise RequestError(f"images got {len(given)} lists for {len(prompt)} prompts; give one per prompt, [] for none")
        pairs = list(zip(given, prompt, strict=True))
        return [answer.text for answer in self.answers(pairs, Options().replace(options), batch_size=batch_size)]

    def answers(self, prompts: Sequence[tuple[Any, str]], options: Options, *, batch_size: int = 8) -> list[Answer]:
        """As `generate`, for (images, prompt) pairs, with the number of tokens of each answer."""
        conversations = [[Turn("human", words, image_list(images))] for images, words in prompts]
        return self.answerer.answers(conversations, options, batch_size)

    def stream(self, images: Any, prompt: str, **options: Any) -> Any:
        """The answer of `generate` in pieces (an iterator of str) as they are made; joined they are what `generate` returns.

        What `generate` raises is raised at the call, not at the first piece.
        """
        return self.answerer.stream([Turn("human", prompt, image_list(images))], Options().replace(options))

    def chat(self, **options: Any) -> Chat:
        """A conversation that remembers its turns; options as of `generate`."""
        return Chat(self.answerer, Options().replace(options))

    def save_hf(self, folder: str | PathLike[str], *, dtype: str = "", force: bool = False) -> None:
        """As `deepstack_jax.save_hf` of this model."""
        save_hf(self, folder, dtype=dtype, force=force)

    def logits(
        self,
        input_ids: Any,
        images: Sequence[Any] | None = None,
        attention_mask: Any = None,
        *,
        exif: str = "apply",
    ) -> np.ndarray:
        """Scores of the next token at every position, for the official code's inputs; needs no tokenizer.

        Args:
          input_ids: int[B, T0] with -200 where an image is, padded on either side.
          images: for every row an image or a list of them, in the forms of `generate`; [] or None for a row of text.
          attention_mask: int or bool[B, T0], 0 = padding. Without it the runs of the pad id at both ends of a row are padding,
            and any other is a token.
          exif: "apply" turns images upright as EXIF says; "ignore" takes them as they are stored, as the official code does.

        Returns:
          f32[B, T, V]; T is the longest row with its images, padded with zeros on the input's side. For parity load in float32
          and call under `jax.default_matmul_precision("highest")`.

        Raises:
          RequestError: shapes that do not fit, ids out of range, another number of images than of -200, a row beyond the
            context.
          ImageError: an image that cannot be read.
        """
        model = self.answerer.model
        exif = Options().replace({"exif": exif}).exif
        return next_token_logits(model, self.params, self.config, input_ids, images, attention_mask, self.pad_id, exif)


def _kernels(config: Config, params: PyTree) -> tuple[AttentionFn, AttentionFn]:
    """Attention for the device that the parameters are on; the portable kernel, where somebody spread them over several.

    And in float32, where parity is looked for: its products follow `jax.default_matmul_precision`.
    """
    devices = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    device, *others = devices or jax.devices()[:1]
    if others or config.train.compute_dtype == "float32":
        return dot_product, dot_product
    return attentions(kernels_for(device.platform, config), make_mesh(MeshConfig(), [device]))


# What `convert` has as a flag.
_ARGUMENTS = {name: name for name in ("tower", "base", "projector", "adapter", "dtype", "format", "max_shard", "workdir")} | {
    "force": "force=True"
}


@flags_as(_ARGUMENTS)
def load(
    path: str | PathLike[str],
    dtype: DTypeLike | None = None,
    *,
    tower: str | PathLike[str] = "",
    base: str | PathLike[str] = "",
    projector: str | PathLike[str] = "",
    adapter: str | PathLike[str] = "",
    template: str = "",
) -> LMM:
    """Read a model.

    Args:
      path: a Hugging Face folder or hub id (official DeepStack, LLaVA-1.5/NeXT, either naming; or with `tower` a bare language
        model), or the workdir of a training run, whose newest checkpoint is taken. Where neither is there and it looks like a
        hub id, it is fetched.
      dtype: float32 or bfloat16, of parameters and activations; None = float32 on a CPU, bfloat16 on accelerators.
      tower: folder or hub id of the vision tower, in place of the one that config.json names.
      base: folder or hub id of the language model under a folder that holds a projector alone.
      projector: an mm_projector.bin, in place of the folder's.
      adapter: LoRA adapters over the model: the workdir of a run that trained some, or a folder of PEFT. They stay beside the
        kernels; `save_hf` merges them. A workdir with adapters, given as `path`, finds its base itself.
      template: name of a conversation template, in place of that of the run, of the folder's own chat template, or where it has
        none of that of such checkpoints.

    Raises:
      RequestError: no such template; the nearest is named.
      WeightsError, ConfigError: the folder, its config.json, weights or tokenizer do not fit together or are not known here.
      CheckpointError: a workdir without a checkpoint that can be read.
    """
    others = {"tower": str(tower), "base": str(base), "projector": str(projector), "adapter": str(adapter)}
    return _load(path, dtype, **others, template=template)


@flags_as({name: f"convert's --{name}" for name in ("tower", "base", "projector")})
def load_in_verb(path: str, dtype: str | None, adapter: str = "") -> LMM:
    """As `load`, for a verb that gets no more than this: `convert` is named where the folder needs it."""
    return _load(path, dtype, adapter=adapter)


def _load(
    path: str | PathLike[str],
    dtype: DTypeLike | None,
    *,
    tower: str = "",
    base: str = "",
    projector: str = "",
    adapter: str = "",
    template: str = "",
) -> LMM:
    if template:
        find_template(template)
    try:
        kind = np.dtype(dtype if dtype is not None else "float32" if jax.default_backend() == "cpu" else "bfloat16").name
    except TypeError:
        kind = str(dtype)
    if kind not in DTYPES:
        raise ConfigError(f"dtype got {kind}, expected {' or '.join(DTYPES)}")
    folder = find_folder(Path(path))
    if is_workdir(folder):
        return _load_workdir(folder, kind, template, adapter)
    found = open_checkpoint(folder, tower=tower, base=base, projector=projector, recipe=Config() if tower else None)
    name = found.tokenizer or found.config.data.tokenizer
    tokenizer = _tokenizer(name, found.config) if name else None
    config = _computing_in(found.config, kind, template or _template_of(found, tokenizer))
    fresh = draw_absent(found.tensors, config) if found.bare else {}
    if fresh:
        warnings.warn(
            f"{folder} is a bare language model: what joins it to the tower is drawn, and has to be trained before its answers "
            "about images mean anything; see docs/finetune.md",
            stacklevel=3,
        )
    if adapter:
        leaves = stored_leaves(found.tensors, config, np.dtype(kind), fresh)
        params = placed(over_base(leaves, open_adapter(adapter, config), folder), kind)
    else:
        params = load_params(found.tensors, config, np.dtype(kind), fresh=fresh)
    pad_id = UNKNOWN if tokenizer is None else tokenizer.pad_id  # upstream pads with it, whatever config.json says
    return LMM(config, params, tokenizer, config.data.template, pad_id, found.tokenizer, found.passthrough, found.ends)


@flags_as(_ARGUMENTS)
def save_hf(lmm: LMM, folder: str | PathLike[str], *, dtype: str = "", force: bool = False) -> None:
    """Write a folder (safetensors, config.json, clip/, tokenizer) that the official code loads.

    Args:
      folder: must not exist or be empty, or with `force` be an earlier export, to which nobody has added a file.
      dtype: float32 | bfloat16 | float16 of the file; "" = as loaded.

    Raises:
      WeightsError: something else is there, or the model has no such form; nothing is left over.
      ConfigError: an argument of the wrong type.
    """
    if not isinstance(lmm, LMM) or not isinstance(folder, str | PathLike):
        got = f"{type(lmm).__name__}, {type(folder).__name__}"
        raise ConfigError(f"save_hf got ({got}), expected a model and a folder: save_hf(lmm, 'out'), or lmm.save_hf('out')")
    save_checkpoint(
        merged(flatten(lmm.params), lmm.config),
        lmm.config,
        Path(folder),
        tokenizer_folder=lmm.tokenizer_folder,
        dtype=dtype or lmm.config.train.compute_dtype,
        passthrough=lmm.passthrough,
        force=force,
    )


def _template_of(found: StoredModel, tokenizer: Tokenizer | None) -> str:
    """The template of a folder: what an export says, its own chat template, or what such checkpoints usually have.

    A warning says where it does not go with the tokenizer: then no answer ends where it should.
    """
    if tokenizer is None:
        return found.template
    fitting = ", ".join(fitting_templates(tokenizer)) or "no template here"
    try:
        own = "" if found.template_told else own_template(found.tokenizer or found.path)
        if own and (problem := template_problem(own, tokenizer)):
            warnings.warn(f"{problem}; it has the end of turn of: {fitting}; choose with template=NAME", stacklevel=4)
    except (ConfigError, TemplateError) as error:
        own = ""
        warnings.warn(f"{found.tokenizer or found.path}: {error}; taken is {found.template!r}", stacklevel=4)
    if not own and found.template in TEMPLATES and (end := lacking_end_of_turn(found.template, tokenizer)):
        warnings.warn(
            f"the template is taken to be {found.template!r}, but its end of turn, {end}, is not a token "
            f"of the tokenizer; that one has those of: {fitting}; choose with template=NAME",
            stacklevel=4,
        )
    return own or found.template


def placed(leaves: Mapping[str, LeafLike], kind: str) -> PyTree:
    """Parameters by path as a tree on the default device, adapters in float32, all others in dtype `kind`."""

    def place(path: str, leaf: LeafLike) -> jax.Array:
        whole = leaf[tuple(slice(None) for _ in leaf.shape)]
        return jnp.asarray(whole, "float32" if is_adapter(path) else kind)

    return unflatten({path: place(path, leaf) for path, leaf in leaves.items()})


def _load_workdir(workdir: Path, kind: str, template: str, adapter: str) -> LMM:
    _, config, leaves = run_leaves(workdir)
    if adapter:
        leaves = over_base(merged(leaves, config), open_adapter(adapter, config), workdir)
    config = _computing_in(config, kind, template or config.data.template)
    tokenizer = _tokenizer(config.data.tokenizer, config)
    params = placed(leaves, kind)
    passthrough, files = token_ids(tokenizer), tokenizer_files(tokenizer)
    ends = ends_beside(tokenizer)  # of what the run was begun with
    return LMM(config, params, tokenizer, config.data.template, tokenizer.pad_id, files, passthrough, ends)


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What a config.json says of the tokenizer."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {key: id for key, id in ids.items() if id is not None}


def _computing_in(config: Config, kind: str, template: str) -> Config:
    train, data = dataclasses.replace(config.train, compute_dtype=kind), dataclasses.replace(config.data, template=template)
    return dataclasses.replace(config, train=train, data=data)


def _tokenizer(name: str, config: Config) -> Tokenizer:
    """The tokenizer, checked against the vocabulary."""
    try:
        tokenizer = load_tokenizer(name)
    except (ValueError, OSError) as error:
        raise ConfigError(f"tokenizer {quote(name)} cannot be read: {one_line(str(error))}") from error
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"the tokenizer in {label(name)} has {tokenizer.vocab_size} ids, the model {config.decoder.vocab_size}; it is "
            "another model's: put the right one into the folder"
        )
    return tokenizer
