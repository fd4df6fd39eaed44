"""Which parameter is updated how: a total regex table, one optax transformation per group, frozen parameters left out whole."""

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, muon

from deepstack_jax.config import OptimizerConfig, OptimizerGroup, ScheduleConfig
from deepstack_jax.errors import ConfigError
from deepstack_jax.weights.adapters import adapter_paths, is_adapter
from deepstack_jax.weights.names import ParameterLeaf

FROZEN = "frozen"


def flatten(params: Any) -> dict[str, Any]:
    """Nested parameters as {"a/b/c": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def split(params: Any, groups: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) of nested parameters, each by path."""
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if groups[path] != FROZEN}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def assign_groups(paths: list[str], table: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Group of every parameter path; the first pattern found in the path (re.search) wins.

    Raises:
      ConfigError: naming the parameters that no pattern covers, or the patterns that cover nothing: a misspelt pattern would
        silently train, or freeze, the wrong weights.
    """
    groups, used = {}, set()
    for path in paths:
        for row, (pattern, group) in enumerate(table):
            if re.search(pattern, path):
                groups[path] = group
                used.add(row)
                break
    left = [path for path in paths if path not in groups]
    if left:
        raise ConfigError(f"config.optimizer.table covers no group for {', '.join(left)}; add a row for them")
    idle = [pattern for row, (pattern, _) in enumerate(table) if row not in used]
    if idle:
        raise ConfigError(f"config.optimizer.table rows {idle} match no parameter; parameters are e.g. {', '.join(paths[:4])}")
    return groups


def adapt_groups(groups: dict[str, str], config: OptimizerConfig) -> tuple[dict[str, str], tuple[str, ...]]:
    """Groups with the adapters in them, and the kernels that have one: such a kernel is frozen, its adapter in its group.

    Raises:
      ConfigError: a group of adapters has parameters that are no kernels of linear maps.
    """
    lora = {name for name, group in config.groups.items() if group.lora}
    adapted = tuple(path for path, group in groups.items() if group in lora)
    wrong = [path for path in adapted if not path.endswith("/kernel")]
    if wrong:
        raise ConfigError(
            f"config.optimizer.table sends {', '.join(wrong)} to {groups[wrong[0]]!r}, a group with lora=True, but only "
            "kernels have adapters; let the pattern end in /kernel$, and a later row send the rest elsewhere, e.g. to 'frozen'"
        )
    groups = dict(groups)
    for path in adapted:
        a, b, scale = adapter_paths(path)
        groups |= {a: groups[path], b: groups[path], scale: FROZEN, path: FROZEN}
    return groups, adapted


def base_paths(groups: dict[str, str]) -> frozenset[str]:
    """What is frozen and belongs to no adapter."""
    return frozenset(path for path, group in groups.items() if group == FROZEN and not is_adapter(path))


def matrix_axes(leaves: Mapping[str, ParameterLeaf]) -> dict[str, MuonDimensionNumbers]:
    """Which axes of every kernel are its inputs and which its outputs, as Muon needs them: each layer's matrix by itself."""
    kernels = {path: (leaf, tuple(range(leaf.stacked, len(leaf.shape)))) for path, leaf in leaves.items() if leaf.inputs}
    return {path: MuonDimensionNumbers(axes[: leaf.inputs], axes[leaf.inputs :]) for path, (leaf, axes) in kernels.items()}


def make_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Factor on the learning rates at each of `steps` steps; 1 at the top."""
    warmup = min(round(config.warmup * steps), steps - 1)  # at least one step at the top
    if config.kind == "cosine":
        rise = optax.linear_schedule(0.0, 1.0, max(1, warmup))
        fall = optax.cosine_decay_schedule(1.0, steps - warmup, config.final)
        return optax.join_schedules([rise, fall], [warmup])
    tail = max(1, round(config.tail * steps))
    rise = optax.linear_schedule(1 / (warmup + 1), 1.0, max(1, warmup))
    fall = optax.linear_schedule(1.0, config.final, tail)
    return optax.join_schedules([rise, optax.constant_schedule(1.0), fall], [warmup, max(warmup, steps - tail)])


def make_optimizer(
    config: OptimizerConfig,
    groups: dict[str, str],
    schedule: optax.Schedule,
    axes: Mapping[str, MuonDimensionNumbers] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """The transformation over the flat dict of *trainable* parameters: clip by global norm, then each group's own update.

    Args:
      axes: of every kernel, see `matrix_axes`; Muon needs them.

    Raises:
      ConfigError: nothing trains, or Muon is to train what is not a matrix.
    """
    used = set(groups.values()) - {FROZEN}
    if not used:
        raise ConfigError("config.optimizer.table freezes every parameter; nothing would train")
    muon_groups = {name for name in used if config.groups[name].algorithm == "muon"}
    if wrong := [path for path, name in groups.items() if name in muon_groups and path not in axes]:
        raise ConfigError(
            f"config.optimizer.table sends {wrong[0]} to a Muon group, but it is not a matrix; send it to an adamw group"
        )
    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: _group_transform(config.groups[name], schedule, axes) for name in used
    }
    labels = {path: group for path, group in groups.items() if group != FROZEN}
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.partition(transforms, labels))


def _group_transform(
    group: OptimizerGroup, schedule: optax.Schedule, axes: Mapping[str, MuonDimensionNumbers]
) -> optax.GradientTransformation:
    def learning_rate(step: Any) -> Any:
        return group.lr * schedule(step)

    def axes_of(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: axes[path[0].key], params)

    if group.algorithm == "muon":
        return muon(
            learning_rate,
            beta=group.b1,
            eps=group.eps,
            mu_dtype=group.moment_dtype,
            weight_decay=group.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: axes[path[0].key], params
            ),
        )
    return optax.adamw(
        learning_rate, group.b1, group.b2, group.eps, mu_dtype=group.moment_dtype, weight_decay=group.weight_decay
    )


def main_learning_rate(config: OptimizerConfig, groups: dict[str, str], sizes: dict[str, int]) -> float:
    """Learning rate, at the schedule's top, of the group that most parameters belong to."""
    members: dict[str, int] = defaultdict(int)
    for path, group in groups.items():
        if group != FROZEN:
            members[group] += sizes[path]
    return config.groups[max(members, key=lambda group: members[group])].lr


def describe_groups(
    config: OptimizerConfig, groups: dict[str, str], sizes: dict[str, int]
) -> list[tuple[str, str, str, int, int]]:
    """Rows (group, algorithm, lr, tensors, parameters) for the table printed at the start of a run."""
    members: dict[str, list[str]] = defaultdict(list)
    for path, group in groups.items():
        members[group].append(path)
    rows = []
    for name, paths in members.items():
        group = None if name == FROZEN else config.groups[name]
        kind, lr = ("-", "-") if group is None else (group.algorithm, f"{group.lr:g}")
        rows.append((name, kind, lr, len(paths), sum(sizes[path] for path in paths)))
    return rows
