"""cuDNN's attention over packed rows, computed on a CPU from what jax hands to the custom call, as cuDNN documents it.

Every segment is read from the flat memory of q, k and v at its offset, which counts elements. What no segment writes is NaN.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused  # the primitives have no public name
from jax._src.interpreters import mlir


def _places(offsets, lengths, like):
    """Flat index of every element of every segment, [segments, T, heads, H]; out of range behind a segment's end."""
    length, heads, width = like.shape[1:]
    start = offsets.reshape(-1)[: lengths.size]
    steps = jnp.arange(length)
    rows = start[:, None] + steps * heads * width
    rows = jnp.where(steps < lengths.reshape(-1)[:, None], rows, 2 * like.size)
    return rows[..., None, None] + jnp.arange(heads)[:, None] * width + jnp.arange(width)


def _attention(q, k, v, lengths, q_offsets, kv_offsets, scale, window):
    read = {"mode": "fill", "fill_value": 0}
    to, at = _places(q_offsets, lengths, q), _places(kv_offsets, lengths, k)
    queries, (keys, values) = q.reshape(-1).at[to].get(**read), (x.reshape(-1).at[at].get(**read) for x in (k, v))
    keys, values = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (keys, values))
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys, preferred_element_type=jnp.float32) * scale
    t, s = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    visible = (s <= t) & (t - s < (window or q.shape[1])) & (s < lengths.reshape(-1)[:, None, None, None])
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1).astype(q.dtype)
    out = jnp.full(q.size, jnp.nan, q.dtype).at[to].set(jnp.einsum("bnts,bsnh->btnh", weights, values), mode="drop")
    return out.reshape(q.shape)


def _forward(q, k, v, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, *_, scale, sliding_window_length, is_training, **__):
    assert bias.size == 0
    out = _attention(q, k, v, q_seqlen, q_offsets, kv_offsets, scale, sliding_window_length)
    stats = jnp.zeros((q_seqlen.size, q.shape[2], q.shape[1]), jnp.float32)
    return [out, stats] if is_training else [out]


def _backward(q, k, v, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, *rest, scale, sliding_window_length, **_):
    def forward(q, k, v):
        return _attention(q, k, v, q_seqlen, q_offsets, kv_offsets, scale, sliding_window_length)

    return list(jax.vjp(forward, q, k, v)[1](rest[-1]))


def install(monkeypatch) -> None:
    """Let this process' CPU stand for a Hopper GPU with cuDNN."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    for primitive, emulation in (
        (fused._dot_product_attention_fwd_p, _forward),
        (fused._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(emulation, multiple_results=True), platform="cpu")
