"""FLOPs of a step counted from its configuration, against XLA's count of the lowered and the compiled step."""

import jax
import pytest

from deepstack_jax.config import Config, MeshConfig, build_config, default_config
from deepstack_jax.model import layers
from deepstack_jax.parallel.chips import CHIPS
from deepstack_jax.parallel.mesh import make_mesh
from deepstack_jax.parallel.rules import use_mesh
from deepstack_jax.train.core.optimizer import FROZEN
from deepstack_jax.train.core.program import Program, build_program
from deepstack_jax.train.flops import Flops, step_flops
from tests.unit.lora import LORA
from tests.unit.tiny import FAMILIES, tiny_config

# Wide enough that the matrix products outweigh the rest, which only XLA counts.
WIDE = {
    "image.size": 16,
    "vision.width": 64,
    "vision.layers": 4,
    "vision.mlp": 256,
    "decoder.vocab_size": 512,
    "decoder.width": 128,
    "decoder.head_dim": 32,
    "decoder.mlp": 256,
    "decoder.scan": False,
    "data.max_length": 64,
    "data.max_images": 2,
    "train.loss_chunk": 48,
}
CASES = {
    "all trains": {},
    "nothing recomputed": {"decoder.remat": "none"},
    "attention kept": {"decoder.remat": "minimal"},
    "frozen tower": {"optimizer.table": (("^vision_tower/", FROZEN), (".*", "default"))},
    "stage 1": {"optimizer.table": (("^projector/", "default"), (".*", FROZEN))},
    "head only": {"optimizer.table": (("^head/", "default"), (".*", FROZEN))},
    "some kernels": {
        "optimizer.table": (("attention/[qv]/", "default"), ("vision_tower/positions", "default"), (".*", FROZEN))
    },
    "LoRA": LORA | {"lora.rank": 16},
    "LoRA of the decoder": LORA | {"lora.rank": 16, "optimizer.table": (("^layers/.*kernel$", "adapters"), (".*", FROZEN))},
    "V": {"image.grid": "square", "deepstack.into": "vision", "deepstack.vision_start": 0},
    "HD": {"image.mode": "hd", "image.merge": "spatial_unpad", "data.max_length": 128, "data.max_images": 1},
    "one large view": {"image.grid": "square", "deepstack.high_res": "view"},
    "pooled": {"deepstack.pool": 2},
    "joined along channels": {"deepstack.into": "channels"},
}
# A wider MLP, since XLA counts the norms of heads and SigLIP's activation too.
OF_FAMILIES = {name: changes | {"image.size": 16, "decoder.mlp": 512} for name, changes in FAMILIES.items()}
ADAPTED = {f"LoRA over {name}": changes | LORA | {"lora.rank": 16} for name, changes in OF_FAMILIES.items()}
# One of all families in the short suite.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in [*OF_FAMILIES, *ADAPTED] if name != next(iter(ADAPTED))]
ROWS = 8


def program_of(config: Config) -> Program:
    return build_program(config, make_mesh(MeshConfig(), jax.devices()[:1]), steps=10)


def flops_of(config: Config, **more) -> Flops:
    return step_flops(config, program_of(config).groups, ROWS, config.data.max_length, **more)


def part(flops: Flops, name: str):
    return next(part for part in flops.parts if part.name == name)


@pytest.fixture
def unrolled(monkeypatch):
    """Every scan unrolled, as XLA counts the body of a loop once; gathers as gathers, whose transposes have no FLOPs."""
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *args, **kwargs: scan(*args, **kwargs | {"unroll": True}))
    monkeypatch.setattr(layers, "ONE_HOT_LIMIT", 0)


def lower(program: Program) -> jax.stages.Lowered:
    length = program.config.data.max_length
    with use_mesh(program.mesh):
        return program.jit_step().lower(program.abstract_state(), program.abstract_batch(ROWS, length))


@pytest.mark.parametrize("case", [*CASES, next(iter(ADAPTED)), *SLOW])
def test_executed_flops_are_those_that_xla_counts(case, unrolled):
    config = tiny_config(WIDE | (CASES | OF_FAMILIES | ADAPTED)[case])
    counted = lower(program_of(config)).cost_analysis()["flops"]
    # XLA counts norms, softmax and activations too: 2 to 3% at these widths, never less than the products alone.
    assert 0.96 < flops_of(config).executed / counted < 1


def test_executed_flops_are_those_of_the_compiled_step(unrolled):
    config = tiny_config(WIDE | CASES["frozen tower"])
    counted = lower(program_of(config)).compile().cost_analysis()["flops"]
    assert 0.95 < flops_of(config).executed / counted < 1


def test_recomputing_adds_to_executed_flops_only():
    kept, recomputed = (flops_of(tiny_config(WIDE | {"decoder.remat": remat})) for remat in ("none", "block"))
    assert kept.model == recomputed.model
    assert kept.executed < recomputed.executed < kept.executed * 4 / 3


def test_a_frozen_tower_has_no_backward_pass_and_a_frozen_decoder_no_weight_gradients():
    frozen_tower, stage_1 = (flops_of(tiny_config(WIDE | CASES[case])) for case in ("frozen tower", "stage 1"))
    assert part(frozen_tower, "tower").backward == 0
    assert part(frozen_tower, "tower").executed == part(frozen_tower, "tower").forward
    assert part(frozen_tower, "decoder").backward == 2 * part(frozen_tower, "decoder").forward
    assert part(stage_1, "decoder").backward == part(stage_1, "decoder").forward
    assert part(flops_of(tiny_config(WIDE | CASES["head only"])), "attention").backward == 0


def test_the_last_tower_layer_is_not_counted():
    used = flops_of(tiny_config(WIDE))
    more = flops_of(tiny_config(WIDE | {"vision.layers": 5, "vision.feature_layer": -3}))
    assert part(used, "tower") == part(more, "tower")


def test_packed_attention_counts_the_squares_of_its_segments():
    config = tiny_config(WIDE)
    whole, halves = flops_of(config), flops_of(config, squares=ROWS * 2 * 32**2)
    assert part(halves, "attention").model == part(whole, "attention").model / 2
    assert part(halves, "attention").executed == part(whole, "attention").executed
    assert part(flops_of(config, masked=False), "attention").executed < part(whole, "attention").executed


@pytest.mark.parametrize(
    ("layers", "width", "heads", "mlp", "billions"), [(32, 4096, 32, 11008, 6.738), (40, 5120, 40, 13824, 13.016)]
)
def test_published_rule_of_six_flops_per_parameter_and_token(layers, width, heads, mlp, billions):
    """6 N T, and 6 L T^2 D of causal attention (PaLM, appendix B, halved for the triangle), at the published sizes."""
    source = default_config()
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads, "mlp": mlp}
    source.update_from_flattened_dict({f"decoder.{key}": value for key, value in sizes.items()})
    config = build_config(source)
    flops = flops_of(config)
    tokens = ROWS * config.data.max_length
    language = part(flops, "decoder").model + part(flops, "head").model
    assert language == pytest.approx(6 * billions * 1e9 * tokens, rel=0.02)  # N holds the embedding, which is looked up
    assert part(flops, "attention").model == pytest.approx(6 * layers * config.data.max_length * width * tokens)
    # The rule again, for 23 layers of 12 E^2 parameters over 5 crops of 577 tokens, all of which see each other.
    each = 23 * (6 * 12 * 1024**2 + 12 * 577 * 1024)
    assert part(flops, "tower").model == pytest.approx(each * ROWS * 5 * 577, rel=0.005)


def test_chips_are_those_that_jax_names():
    assert {"TPU v5 lite", "TPU v5", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "NVIDIA H200"} <= set(CHIPS)
    for chip in CHIPS.values():
        assert 50e12 < chip.flops < 3e15
        assert 50 < chip.flops / chip.hbm_bandwidth < 1000  # FLOPs per byte of any chip on the market
