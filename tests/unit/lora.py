"""The tiny model with adapters over decoder and tower, a projector that trains whole, and all else frozen."""

from __future__ import annotations

from typing import Any

TABLE = (
    (r"^(layers|vision_tower)/.*block/.*kernel$", "adapters"),
    (r"^projector/", "default"),
    (r".*", "frozen"),
)
ADAMW = {"algorithm": "adamw", "lr": 0.05, "eps": 0.01, "b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "moment_dtype": "float32"}
LORA: dict[str, Any] = {
    "optimizer.table": TABLE,
    "optimizer.groups": {"default": ADAMW | {"lora": False}, "adapters": ADAMW | {"lora": True}},
    "lora.rank": 4,
    "lora.alpha": 8.0,
    "lora.base_dtype": "float32",
}
