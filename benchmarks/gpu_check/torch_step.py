"""The step of stage `step` in PyTorch: transformers' modules, the same parameters, batch and rule, bfloat16 by autocast.

Master weights, gradients and moments are float32 and the residual stream bfloat16, as in the package; decoder layers are
checkpointed where the memory asks for it; the tower is frozen and without gradient. Attention is flash attention over
segments (`varlen_attn`) where it runs, else SDPA under a mask. This process leaves the GPU to torch: jax runs on the CPU.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.decode import llama_config
from benchmarks.gpu_check.programs import SPREAD, config_of, kind_of, packed_batch, seed_of
from benchmarks.gpu_check.record import AbsentError, Record, target
from benchmarks.gpu_check.step import CHECKED, WARM
from deepstack_jax.batch import Batch
from deepstack_jax.config import Config
from deepstack_jax.families.base import TOWER

EAGER, COMPILED = 1.3, 1.0  # times torch's samples/s, to reach
SECOND = 60  # seconds that the compiled form may take


def torch_or_absent() -> Any:
    """The module.

    Raises:
      AbsentError: it is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports] (not a requirement)
    except ImportError as error:
        raise AbsentError("torch is not installed; see benchmarks/gpu_check/requirements.txt") from error
    return torch


def run(record: Record) -> None:
    """Eager, then compiled, each beside the package's step."""
    torch = torch_or_absent()
    ours = record.figures_of("step", "step")
    config = config_of(record.size, {"decoder.layers": ours["layers"], "decoder.remat": ours["remat"]})
    peer = Peer(torch, config, packed_batch(config, record.size.rows))
    forms = {"eager": EAGER, "compiled": COMPILED}
    for name, wanted in forms.items():
        if name == "compiled" and (record.left() < SECOND or not torch.cuda.is_available()):
            continue
        compiled = name == "compiled"
        try:
            peer.begin(compiled=compiled)
            found = measure(peer, record.size.repeats)
        except torch.OutOfMemoryError:
            found = None
        if found is None:
            peer.checkpointed = True
            peer.begin(compiled=compiled)
            found = measure(peer, record.size.repeats)
        apart = [abs(a - b) for a, b in zip(found["losses"], ours["losses"], strict=True)]
        faster = ours["s/step"] / found["s/step"]  # of the same arithmetic
        rates = {key: ours[key] * faster if ours[key] else None for key in ("TFLOP/s", "MFU", "of the best product")}
        record.add(name, found | rates | {"losses differ by": apart, "torch": torch.__version__})
        ratio = ours["samples/s"] / found["samples/s"]
        record.add(f"goal: samples/s, ours / torch {name}", target(ratio, wanted))


def measure(peer: Peer, repeats: int) -> dict[str, Any]:
    """Losses of the first steps, and what the others took."""
    losses = [peer.step() for _ in range(CHECKED)]
    for _ in range(WARM):
        peer.step()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        peer.step()
        seconds.append(time.perf_counter() - began)
    taken = float(np.median(seconds))
    batch = peer.batch
    return {
        "s/step": taken,
        "samples/s": int((batch.example_id >= 0).sum()) / taken,
        "tokens/s": float((batch.segment_ids > 0).sum()) / taken,
        "attention": peer.attention,
        "checkpointed": peer.checkpointed,
        "peak, GiB": peer.peak(),
        "losses": losses,
        "seconds": seconds,
    }


def hashed(torch: Any, seed: int, count: int, device: str) -> Any:
    """float32 [count], the same to the bit as `programs.hashed`."""
    low = 0xFFFFFFFF
    mixed = (torch.arange(count, dtype=torch.int64, device=device) * 2654435761 + seed) & low
    mixed = ((mixed ^ (mixed >> 16)) * 2246822507) & low
    mixed = mixed ^ (mixed >> 13)
    return ((mixed >> 8).float() * 2.0**-24 - 0.5) * float(np.float32(SPREAD))


class Peer:
    """The model, its optimizer and one batch on torch's device.

    Attributes:
      attention: "varlen" or "sdpa".
      checkpointed: whether layers are recomputed in the backward pass, as where the memory does not hold what they keep.
    """

    def __init__(self, torch: Any, config: Config, batch: Batch) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

        self.torch, self.config, self.batch = torch, config, batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        tower = config.vision
        with torch.device(self.device):
            self.decoder = LlamaForCausalLM(llama_config(config.decoder))
            self.tower = CLIPVisionModel(
                CLIPVisionConfig(
                    hidden_size=tower.width,
                    intermediate_size=tower.mlp,
                    num_hidden_layers=tower.layers_run,
                    num_attention_heads=tower.heads,
                    image_size=config.image.size,
                    patch_size=tower.patch_size,
                )
            )
            width = config.decoder.width
            linear = torch.nn.Linear
            self.projector = torch.nn.Sequential(linear(tower.width, width), torch.nn.GELU(), linear(width, width))
        self.tower.requires_grad_(False)
        self.trained = [*self.decoder.parameters(), *self.projector.parameters()]
        group = next(iter(config.optimizer.groups.values()))
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=group.lr, betas=(group.b1, group.b2), eps=group.eps, weight_decay=group.weight_decay, fused=True
        )
        self._place()
        self.attention = self._choose_attention()
        self.layers: list[Callable[..., Any]] = []
        self.checkpointed = False

    def begin(self, *, compiled: bool) -> None:
        """The state before the first step, and the layers in the form that is measured next."""
        table = ((self.decoder, ""), (self.projector, "model.mm_projector."), (self.tower, f"{TOWER}vision_model."))
        for module, prefix in table:
            self._fill(module, prefix)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        layers = self.decoder.model.layers
        self.layers = list(layers)
        if compiled:
            # They are compiled one by one, and would else fall back to eager unseen after a few.
            self.torch._dynamo.config.recompile_limit = 64
            self.layers = [self.torch.compile(layer) for layer in layers]
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """GiB that tensors took at once since `begin`; None on a CPU."""
        return self.torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None

    def _fill(self, module: Any, prefix: str) -> None:
        """Parameters that are a function of their official names."""
        torch = self.torch
        with torch.no_grad():
            for name, leaf in module.named_parameters():
                full = prefix + name
                kind = kind_of(full)
                if kind == "hashed":
                    leaf.copy_(hashed(torch, seed_of(full), leaf.numel(), self.device).view(leaf.shape))
                else:
                    leaf.fill_(float(kind == "ones"))

    def _place(self) -> None:
        torch, batch = self.torch, self.batch
        self.given = {
            name: torch.from_numpy(np.asarray(value).astype(np.int64)).to(self.device)
            for name, value in batch._asdict().items()
            if name not in ("pixels", "loss_weights")
        }
        self.pixels = torch.from_numpy(batch.pixels).to(self.device)
        self.weights = torch.from_numpy(batch.loss_weights).to(self.device)
        self.visual = self.given["visual_index"] >= 0
        self.at = self.given["visual_index"].clamp(min=0)
        self.rows = torch.arange(len(batch.tokens), device=self.device)[:, None]
        segments = self.given["segment_ids"]
        length = segments.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        self.mask = ((segments[:, :, None] == segments[:, None]) & causal)[:, None]
        starts = np.diff(batch.segment_ids, axis=1, prepend=-1) != 0
        flat = np.append(np.flatnonzero(starts.ravel()), starts.size).astype(np.int32)
        self.starts, self.longest = torch.from_numpy(flat).to(self.device), int(np.diff(flat).max())

    def _choose_attention(self) -> str:
        """Flash attention of each segment by itself, tried once with its gradient; else SDPA."""
        torch = self.torch
        name = "sdpa"
        if self.device == "cuda":
            try:
                from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

                self.windows = "window_size" in inspect.signature(varlen_attn).parameters
                cfg = self.config.decoder
                shape = (len(self.batch.tokens), cfg.heads, self.batch.tokens.shape[1], cfg.head_dim)
                q = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                self._varlen(None, q, q, q, None)[0].float().sum().backward()
                name = "varlen"
            except (
                Exception
            ) as error:  # of whatever kind: this torch or this GPU has no such kernel, and the peer has another way
                print(f"  varlen_attn does not run here, SDPA does: {str(error).splitlines()[0][:120]}", flush=True)
        if name == "varlen":
            from transformers import AttentionInterface

            AttentionInterface.register("packed_varlen", self._varlen)
            self.decoder.config._attn_implementation = "packed_varlen"
            self.mask = None
        return name

    def _varlen(self, module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[Any, None]:
        """Of q, k, v [B, N, T, H]: [B, T, N, H]."""
        from torch.nn.attention.varlen import varlen_attn  # pyright: ignore[reportMissingImports]

        rows, heads, length, width = q.shape
        q, k, v = (x.transpose(1, 2).reshape(rows * length, -1, width).to(self.torch.bfloat16) for x in (q, k, v))
        # Older releases of torch have another word for it.
        causal: dict[str, Any] = {"window_size": (-1, 0)} if self.windows else {"is_causal": True}
        out = varlen_attn(q, k, v, self.starts, self.starts, self.longest, self.longest, **causal)
        return out.view(rows, length, heads, width), None

    def _loss(self) -> Any:
        torch, config = self.torch, self.config
        with torch.autocast(self.device, torch.bfloat16):
            tokens = self._visual_tokens()
            embeds = self.decoder.model.embed_tokens(self.given["tokens"]).to(torch.bfloat16)
            sequence = tokens[self.rows, self.given["token_source"]]
            hidden = torch.where(self.visual[..., None], sequence[self.rows, self.at], embeds)
            positions = self.given["positions"]
            rotary = self.decoder.model.rotary_emb(hidden.float(), positions)
            schedule = config.deepstack.decoder_schedule(config.decoder.layers, config.layout.groups)
            for layer, group in zip(self.layers, schedule, strict=True):
                if group >= 0:
                    source = self.given["stack_source"][:, group]
                    added = torch.where((source >= 0)[..., None], tokens[self.rows, source.clamp(min=0)], 0)
                    hidden = hidden + torch.where(self.visual[..., None], added[self.rows, self.at], 0)
                given = {"attention_mask": self.mask, "position_ids": positions, "position_embeddings": rotary}
                if self.checkpointed:
                    hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False, **given)
                else:
                    hidden = layer(hidden, **given)
            hidden = self.decoder.model.norm(hidden)
            return sum(self._head(*part) for part in self._chunks(hidden)) / self.weights.sum()

    def _visual_tokens(self) -> Any:
        """[B, C * P, D]: features of all crop slots, projected."""
        torch, image = self.torch, self.config.image
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (image.mean, image.std))
        with torch.no_grad():
            pixels = (self.pixels.flatten(0, 1).permute(0, 3, 1, 2).float() / 255 - mean) / std
            features = self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        return self.projector(features).reshape(len(self.rows), -1, self.config.decoder.width)

    def _chunks(self, hidden: Any) -> Iterator[tuple[Any, Any, Any]]:
        """The positions in as many parts as the package makes."""
        chunk = self.config.train.loss_chunk
        parts = [x.split(chunk, dim=1) for x in (hidden, self.given["targets"], self.weights)]
        return zip(*parts, strict=True)

    def _head(self, hidden: Any, targets: Any, weights: Any) -> Any:
        """The loss of some positions, whose logits are made again in the backward pass."""

        def loss(hidden: Any) -> Any:
            logits = self.decoder.lm_head(hidden).float().flatten(0, 1)
            losses = self.torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
            return (losses * weights.flatten()).sum()

        return self.torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)

    def step(self) -> float:
        """One update; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_norm)
        self.optimizer.step()
        value = loss.item()  # waits for the device
        if not math.isfinite(value):
            raise ValueError(f"torch's loss is {value}")
        return value
