"""Every key but those of data and images (`data.py`): type, choices, range, default, and the meaning beside it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from deepstack_jax.config.chat_template import template_in_words
from deepstack_jax.config.data import DataConfig, DataSpec, ImageConfig
from deepstack_jax.config.fields import LENGTH, MAY_CHANGE, NOT_NEGATIVE, OneOf, Range, Seed, count, positive
from deepstack_jax.config.words import as_repr, parts_in_words
from deepstack_jax.layout.sequence import SEQUENCES, STACKS, LayoutSpec
from deepstack_jax.layout.stack import SAMPLINGS, layer_schedule
from deepstack_jax.printing import plural

TAPPED = {"taps": "none", "crops_taps": "crops"}
"""Values of `config.deepstack.stack` with taps -> what the rest of the stack is made of."""
SECTIONS: dict[str, dict[str, type]] = {"vision": {}, "decoder": {}}
"""Classes of the sections whose keys depend on their `architecture`, by its name; the families register theirs."""
Width = Annotated[int, positive(2**20)]
Layers = Annotated[int, positive(4096)]
HiddenState = Annotated[int, Range(-4097, "a number", 4096)]
Decay = Annotated[float, Range(0, "a number from 0 on and below 1", 1, below=True)]


def register_section(section: Literal["vision", "decoder"], architecture: str, cls: type) -> None:
    """Let `config.SECTION.architecture` have a name, and the section then the keys of a class.

    Args:
      cls: a frozen dataclass that derives from `VisionConfig` or `DecoderConfig` and annotates its keys as they do.
    """
    SECTIONS[section][architecture] = cls


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. The defaults are CLIP ViT-L/14-336. A family may add keys in a class of its own."""

    architecture: Annotated[str, OneOf(SECTIONS["vision"])] = "clip"  # the family that builds it (`families/`)
    patch_size: Width = 14  # side of a patch in pixels
    width: Width = 1024  # size of a hidden state
    layers: Layers = 24  # blocks that the checkpoint has, used or not
    heads: Width = 16  # attention heads
    mlp: Width = 4096  # width between the two maps of an MLP
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"  # between the two maps of an MLP
    norm_eps: Annotated[float, positive()] = 1e-5  # epsilon of the layer norms
    feature_layer: int = -2  # index into the hidden states: -1 is the last layer's output, -2 the input of the last layer
    post_layers: Annotated[int, count(most=4096)] = 0  # blocks after the tower's own; the output is then that of the last
    position_std: Annotated[float, NOT_NEGATIVE] = 0.02  # spread of freshly drawn position and CLS embeddings

    # What some families have. No keys: a section of such a family says so, or makes a key of what may differ.
    feature_norm = False  # the post norm is on the features
    cuts_edge = False  # pixels at the right and lower edge that fill no patch are left out

    @property
    def layers_run(self) -> int:
        """Layers whose output is used: hidden state -2 is the input of the last layer."""
        return self.layers + self.post_layers if self.post_layers else self.layers_before(self.feature_layer)

    def layers_before(self, state: int) -> int:
        """Layers that a hidden state has gone through, by its index as `feature_layer` counts."""
        return state if state >= 0 else self.layers + 1 + state

    @property
    def parameters(self) -> int:
        """About how many it has; a family of another arithmetic says in its own section."""
        layers = self.layers + self.post_layers
        return layers * self.width * (4 * self.width + 2 * self.mlp) + 3 * self.width * self.patch_size**2


@dataclass(frozen=True)
class ProjectorConfig:
    """Linear maps with exact GELU between them, from vision width to decoder width."""

    layers: Annotated[int, positive(64)] = 2  # linear maps: 2 is LLaVA-1.5's `mlp2x_gelu`, 1 a plain linear map


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: angle i of position p is p / (factor_i * theta ** (2i / H)), cos and sin scaled together."""

    theta: Annotated[float, positive()] = 10000.0  # base of the angles
    # How longer contexts are reached; yarn as in upstream's Phi-3
    scaling: Literal["none", "linear", "llama3", "longrope", "yarn"] = "none"
    factor: float = 1.0  # linear and llama3: how much longer the context became
    low_freq_factor: float = 1.0  # llama3: angles that turn less often than this in the old context are scaled in full
    high_freq_factor: float = 4.0  # llama3: those that turn more often than this are not scaled
    original_positions: Annotated[int, count()] = 0  # all but linear: context before it was extended; beyond it go long factors
    short_factor: tuple[float, ...] = ()  # longrope and yarn: one per angle, within the original context
    long_factor: tuple[float, ...] = ()  # longrope and yarn: one per angle, beyond it


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder. The defaults are Vicuna-7B v1.5. A family may add keys in a class of its own."""

    architecture: Annotated[str, OneOf(SECTIONS["decoder"])] = "llama"  # the family that builds it and names its tensors
    vocab_size: Annotated[int, positive(2**24)] = 32000  # rows of the embedding and of the head
    width: Width = 4096  # size of a hidden state
    layers: Layers = 32  # blocks of attention and MLP
    heads: Width = 32  # heads of the queries
    kv_heads: Width = 32  # heads of keys and values, each shared by heads / kv_heads queries
    head_dim: Width = 128  # width of a head
    mlp: Width = 11008  # width between the maps of an MLP
    norm_eps: Annotated[float, positive()] = 1e-5  # epsilon of the RMS norms
    max_positions: Annotated[int, positive()] = 4096  # longest context, in tokens, that the weights were trained for
    sliding_window: Annotated[int, count("all tokens before")] = 0  # tokens that a token attends to, itself included
    rope: RopeConfig = field(default_factory=RopeConfig)
    scan: Annotated[bool, MAY_CHANGE] = True  # False unrolls the layers: slower to compile, equal results
    # What the backward pass recomputes: nothing, all of a layer, all but what attention computes and adds, all but its matrix
    # products, or all of a layer whose input is kept in the host's memory
    remat: Annotated[Literal["none", "block", "minimal", "dots", "offload"], MAY_CHANGE] = "block"
    embed_std: Annotated[float, NOT_NEGATIVE] = 0.02  # spread of a freshly drawn token embedding
    head_std: Annotated[float, NOT_NEGATIVE] = 0.02  # spread of a freshly drawn head
    tied_head: bool = False  # whether the embeddings are the head too: one parameter, both uses

    # What blocks of some families have. No keys: a section of such a family says so, or makes a key of what may differ.
    qkv_bias = False  # biases on queries, keys and values
    head_norm = False  # an RMS norm over each head of queries and keys, before they are turned
    embedding_multiplier = 1.0  # on what enters the first layer
    attention_multiplier = 0.0  # on the products of queries and keys; 0 = 1 / sqrt(head_dim)
    residual_multiplier = 1.0  # on what attention and MLP add
    logits_scaling = 1.0  # what scores are divided by

    @property
    def parameters(self) -> int:
        """About how many it has; a family of another arithmetic says in its own section."""
        heads = 2 * (self.heads + self.kv_heads) * self.head_dim
        tables = 1 if self.tied_head else 2
        return self.layers * self.width * (heads + 3 * self.mlp) + tables * self.vocab_size * self.width


@dataclass(frozen=True)
class DeepStackConfig:
    """What is in the sequence, what is injected, and where (paper sections 3.2, 3.3 and 4.3)."""

    sequence: Annotated[str, OneOf(SEQUENCES)] = "global"  # what is among the words, zero for tokens of exact zeros
    # What is injected: crops (the paper), `taps` (Qwen3-VL's form), both as crops_taps, or an ablation's
    stack: Annotated[str, OneOf((*STACKS, *TAPPED))] = "crops"
    # Hidden states of the tower at the global view, each by a merger of its own: pairs of the hidden state, counted as
    # `vision.feature_layer` is, and the decoder layer at whose input it is added
    taps: tuple[tuple[HiddenState, Annotated[int, count(most=4096)]], ...] = ()
    # How the crops' tokens become groups: every h-th row and w-th column, every h*w-th token, or a crop each
    sampling: Annotated[str, OneOf(SAMPLINGS)] = "2d"
    start: int = 1  # group k is added at the input of layer start + k * interval
    interval: Annotated[int, positive()] = 1  # layers from one group to the next
    schedule: tuple[int, ...] = ()  # overrides start and interval: the group (or -1) of every layer, without taps
    # Where: layers of the decoder (DeepStack-L); layers of the tower, into the global view (DeepStack-V); or all groups at
    # once into the sequence's tokens, added to them (input) or joined with them along channels, before the projector
    into: Literal["decoder", "vision", "input", "channels"] = "decoder"
    # DeepStack-V: map j enters tower layer vision_start + j
    vision_start: Annotated[int, Range(-1, "-1 (half of the tower's layers) or a layer from 0 on")] = -1
    pool: Annotated[int, positive()] = 1  # side of the squares of projected tokens that are averaged (`2d_scaledown`: 2)
    # What the groups come from; view: one large picture under interpolated positions (`hires_local`)
    high_res: Literal["crops", "view"] = "crops"

    def layout(self, image: ImageConfig, patch_side: int) -> LayoutSpec:
        """Where every visual token of an image goes, whose crops have patch_side**2 patches each."""
        grids = image.kind.possible_grids(
            image.num_crops, square=image.grid == "square", pinpoints=image.pinpoints, size=image.size
        )
        return LayoutSpec(
            image.mode,
            patch_side // self.pool,
            image.num_crops,
            grids,
            self.sampling,
            self.sequence,
            self.stack_of_views,
            image.merge,
            len(self.taps),
        )

    @property
    def stack_of_views(self) -> str:
        """What the groups beside the taps are made of."""
        return TAPPED.get(self.stack, self.stack)

    def tapped(self, vision: VisionConfig) -> tuple[int, ...]:
        """The tower layer at whose input each tap's hidden state is; a layer past the last stands for the last one's output."""
        return tuple(vision.layers_before(state) for state, _ in self.taps)

    def tower_layers(self, vision: VisionConfig) -> int:
        """Layers of the tower whose output the sequence or any group needs."""
        return max((vision.layers_run, *self.tapped(vision)))

    def views_schedule(self, layers: int, groups: int) -> tuple[int, ...]:
        """As `decoder_schedule`, without the taps."""
        if self.schedule:
            return self.schedule
        return layer_schedule(layers, groups - len(self.taps) if self.into == "decoder" else 0, self.start, self.interval)

    def decoder_schedule(self, layers: int, groups: int) -> tuple[int, ...]:
        """The group injected at the input of each of the decoder's layers, or -1; taps have the last of all groups."""
        tapped = {layer: groups - len(self.taps) + tap for tap, (_, layer) in enumerate(self.taps)}
        return tuple(tapped.get(layer, group) for layer, group in enumerate(self.views_schedule(layers, groups)))

    def tower_schedule(self, vision: VisionConfig, groups: int) -> tuple[int, ...]:
        """DeepStack-V: the group added at the input of each tower layer, or -1; empty where nothing enters the tower.

        The feature is the input of layer `vision.layers_run`; what would enter after that is left out.
        """
        if self.into != "vision":
            return ()
        start = vision.layers // 2 if self.vision_start < 0 else self.vision_start
        schedule = layer_schedule(vision.layers + vision.post_layers, groups, start, 1)
        return tuple(group if layer <= vision.layers_run else -1 for layer, group in enumerate(schedule))


@dataclass(frozen=True)
class OptimizerGroup:
    """One set of parameters that are updated alike. Which parameters: `OptimizerConfig.table`."""

    algorithm: Literal["adamw", "muon"] = "adamw"  # the rule of the update
    lr: Annotated[float, NOT_NEGATIVE] = 2e-5  # learning rate at the schedule's highest
    b1: Decay = 0.9  # decay of the first moment; Muon: momentum
    b2: Decay = 0.999  # decay of the second moment
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8  # added to the root of the second moment
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0  # share of a parameter that a step takes away, times the learning rate
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the first moment; the second is float32
    lora: bool = False  # True trains adapters of the group's kernels (see `lora`), and the kernels stay as they are


@dataclass(frozen=True)
class ScheduleConfig:
    """The factor on every group's learning rate over the steps."""

    # Form: falls to `final`; or constant, then linear to `final` over the last `tail`
    kind: Literal["cosine", "linear_tail"] = "cosine"
    # Steps in which the rate rises from 0
    warmup: Annotated[float, Range(0, "a share of the steps, 0 to 1, as 0.03", 1)] = 0.03
    final: Annotated[float, Range(0, "a share of the learning rate, 0 to 1", 1)] = 0.0  # factor at the last step
    # For linear_tail: the last steps, in which the rate falls
    tail: Annotated[float, Range(0, "a share of the steps, 0 to 1, as 0.03", 1)] = 0.25


@dataclass(frozen=True)
class OptimizerConfig:
    """Which parameters train, and how."""

    # (pattern of the parameter's path, name of its group or "frozen"); the first match wins, a parameter left over is an error
    table: tuple[tuple[str, str], ...] = ((".*", "default"),)
    groups: dict[str, OptimizerGroup] = field(default_factory=lambda: {"default": OptimizerGroup()})
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip_norm: Annotated[float, positive(math.inf)] = 1.0  # most of the gradient's global norm


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) of the kernels whose `optimizer.groups` entry says `lora`."""

    rank: Annotated[int, positive(2**16)] = 64  # r, width between the two maps of an adapter
    alpha: Annotated[float, positive()] = 128.0  # what an adapter says is multiplied by alpha / rank
    rank_stabilised: bool = False  # by alpha / sqrt(rank) instead (arXiv 2312.03732)
    # Dtype of the base, which is all that does not train, where anything has adapters. int8 and nf4 keep the kernels of the
    # decoder's layers in 8 or 4 bits with a scale for every 64 inputs, the rest in bfloat16
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"

    @property
    def scale(self) -> float:
        """What an adapter says is multiplied by this."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Annotated[int, LENGTH] = 0  # optimizer steps; 0 = from `epochs`
    epochs: Annotated[float, LENGTH] = 1.0  # times through the data
    batch_size: Annotated[int, positive(2**24)] = 128  # examples per optimizer step, over all hosts
    accumulation: Annotated[int, positive()] = 1  # micro-batches per step; the loss is normalised over all of them
    loss_chunk: Annotated[int, positive()] = 512  # positions whose logits exist at once
    log_every: Annotated[int, positive(), MAY_CHANGE] = 10  # steps from one line of the log to the next
    checkpoint_every: Annotated[int, positive(), MAY_CHANGE] = 500  # steps from one checkpoint to the next
    keep: Annotated[int, positive(), MAY_CHANGE] = 2  # newest checkpoints that stay
    keep_every: Annotated[int, count(), MAY_CHANGE] = 0  # checkpoints at every so many steps stay too
    # So many of the lowest held-out loss, or of the highest `evaluation.best`, stay too, saved at an evaluation
    keep_best: Annotated[int, count(), MAY_CHANGE] = 0
    max_bad_steps: Annotated[int, positive(), MAY_CHANGE] = 10  # steps without a finite loss, in a row; then the run stops
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # dtype of activations; parameters are float32
    # What steps multiply the kernels of the decoder's layers in; fp8 rounds operands to 8 bits, with one scale for each array
    matmul: Literal["compute_dtype", "fp8"] = "compute_dtype"
    # Dtype of parameters that do not train, where nothing has adapters; bfloat16 halves their memory
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    # What to do where a run goes on and its data changed
    changed_data: Annotated[Literal["refuse", "accept"], MAY_CHANGE] = "refuse"
    wandb: Annotated[str, MAY_CHANGE] = ""  # project that Weights & Biases shows the run in; empty = none
    weights: Annotated[str, MAY_CHANGE] = ""  # Hugging Face folder to start from, or a bare language model; empty = fresh ones
    tower: Annotated[str, MAY_CHANGE] = ""  # folder of the vision tower, where `weights` neither holds nor names one
    projector: Annotated[str, MAY_CHANGE] = ""  # mm_projector.bin or .safetensors, or a workdir, in place of that in `weights`


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and exact match by greedy decoding."""

    every: Annotated[int, Range(0, "0 (at the end only) or a number of steps")] = 0  # steps between evaluations
    examples: Annotated[int, positive()] = 128  # held-out examples; every answered turn of an example is one question
    batch_size: Annotated[int, positive(2**16)] = 64  # questions decoded at once
    max_new_tokens: Annotated[int, positive()] = 32  # longest answer
    samples: Annotated[int, count()] = 4  # answers shown in the log
    tasks: str = ""  # benchmarks of docs/evaluation.md that are asked too, as docvqa or seed:likelihood, between commas
    tasks_root: str = ""  # folder that holds a folder for every benchmark; empty = `data.root`
    task_rows: Annotated[int, count()] = 256  # first rows of each that are asked at an evaluation, 0 = all; at the end all are
    best: str = ""  # score that tells the best checkpoint, as docvqa/anls; empty = the held-out loss


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps for TensorBoard or Perfetto."""

    steps: str = ""  # steps to record, as 10:15 (FIRST:LAST); empty = none


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one may be -1 and takes what is left."""

    data: int = -1  # devices with all of the parameters each, and a part of the batch
    fsdp: int = 1  # devices with a part of the parameters and a part of the batch
    tensor: int = 1  # devices with a part of every layer's width


@dataclass(frozen=True, repr=False)
class Config:
    """Everything a run depends on."""

    name: Annotated[str, MAY_CHANGE] = "deepstack"  # name that logs show
    seed: Seed = 0  # seed of fresh parameters
    image: ImageConfig = field(default_factory=ImageConfig)
    vision: Annotated[VisionConfig, SECTIONS["vision"]] = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: Annotated[DecoderConfig, SECTIONS["decoder"]] = field(default_factory=DecoderConfig)
    deepstack: DeepStackConfig = field(default_factory=DeepStackConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: Annotated[EvaluationConfig, MAY_CHANGE] = field(default_factory=EvaluationConfig)
    mesh: Annotated[MeshConfig, MAY_CHANGE] = field(default_factory=MeshConfig)
    profile: Annotated[ProfileConfig, MAY_CHANGE] = field(default_factory=ProfileConfig)

    def __repr__(self) -> str:
        """In short: all keys are in `to_dict`."""
        data, train = self.data, self.train
        template, images = template_in_words(data.template), plural(data.max_images, "image")
        rows = f"template {template}, rows of {data.max_length}, {images} at most"
        how = f"{train.batch_size} examples a step, {train.compute_dtype}"
        return as_repr(f"Config {self.name}", {**parts_in_words(self), "data": rows, "train": how})

    @property
    def patch_side(self) -> int:
        """Patches along a side of a crop."""
        return self.image.size // self.vision.patch_size

    @property
    def layout(self) -> LayoutSpec:
        """Where every visual token of an image goes."""
        return self.deepstack.layout(self.image, self.patch_side)

    @property
    def projected(self) -> int:
        """Width of what the projector takes: the tower's, times the tokens that are joined along channels."""
        return self.vision.width * (1 + self.layout.groups if self.deepstack.into == "channels" else 1)

    @property
    def data_spec(self) -> DataSpec:
        """What `data` is given of all this."""
        return DataSpec(
            self.data, self.image, self.layout, self.decoder.vocab_size, self.train.batch_size, self.train.accumulation
        )
