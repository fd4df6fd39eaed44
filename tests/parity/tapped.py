"""What modules of transformers compute of a small model with taps; `python -m tests.parity.tapped` records it in tests/golden.

CLIP's tower, Qwen3-VL's merger where no patches are joined (spatial_merge_size 1), and the decoder of Granite 4 Vision, which
adds its groups at the inputs of layers: with its four multipliers off it is LLaMA's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.families.base import TOWER
from deepstack_jax.families.build import build_model
from deepstack_jax.weights.names import NameTable
from tests.unit.tiny import example, make_batch, model_params, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "taps.npz"
MERGERS = "model.deepstack_mergers."


def case() -> tuple[Config, Batch, Any]:
    """Two rows with an image each, the first longer; two hidden states, one after the feature layer, into layers 1 and 3."""
    changes = {"image.mode": "stretch", "deepstack.stack": "taps", "deepstack.taps": ((1, 1), (-1, 3)), "data.max_images": 1}
    config = tiny_config(changes)
    batch = make_batch(config, [[example(config, 0, [None], words=9)], [example(config, 1, [None])]])
    return config, batch, model_params(build_model(config), batch)


def official_tensors(config: Config, params: Any) -> dict[str, np.ndarray]:
    """The parameters by their names in a folder."""
    table, leaves = NameTable(config), traverse_util.flatten_dict(jax.device_get(params), sep="/")
    return {name: np.ascontiguousarray(table.theirs(name, leaves)) for name in table.tensors}


def reference() -> dict[str, np.ndarray]:
    """`state_k` f32[B, P, E] of the tower, `merged_k` f32[B, P, D] and `hidden` f32[B, T, D] after the final norm, by torch."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.granite4_vision.modeling_granite4_vision import Granite4VisionTextConfig, Granite4VisionTextModel
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    config, batch, params = case()
    tensors = {name: torch.tensor(tensor) for name, tensor in official_tensors(config, params).items()}
    vision, decoder = config.vision, config.decoder

    def under(start: str) -> dict[str, Any]:
        return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}

    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=vision.width, intermediate_size=vision.mlp, num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads, image_size=config.image.size, patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
        )
    )  # fmt: skip
    inside = under(TOWER)
    own = tower.state_dict().keys()
    tower.load_state_dict(inside if inside.keys() == own else {k.removeprefix("vision_model."): v for k, v in inside.items()})
    language = Granite4VisionTextModel(
        Granite4VisionTextConfig(
            vocab_size=decoder.vocab_size, hidden_size=decoder.width, intermediate_size=decoder.mlp,
            num_hidden_layers=decoder.layers, num_attention_heads=decoder.heads, num_key_value_heads=decoder.kv_heads,
            rms_norm_eps=decoder.norm_eps, max_position_embeddings=decoder.max_positions, embedding_multiplier=1.0,
            residual_multiplier=1.0, attention_multiplier=decoder.head_dim**-0.5, logits_scaling=1.0,
        )
    )  # fmt: skip
    names = language.state_dict()
    language.load_state_dict({name: tensors[f"model.{name}"] for name in names})
    pixels = (batch.pixels[:, 0].astype(np.float32) * (1 / 255) - np.float32(config.image.mean)) / np.float32(config.image.std)
    found: dict[str, Any] = {}
    with torch.no_grad():
        states = tower.eval()(torch.tensor(np.moveaxis(pixels, -1, 1)), output_hidden_states=True).hidden_states
        visual = torch.tensor(batch.visual_index >= 0)
        projector = torch.nn.Sequential(
            torch.nn.Linear(vision.width, decoder.width), torch.nn.GELU(), torch.nn.Linear(decoder.width, decoder.width)
        )
        projector.load_state_dict(under("model.mm_projector."))
        x = language.embed_tokens(torch.tensor(batch.tokens))
        x[visual] = projector(states[vision.feature_layer][:, 1:]).flatten(0, 1)
        groups = {}
        for number, (state, layer) in enumerate(config.deepstack.taps):
            sizes = {"hidden_size": vision.width, "spatial_merge_size": 1, "out_hidden_size": decoder.width}
            merger = Qwen3VLVisionPatchMerger(Qwen3VLVisionConfig(**sizes), use_postshuffle_norm=True)
            merger.load_state_dict(under(f"{MERGERS}{number}."))
            found[f"state_{number}"] = states[state][:, 1:].contiguous()
            merged = merger(found[f"state_{number}"])
            found[f"merged_{number}"] = merged.reshape(len(x), -1, decoder.width)
            groups[layer] = merged
        mask = visual[..., None]
        found["hidden"] = language.eval()(
            inputs_embeds=x, position_ids=torch.arange(x.shape[1])[None], vision_mask=mask, deepstack_features=groups
        ).last_hidden_state
    return {name: array.numpy() for name, array in found.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **reference())  # type: ignore[arg-type]
