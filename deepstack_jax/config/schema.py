"""Every key of a configuration with its default, but for those of the data, which stand in `data.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepstack_jax.batch import BatchShape
from deepstack_jax.config.data import DataConfig, DataSpec
from deepstack_jax.layout.grid import possible_grids
from deepstack_jax.layout.sequence import LayoutSpec
from deepstack_jax.layout.stack import layer_schedule

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes crops (paper section 3.1; `data/encode/image.py`)."""

    mode: str = "deepstack"  # deepstack | anyres | hd | pad | square
    size: int = 336  # side of a crop in pixels, equal to the vision tower's input
    num_crops: int = 4  # most cells of the crop grid
    grid: str = "best"  # best | square (upstream's `2xsample`)
    fit: str = "stretch"  # stretch | letterbox (upstream's `anyres_unpad`; the crops only)
    crop_filter: str = "bicubic"
    global_filter: str = "bicubic"  # bicubic | bilinear | lanczos | box | nearest
    pinpoints: tuple[tuple[int, int], ...] = ()  # anyres only: (width, height) in pixels
    merge: str = "flat"  # anyres only: flat | spatial | spatial_unpad, how the crops' tokens follow the global view's
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. The defaults are CLIP ViT-L/14-336. A family may add keys in a class of its own."""

    architecture: str = "clip"  # the family that builds it (`families/`)
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    activation: str = "quick_gelu"  # quick_gelu | gelu
    norm_eps: float = 1e-5
    feature_layer: int = -2  # index into the hidden states: -1 is the last layer's output, -2 the input of the last layer
    post_layers: int = 0  # layers behind the tower's own (upstream's `post_encoder`); with them the last one's output is used
    position_std: float = 0.02  # of freshly drawn position and CLS embeddings

    @property
    def layers_run(self) -> int:
        """Layers whose output is used: hidden state -2 is the input of the last layer."""
        if self.post_layers:
            return self.layers + self.post_layers
        return self.feature_layer if self.feature_layer >= 0 else self.layers + 1 + self.feature_layer


@dataclass(frozen=True)
class ProjectorConfig:
    """Linear maps with exact GELU between them, from vision width to decoder width."""

    layers: int = 2  # LLaVA-1.5's `mlp2x_gelu`; 1 is a plain linear map


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: angle i of position p is p / (factor_i * theta ** (2i / H)), cos and sin scaled together."""

    theta: float = 10000.0
    scaling: str = "none"  # none | linear | llama3 | longrope (Phi-3; upstream's `su`) | yarn (as upstream's Phi-3 has it)
    factor: float = 1.0  # linear and llama3: how much longer the context became
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_positions: int = 0  # all but linear: context before it was extended; the long factors are used beyond it
    short_factor: tuple[float, ...] = ()  # longrope and yarn: one per angle
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder. The defaults are Vicuna-7B v1.5. A family may add keys in a class of its own."""

    architecture: str = "llama"  # the family that builds it and names its tensors: llama | phi3 (`families/`)
    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp: int = 11008
    norm_eps: float = 1e-5
    max_positions: int = 4096  # longest context that the weights were trained for
    sliding_window: int = 0  # tokens that a token attends to, itself included; 0 = all before it
    rope: RopeConfig = field(default_factory=RopeConfig)
    scan: bool = True  # False unrolls the layers: slower to compile, equal results
    # What the backward pass recomputes: none | block (all of a layer) | dots (all but its matrix products) | offload (all of a
    # layer, whose input is kept in the host's memory)
    remat: str = "block"
    embed_std: float = 0.02  # of a freshly drawn token embedding
    head_std: float = 0.02  # of a freshly drawn head

    @property
    def tied_head(self) -> bool:
        """Whether the embeddings are the head too: one parameter, both uses. A family that can have it so makes it a key."""
        return False


@dataclass(frozen=True)
class DeepStackConfig:
    """What stands in the sequence, what is injected, and where (paper sections 3.2, 3.3 and 4.3)."""

    sequence: str = "global"  # global | zero | crops | global_crops (the last two: the paper's "string" of all tokens)
    stack: str = "crops"  # none | crops | dummy | global | global_crops
    sampling: str = "2d"  # 2d | 1d | grid
    start: int = 1  # group k is added at the input of layer start + k * interval
    interval: int = 1
    schedule: tuple[int, ...] = ()  # overrides start and interval: the group (or -1) of every layer
    into: str = "decoder"  # decoder (DeepStack-L) | vision (DeepStack-V: crops into the global view, inside the tower)
    vision_start: int = -1  # DeepStack-V: map j enters tower layer vision_start + j; -1 = half of the tower's layers
    pool: int = 1  # side of the squares of projected tokens that are averaged (upstream's `2d_scaledown` has 2)
    high_res: str = "crops"  # crops | view: one large picture under interpolated positions (upstream's `hires_local`)


@dataclass(frozen=True)
class OptimizerGroup:
    """One set of parameters that are updated alike. Which parameters: `OptimizerConfig.table`."""

    algorithm: str = "adamw"  # adamw | muon
    lr: float = 2e-5
    b1: float = 0.9  # Muon: its momentum
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    moment_dtype: str = "float32"  # float32 | bfloat16: of the first moment; the second is float32, as its squares ask for


@dataclass(frozen=True)
class ScheduleConfig:
    """The factor on every group's learning rate over the steps."""

    kind: str = "cosine"  # cosine (to `final`) | linear_tail (constant, then linear to `final` over the last `tail`)
    warmup: float = 0.03  # share of the steps
    final: float = 0.0
    tail: float = 0.25


@dataclass(frozen=True)
class OptimizerConfig:
    """`table` maps every parameter path to a group name or "frozen"; first match wins, a parameter left over is an error."""

    table: tuple[tuple[str, str], ...] = ((".*", "default"),)
    groups: dict[str, OptimizerGroup] = field(default_factory=lambda: {"default": OptimizerGroup()})
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 0  # 0 = from `epochs`
    epochs: float = 1.0
    batch_size: int = 128  # examples per optimizer step, over all hosts
    accumulation: int = 1  # micro-batches per step; the loss is normalised over all of them
    loss_chunk: int = 512  # positions whose logits exist at once
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # those at every so many steps stay too; 0 = none
    keep_best: int = 0  # so many of the lowest held-out loss stay too, of those saved at an evaluation
    max_bad_steps: int = 10  # steps in a row without a finite loss and gradient, after which the run stops
    compute_dtype: str = "bfloat16"  # of activations; parameters are float32
    frozen_dtype: str = "float32"  # float32 | bfloat16: of parameters that do not train; bfloat16 halves their memory
    changed_data: str = "refuse"  # refuse | accept: where a run goes on and its data is not what it was begun with
    wandb: str = ""  # project that Weights & Biases shows the run in; empty = none
    weights: str = ""  # Hugging Face folder to start from, a bare language model included; empty = draw fresh parameters
    tower: str = ""  # folder of the vision tower, where `weights` neither holds nor names one
    projector: str = ""  # an mm_projector.bin or mm_projector.safetensors, in place of the one in `weights`


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and exact match by greedy decoding."""

    every: int = 0  # steps between evaluations; 0 = at the end only
    examples: int = 128  # held-out examples; every answered turn of an example is one question
    batch_size: int = 64  # questions decoded at once
    max_new_tokens: int = 32
    samples: int = 4  # answers shown in the log


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps for TensorBoard or Perfetto."""

    steps: str = ""  # FIRST:LAST, as 10:15; empty = none


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    name: str = "deepstack"
    seed: int = 0
    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    deepstack: DeepStackConfig = field(default_factory=DeepStackConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def dtype(self) -> str:
        """dtype of activations."""
        return self.train.compute_dtype

    @property
    def patch_side(self) -> int:
        """Patches along a side of a crop."""
        return self.image.size // self.vision.patch_size

    @property
    def layout(self) -> LayoutSpec:
        """Where every visual token of an image goes."""
        image, stack = self.image, self.deepstack
        grids = possible_grids(
            image.mode, image.num_crops, square=image.grid == "square", pinpoints=image.pinpoints, size=image.size
        )
        side = self.patch_side // stack.pool
        return LayoutSpec(image.mode, side, image.num_crops, grids, stack.sampling, stack.sequence, stack.stack, image.merge)

    @property
    def data_spec(self) -> DataSpec:
        """What `data` is given of all this."""
        return DataSpec(
            self.data, self.image, self.layout, self.decoder.vocab_size, self.train.batch_size, self.train.accumulation
        )

    @property
    def groups(self) -> int:
        """J, the groups of the injected stack."""
        return self.layout.groups

    @property
    def visual_tokens_per_image(self) -> int:
        """Most sequence positions that one image takes."""
        return self.layout.max_tokens

    @property
    def views_per_image(self) -> int:
        """Most crop slots that one image takes."""
        return self.layout.max_views

    @property
    def images_per_row(self) -> int:
        """Images that a training row has room for."""
        return self.data_spec.images_per_row

    @property
    def crop_slots(self) -> int:
        """C, crops that a training row has room for, global views included."""
        return self.images_per_row * self.views_per_image

    @property
    def newline(self) -> bool:
        """Whether the model has an `image_newline`: upstream makes one where a mosaic may want it."""
        return self.image.mode == "hd" or self.image.merge == "spatial_unpad"

    @property
    def vision_schedule(self) -> tuple[int, ...]:
        """DeepStack-V: the group added at the input of each tower layer, or -1; empty where nothing enters the tower.

        The feature is the input of layer `vision.layers_run`; what would enter behind that is left out.
        """
        if self.deepstack.into != "vision":
            return ()
        layers, start = self.vision.layers + self.vision.post_layers, self.deepstack.vision_start
        schedule = layer_schedule(layers, self.groups, self.vision.layers // 2 if start < 0 else start, 1)
        return tuple(group if layer <= self.vision.layers_run else -1 for layer, group in enumerate(schedule))

    @property
    def schedule(self) -> tuple[int, ...]:
        """The group injected at the input of each decoder layer, or -1."""
        if self.deepstack.schedule:
            return self.deepstack.schedule
        if self.deepstack.into == "vision":
            return (-1,) * self.decoder.layers
        return layer_schedule(self.decoder.layers, self.groups, self.deepstack.start, self.deepstack.interval)

    def batch_shape(self, rows: int, length: int) -> BatchShape:
        """Static sizes of a training batch of `rows` rows padded to `length`."""
        return self.data_spec.batch_shape(rows, length)
