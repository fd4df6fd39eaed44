"""What a configuration must satisfy before anything is built from it: choices, ranges, and combinations that cannot run."""

import math
import re
import warnings
from collections.abc import Iterator

from deepstack_jax.config.fields import leaves
from deepstack_jax.config.schema import TAPPED, Config, DeepStackConfig, OptimizerConfig, RopeConfig
from deepstack_jax.errors import ConfigError, nearest
from deepstack_jax.layout.grid import anyres_grids
from deepstack_jax.printing import label, plural, quote

# At most: of a model, of the visual tokens of a row, of the pixels of a batch, of the crops of an image.
PARAMETERS, TOKENS, BYTES, CROPS = 10**13, 2**24, 2**40, 1024
DEEPSTACK = DeepStackConfig()


def check_config(config: Config) -> None:
    """Refuse what cannot run, with the numbers that clash and the next move."""
    for problem in _problems(config):
        raise ConfigError(problem)


def _problems(config: Config) -> Iterator[str]:
    """A message for everything that is wrong. A check may rely on those before it, so all but the first may mislead."""
    yield from filter(None, (leaf.problem() for leaf in leaves(config, Config)))
    yield from _in_optimizer(config.optimizer)
    yield from _in_image(config)
    yield from _in_products(config)
    yield from _in_data(config)
    yield from _in_sizes(config)
    yield from _in_train(config)
    yield from _in_rope(config.decoder.rope, config.decoder.head_dim // 2)
    yield from _in_deepstack(config)
    yield from _in_taps(config)
    if config.deepstack.into == "vision":
        yield from _in_vision_injection(config)
    elif config.deepstack.into != "decoder":
        yield from _in_fusion(config)


def _in_optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    for pattern, name in optimizer.table:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"config.optimizer.table holds {quote(pattern)}, which is not a regular expression: {error}"
        if name not in (valid := {*optimizer.groups, "frozen"}):
            yield f"config.optimizer.table sends {quote(pattern)} to {quote(name)}; {nearest(name, valid)}"
    for name, group in optimizer.groups.items():
        if group.lora and group.algorithm != "adamw":
            yield f"config.optimizer.groups.{label(name)} has lora=True with algorithm={group.algorithm!r}, expected 'adamw'"


def _in_products(config: Config) -> Iterator[str]:
    """Products of sizes, each possible by itself, that no machine could hold."""
    image, vision, decoder, layout = config.image, config.vision, config.decoder, config.layout
    projector = config.projector.layers * decoder.width * max(decoder.width, vision.width)
    sizes = {"decoder": decoder.parameters, "vision": vision.parameters, "projector": projector}
    for section, size in sizes.items():
        if size > PARAMETERS:
            yield f"config.{section} has {size:.1e} parameters, expected at most {PARAMETERS:.0e}; lower its layers or widths"
    views = layout.max_views
    tokens = views * config.patch_side**2 * (1 + layout.groups)
    pixels = config.train.batch_size * config.data.max_images * views * image.size**2 * 3
    if tokens > TOKENS:
        yield (
            f"config.image (size {image.size}, num_crops {image.num_crops}) with config.vision.patch_size {vision.patch_size} "
            f"gives an image {tokens:,} visual tokens in its {1 + layout.groups} groups, expected at most {TOKENS:,}; lower "
            "image.size or num_crops"
        )
    if image.kind.grids == "pinpoints" and views > 1 + CROPS:
        yield f"config.image.pinpoints give an image {views:,} crops, expected at most {1 + CROPS:,}"
    if pixels > BYTES:
        yield (
            f"config.train.batch_size {config.train.batch_size} with {config.data.max_images * views:,} crops of "
            f"{image.size} x {image.size} for each example are {pixels / 1e9:,.0f} GB of pixels, expected at most "
            f"{BYTES / 1e9:,.0f}; lower batch_size, data.max_images, image.size or num_crops"
        )


def _in_sizes(config: Config) -> Iterator[str]:
    image, vision, decoder, data, train = config.image, config.vision, config.decoder, config.data, config.train
    divisible = (
        ("image.size", 0 if vision.cuts_edge else image.size, "vision.patch_size", vision.patch_size),
        ("vision.width", vision.width, "vision.heads", vision.heads),
        ("decoder.heads", decoder.heads, "decoder.kv_heads", decoder.kv_heads),
        # Packed rows are as many as split; their number follows from the lengths.
        ("train.batch_size", 0 if data.packing.enabled else train.batch_size, "train.accumulation", train.accumulation),
    )
    for name, value, by, divisor in divisible:
        if value % divisor:
            near = max(1, value // divisor) * divisor
            yield f"config.{name} {value} is not divisible by config.{by} {divisor}; nearest valid: {near}"
    if decoder.head_dim % 2:
        yield f"config.decoder.head_dim {decoder.head_dim} is odd; rotary positions turn pairs, choose an even number"
    if not -vision.layers - 1 <= vision.feature_layer <= vision.layers:
        yield f"config.vision.feature_layer {vision.feature_layer} is outside a tower of {vision.layers} layers"
    if any(bucket > data.max_length for bucket in data.buckets):
        yield f"config.data.buckets {quote(data.buckets)} go beyond config.data.max_length {data.max_length}"
    each = config.layout.max_tokens
    if (needed := each * data.max_images) >= data.max_length:
        yield (
            f"{plural(data.max_images, 'image')} of {each} tokens take {needed} positions; raise "
            f"config.data.max_length {data.max_length} above {needed}"
        )


def _in_train(config: Config) -> Iterator[str]:
    """How long a run lasts, what it keeps and what it records."""
    train, steps = config.train, config.profile.steps
    if train.steps < 0 or (train.steps == 0 and not 0 < train.epochs < math.inf):
        yield f"config.train.steps {train.steps} with epochs {train.epochs} trains nothing; set one of them above 0"
    if train.keep_best and not config.evaluation.every:
        yield f"config.train.keep_best {train.keep_best} needs a held-out loss to tell the best by; set config.evaluation.every"
    if config.evaluation.best and not config.evaluation.tasks:
        yield f"config.evaluation.best {quote(config.evaluation.best)} is a score of a task; set config.evaluation.tasks"
    if steps and not (
        re.fullmatch(r"\d{1,10}:\d{1,10}", steps, re.ASCII) and 0 < int(steps.split(":")[0]) <= int(steps.split(":")[1])
    ):
        yield f"config.profile.steps got {quote(steps)}, expected FIRST:LAST from step 1 on, as 10:15"


def _in_data(config: Config) -> Iterator[str]:
    """The sets of a mixture, as far as is seen before a file is opened; rows of several examples, which have one length."""
    data, packing = config.data, config.data.packing
    for rows, cols in (*data.cards.grids, *data.cards.unseen):
        if rows % 2 and cols % 2:
            yield f"config.data.cards has the grid {rows}x{cols}: one side must be even, or digits show in the low-res view"
    if not data.cards.grids:
        yield "config.data.cards.grids is empty; name at least one (rows, cols), as ((2, 2),)"
    for name, entry in data.sets.items():
        where, beginning = f"config.data.sets.{label(name)}", "the beginning of a path below the image root, as 'coco/'"
        if not entry.file:
            yield f"{where}.file is empty; name the file or folder of its rows, relative to config.data.root"
        paths = {"keep_images": entry.keep_images, "drop_images": entry.drop_images}
        for key, value in ((key, value) for key, values in paths.items() for value in values):
            if not value or value.startswith(("/", "./")):
                yield f"{where}.{key} holds {quote(value)}, expected {beginning}"
        if "" in entry.keep_sources:
            yield f"{where}.keep_sources holds '', expected a data_source"
    if packing.enabled and data.buckets:
        yield (
            f"config.data.buckets {quote(data.buckets)} with packing, whose rows are all {data.max_length} long; set buckets=()"
        )
    if packing.enabled and packing.max_images < data.max_images:
        yield (
            f"config.data.packing.max_images {packing.max_images} is below config.data.max_images {data.max_images}: an "
            f"example could need more than a row has; use at least {data.max_images}"
        )


def _in_image(config: Config) -> Iterator[str]:
    """The image mode, and what of the method it can carry."""
    image, stack = config.image, config.deepstack
    fewest = 1 if image.grid == "square" else 2
    if image.kind.stacks_crops and image.num_crops < fewest:
        yield f"config.image.num_crops {image.num_crops} leaves no crop grid; use {fewest} or more, or config.image.mode='pad'"
    if ("crops" in stack.stack or "crops" in stack.sequence) and not image.kind.stacks_crops:
        yield (
            f"config.deepstack (sequence={stack.sequence!r}, stack={stack.stack!r}) needs crops, but config.image.mode="
            f"{image.mode!r} makes none; use config.image.mode='deepstack' or config.deepstack.stack='none'"
        )
    if image.kind.upsampled and "crops" in stack.sequence:
        yield (
            f"config.deepstack.sequence={stack.sequence!r} with config.image.mode={image.mode!r}, whose cells are there "
            "already; use config.deepstack.sequence='global'"
        )
    if image.kind.grids == "pinpoints":
        if stack.stack_of_views != "none" or stack.sequence != "global":
            yield (
                f"config.image.mode={image.mode!r} is LLaVA-NeXT, which injects nothing of its crops; got "
                f"sequence={stack.sequence!r}, stack={stack.stack!r}; set config.deepstack.stack='none' or 'taps', or use "
                "config.image.mode='hd'"
            )
        try:
            anyres_grids(image.pinpoints, image.size)
        except ValueError as error:
            yield f"config.image.pinpoints: {error}"
    fixed_grid = image.kind.stacks_crops and not image.kind.upsampled and image.grid == "square"
    if stack.high_res == "view" and image.size % config.vision.patch_size:
        yield "config.deepstack.high_res='view' needs crops whose patches fill them; use config.deepstack.high_res='crops'"
    if stack.high_res == "view" and not fixed_grid:
        yield (
            "config.deepstack.high_res='view' joins the crops of one square grid; set config.image.mode='deepstack' and "
            "config.image.grid='square'"
        )
    if stack.pool > 1 and (image.kind.mosaic or stack.high_res == "view"):
        yield (
            f"config.deepstack.pool {stack.pool} averages the tokens of single crops; it goes with config.image.mode "
            "'deepstack', 'pad', 'square' or 'stretch' and config.deepstack.high_res='crops'"
        )
    if config.patch_side < stack.pool:
        yield f"config.deepstack.pool {stack.pool} is larger than the {config.patch_side} tokens of a crop's side"


def _in_rope(rope: RopeConfig, half: int) -> Iterator[str]:
    """Scaled rotary positions need their numbers.

    Args:
      half: of the width of a head, the angles.
    """
    if rope.scaling in ("longrope", "yarn"):
        for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
            if len(factors) != half:
                yield (
                    f"config.decoder.rope.{name} has {len(factors)} entries, expected head_dim / 2 = {half} for "
                    f"scaling {rope.scaling!r}"
                )
            if not all(0 < factor < math.inf for factor in factors):
                yield f"config.decoder.rope.{name} holds {min(factors)}, expected numbers above 0"
    if rope.scaling == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        yield (
            f"config.decoder.rope.low_freq_factor {rope.low_freq_factor} and high_freq_factor {rope.high_freq_factor}: "
            "expected numbers above 0, the second above the first"
        )
    if rope.scaling in ("longrope", "yarn", "llama3") and rope.original_positions < 2:
        yield (
            f"config.decoder.rope.original_positions is {rope.original_positions}; scaling {rope.scaling!r} needs the context "
            "length that the weights had before it was extended"
        )
    if rope.scaling in ("linear", "llama3") and not rope.factor >= 1:
        yield f"config.decoder.rope.factor {rope.factor} shortens the context; expected at least 1"


def _in_vision_injection(config: Config) -> Iterator[str]:
    """DeepStack-V (paper section 3.3): a fixed square of crops enters the tower, nothing enters the decoder."""
    image, stack, vision, groups = config.image, config.deepstack, config.vision, config.layout.groups
    wanted = {
        "image.mode": (image.mode, "deepstack"),
        "image.grid": (image.grid, "square"),
        "deepstack.stack": (stack.stack, "crops"),
        "deepstack.sequence": (stack.sequence, "global"),
        "deepstack.sampling": (stack.sampling, "2d"),
        "deepstack.high_res": (stack.high_res, "crops"),
        "deepstack.pool": (stack.pool, 1),
        "image.num_crops": (image.num_crops, max(2, math.isqrt(image.num_crops)) ** 2),
    }
    wrong = [f"config.{key} is {got!r}, set it to {want!r}" for key, (got, want) in wanted.items() if got != want]
    if wrong:
        yield f"config.deepstack.into='vision' needs a fixed square of crops: {'; '.join(wrong)}"
    last = vision.layers + vision.post_layers - 1
    if stack.vision_start >= vision.layers and vision.post_layers == 0:
        yield (
            f"config.deepstack.vision_start {stack.vision_start} lies after the tower's {vision.layers} layers; lower it, or "
            "add layers with config.vision.post_layers=5"
        )
    if stack.vision_start > last:
        yield f"config.deepstack.vision_start {stack.vision_start} is beyond the last layer {last}; lower it"
    if unused := groups - sum(group >= 0 for group in stack.tower_schedule(vision, groups)):
        warnings.warn(
            f"{unused} of {groups} maps fall after the tower layer whose input is the feature ({vision.layers_run}), "
            f"never used (config.deepstack.vision_start {stack.vision_start})",
            stacklevel=5,
        )


def _in_fusion(config: Config) -> Iterator[str]:
    """All groups at once, into the sequence's tokens."""
    stack = config.deepstack
    wanted = {"taps": (stack.taps, ()), "schedule": (stack.schedule, ()), "pool": (stack.pool, 1)}
    unused = ("start", "interval", "vision_start")
    wanted |= {"high_res": (stack.high_res, "crops")} | {key: (getattr(stack, key), getattr(DEEPSTACK, key)) for key in unused}
    wrong = [f"config.deepstack.{key} is {got!r}, set it to {want!r}" for key, (got, want) in wanted.items() if got != want]
    if stack.stack_of_views == "none":
        wrong.append("config.deepstack.stack gives no groups, set it to 'crops'")
    if config.image.kind.upsampled:
        wrong.append(f"config.image.mode is {config.image.mode!r}, set it to 'deepstack'")
    if wrong:
        yield f"config.deepstack.into={stack.into!r} takes the groups of the views alone: {'; '.join(wrong)}"


def _in_deepstack(config: Config) -> Iterator[str]:
    layers, stack, every = config.decoder.layers, config.deepstack, config.layout.groups
    groups = every - len(stack.taps)
    if "crops" in stack.sequence and stack.stack_of_views != "none":
        yield f"config.deepstack.sequence={stack.sequence!r} already holds the crops; set config.deepstack.stack='none'"
    if stack.schedule:
        if len(stack.schedule) != layers:
            yield f"config.deepstack.schedule names {len(stack.schedule)} layers, config.decoder.layers is {layers}"
        if max(stack.schedule) >= groups or min(stack.schedule) < -1:
            yield f"config.deepstack.schedule {quote(stack.schedule)} goes beyond the groups 0..{groups - 1}"
        return
    if stack.start < 0:
        yield f"config.deepstack.start {stack.start} is negative; the first layer is 0"
    if stack.into != "decoder":
        return
    if groups and stack.start >= layers:
        yield (
            f"config.deepstack.start {stack.start} lies beyond the {layers} decoder layers 0..{layers - 1}; "
            "nothing would be injected; lower it, or set config.deepstack.stack='none'"
        )
    if unused := groups - sum(group >= 0 for group in stack.views_schedule(layers, every)):
        warnings.warn(
            f"{unused} of {groups} groups fall past the last of {layers} layers, never used "
            f"(config.deepstack.start {stack.start}, interval {stack.interval})",
            stacklevel=5,
        )


def _in_taps(config: Config) -> Iterator[str]:
    """Hidden states that the tower has, into layers that the decoder has, each of which gets one group at most."""
    stack, vision, image, layers = config.deepstack, config.vision, config.image, config.decoder.layers
    if bool(stack.taps) != (stack.stack in TAPPED):
        yield (
            f"config.deepstack.stack={stack.stack!r} with config.deepstack.taps {quote(stack.taps)}: expected pairs of a "
            "hidden state and a decoder layer, as ((9, 1), (17, 2)), with stack='taps' or 'crops_taps', and () otherwise"
        )
    if not stack.taps:
        return
    most, taken = vision.layers + vision.post_layers, stack.views_schedule(layers, config.layout.groups)
    for state, layer in stack.taps:
        if not 0 <= vision.layers_before(state) <= most:
            yield f"config.deepstack.taps holds the hidden state {state}, expected {-vision.layers - 1}..{most} of this tower"
        if layer >= layers:
            yield f"config.deepstack.taps holds the decoder layer {layer}, expected 0..{layers - 1}"
    into = [layer for _, layer in stack.taps]
    if twice := {layer for layer in into if into.count(layer) > 1 or taken[layer] >= 0}:
        yield (
            f"config.deepstack: {plural(len(twice), 'decoder layer')} would get two groups: "
            f"{', '.join(map(str, sorted(twice)))}; give each tap a layer of its own, away from the crops' "
            "(config.deepstack.start, interval or schedule)"
        )
    if stack.sequence == "crops":
        yield "config.deepstack.taps belong to the global view, which sequence='crops' leaves out; use sequence='global_crops'"
    if stack.pool > 1:
        yield f"config.deepstack.taps do not go with config.deepstack.pool {stack.pool}; set pool=1"
    if stack.stack == "taps" and "crops" not in stack.sequence and image.kind.stacks_crops and not image.kind.mosaic:
        warnings.warn(
            f"config.deepstack.stack='taps' uses the global view alone, and config.image.mode={image.mode!r} encodes crops "
            "beside it for nothing; config.image.mode='stretch' gives the same global view without them",
            stacklevel=5,
        )
