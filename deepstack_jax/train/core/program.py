"""What a run computes, put together once from its configuration and mesh; nothing of it is traced or placed yet.

`train` runs it, and whoever wants to know what it costs lowers the very same step for devices that are not here.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from deepstack_jax.batch import Batch, empty_batch
from deepstack_jax.config import Config
from deepstack_jax.errors import ConfigError
from deepstack_jax.families.build import build_model
from deepstack_jax.model.deepstack import DeepStack
from deepstack_jax.model.fp8 import FP8
from deepstack_jax.model.layers import PLAIN, Rounding
from deepstack_jax.model.quantised import QuantisedKernel, boxed_quantised, quantise
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.compiler import compiler_options
from deepstack_jax.parallel.kernels import Kernels, attentions, kernels_for, most_segments
from deepstack_jax.parallel.mesh import check_model_fits
from deepstack_jax.parallel.rules import batch_sharding, crop_shards, param_shardings, replicated, shards_of
from deepstack_jax.train.checkpoint.checksums import base_checksum
from deepstack_jax.train.core.optimizer import (
    adapt_groups,
    assign_groups,
    base_paths,
    flatten,
    make_optimizer,
    make_schedule,
    matrix_axes,
    unflatten,
)
from deepstack_jax.train.core.state import new_state, state_shardings
from deepstack_jax.train.core.step import LossSums, ModelFns, StepFn, make_loss, make_train_step
from deepstack_jax.types import PyTree, TrainState
from deepstack_jax.weights.adapters import boxed_adapters, fresh_adapters
from deepstack_jax.weights.names import NameTable

QUANTISED = ("int8", "nf4")


@dataclass(frozen=True)
class Program:
    """A run's model, optimizer and step, and where every leaf of its state lies.

    Attributes:
      kernels: of training attention.
      sample: a blank batch of one row, enough to trace the model.
      shapes: the abstract parameters, as they are drawn or read.
      places: their shardings; `shardings` has those of what is kept of them.
      sizes: elements of every parameter, by path.
      groups: optimizer group of every parameter, or "frozen".
      adapted: kernels that have a LoRA adapter, which trains in their place.
      shardings: of every leaf of the state.
      functions: the model as functions of parameters.
      loss: (params, batch) -> LossSums, of the model as it is used: `train.matmul` rounds nothing in it.
      step: the train step as a pure function.
    """

    config: Config
    mesh: Mesh
    kernels: Kernels
    model: DeepStack
    sample: Batch
    shapes: PyTree
    places: PyTree
    sizes: dict[str, int]
    groups: dict[str, str]
    adapted: tuple[str, ...]
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    shardings: TrainState
    functions: ModelFns
    loss: Callable[[PyTree, Batch], LossSums]
    step: StepFn

    @property
    def base(self) -> frozenset[str]:
        """Parameters that nothing changes and no checkpoint holds: all that is frozen, where anything is adapted."""
        return base_paths(self.groups) if self.adapted else frozenset()

    @property
    def frozen_dtype(self) -> str:
        """Of what does not train and is not quantised."""
        kind = self.config.lora.base_dtype if self.adapted else self.config.train.frozen_dtype
        return "bfloat16" if kind in QUANTISED else kind

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored to and a step is compiled for."""
        state = jax.eval_shape(self.begin, self.shapes)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, self.shardings)

    def abstract_batch(self, rows: int, length: int) -> Batch:
        """The same of a global batch of `rows` rows of `length` positions; ids as the device sees them (i32)."""
        shape = self.config.data_spec.batch_shape(1, length)  # one row is made, not a batch of pixels
        place = batch_sharding(self.mesh)

        def describe(array: np.ndarray) -> jax.ShapeDtypeStruct:
            dtype = np.dtype(np.int32) if array.dtype == np.int64 else array.dtype
            return jax.ShapeDtypeStruct((rows, *array.shape[1:]), dtype, sharding=place)

        return Batch(*map(describe, empty_batch(shape)))

    def draw(self, key: jax.Array) -> PyTree:
        """Parameters drawn from a seed. They do not depend on the mesh: jax's random bits are the same under any sharding."""
        params = flatten(nn.unbox(self.model.init(key, self.sample))["params"])
        return unflatten(params | self.draw_adapters(key))

    def draw_adapters(self, key: jax.Array) -> dict[str, jax.Array]:
        """Adapters that change nothing yet, by path; none where nothing is adapted."""
        return fresh_adapters(self.adapted, self.config, key)

    def keep(self, path: str, leaf: jax.Array) -> jax.Array | QuantisedKernel:
        """A parameter as the state has it, but for its dtype: quantised, where `lora.base_dtype` says so."""
        place = flatten(self.shardings.params)[path]
        if not isinstance(place, QuantisedKernel):
            return leaf
        return quantise(leaf, NameTable(self.config).leaves[path].inputs, place.kind, packed=place.packed is not None)

    def begin(self, params: PyTree, checksum: jax.Array | None = None) -> TrainState:
        """The state before the first step.

        Args:
          checksum: of the base, where `params` have been through `keep`.
        """
        flat = flatten(params)
        if self.base and checksum is None:
            checksum = base_checksum({path: flat[path] for path in self.base})
            params = unflatten({path: self.keep(path, leaf) for path, leaf in flat.items()})
        return new_state(params, self.groups, self.optimizer, self.frozen_dtype, checksum)

    def jit_begin(self) -> jax.stages.Wrapped:
        """`begin` under jit: the parameters' buffers become the state's, beside which they would exist a second time.

        Parameters that are to be quantised have been already.
        """
        return jax.jit(self.begin, donate_argnums=0, out_shardings=self.shardings)

    def jit_step(self) -> jax.stages.Wrapped:
        """The step under jit: the old state's buffers are reused, the metrics are on every device."""
        outs = self.shardings, replicated(self.mesh)
        return jax.jit(self.step, donate_argnums=0, out_shardings=outs, compiler_options=compiler_options(self.mesh))


def quantised_paths(adapted: tuple[str, ...], base: frozenset[str], config: Config) -> frozenset[str]:
    """Of the base the kernels that are quantised: those of the decoder's layers, nearly all of a model."""
    kind = config.lora.base_dtype
    if not adapted or kind not in QUANTISED:
        return frozenset()
    if importlib.util.find_spec("qwix") is None:
        raise ConfigError(f"config.lora.base_dtype={kind!r} needs qwix, which is not installed: pip install '.[quantised]'")
    return frozenset(path for path in base if path.startswith("layers/layers/") and path.endswith("/kernel"))


def rounding_for(config: Config, mesh: Mesh) -> Rounding:
    """What a step rounds the operands of the decoder's products to.

    Raises:
      ConfigError: fp8 on devices that multiply no such numbers. CPUs compute the same in their own way, slowly.
    """
    if config.train.matmul != "fp8":
        return PLAIN
    device = mesh.devices.flat[0]
    kind = device.device_kind
    if device.platform == "gpu":
        found = re.fullmatch(r"(\d+)\.(\d+)", device.compute_capability)  # AMD's have a name, not a number
        able = found is not None and (int(found[1]), int(found[2])) >= (8, 9)
    else:
        able = device.platform == "cpu" or (kind in CHIPS and CHIPS[kind].fp8 > 0)
    if not able:
        raise ConfigError(no_fp8(kind))
    return FP8


def no_fp8(kind: str) -> str:
    able = ", ".join(name for name, chip in CHIPS.items() if chip.fp8)
    return f"config.train.matmul='fp8': {kind} has no products in fp8; these have: {able}; drop config.train.matmul"


def model_functions(model: DeepStack) -> ModelFns:
    """What the step needs of it."""
    needed = ["embed" if model.decoder.tied_head else "head"] + ["image_newline"] * model.newline  # which every call reads
    return ModelFns(
        hidden=lambda params, batch: model.apply({"params": params}, batch).hidden,
        logits=lambda params, hidden: model.apply({"params": params}, hidden, method="logits"),
        head=lambda params: {name: params[name] for name in needed},
    )


def build_program(config: Config, mesh: Mesh, steps: int, kernels: Kernels | None = None) -> Program:
    """Put together what a run of `steps` steps computes, on devices that are here or on descriptions of some that are not.

    Args:
      kernels: of attention; None = those that `kernels_for` chooses for the mesh's devices.

    Raises:
      ConfigError: parameters that no group covers, or sizes that do not divide over the mesh.
    """
    check_model_fits(config.decoder, config.vision, mesh)
    kernels = kernels or kernels_for(mesh.devices.flat[0].platform, config)
    attend = attentions(kernels, mesh, most_segments(config))
    build = partial(build_model, config, *attend, crop_shards=crop_shards(mesh))
    model, trained = build(), build(rounding=rounding_for(config, mesh))
    sample = empty_batch(config.data_spec.batch_shape(1, config.data.max_length))
    drawn = flatten(jax.eval_shape(model.init, jax.random.key(config.seed), sample)["params"])
    groups, adapted = adapt_groups(assign_groups(list(drawn), config.optimizer.table), config.optimizer)
    boxed = unflatten(drawn | boxed_adapters({path: drawn[path] for path in adapted}, config))
    shapes = nn.unbox(boxed)
    base = base_paths(groups) if adapted else frozenset()
    kept = flatten(boxed)
    for path in quantised_paths(adapted, base, config):
        inputs, boxes = NameTable(config).leaves[path].inputs, kept[path]
        packed = boxes.value.shape[inputs] % (2 * shards_of(mesh, boxes.names[inputs])) == 0  # half of it is cut as it was
        kept[path] = boxed_quantised(boxes, inputs, config.lora.base_dtype, packed=packed)
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in flatten(shapes).items()}
    held = param_shardings(mesh, unflatten(kept))
    schedule = make_schedule(config.optimizer.schedule, steps)
    optimizer = make_optimizer(config.optimizer, groups, schedule, matrix_axes(NameTable(config).leaves))
    functions = model_functions(model)
    accumulation, chunk = config.train.accumulation, config.train.loss_chunk
    return Program(
        config=config,
        mesh=mesh,
        kernels=kernels,
        model=model,
        sample=sample,
        shapes=shapes,
        places=param_shardings(mesh, boxed),
        sizes=sizes,
        groups=groups,
        adapted=adapted,
        schedule=schedule,
        optimizer=optimizer,
        shardings=state_shardings(mesh, held, shapes, groups, optimizer, adapted=bool(adapted)),
        functions=functions,
        loss=make_loss(functions, chunk),
        step=make_train_step(model_functions(trained), optimizer, groups, schedule, accumulation=accumulation, chunk=chunk),
    )
