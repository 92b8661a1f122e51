"""Qwen3 (arXiv 2505.09388), as Delphi uses it: RMSNorm, attention with QK-norm, SwiGLU, no biases.

x <- x + o(attn(q, k, v));  x <- x + down(silu(gate h) * up h),  h = RMSNorm(x) before each.
q and k are normalised per head before the full rotary embedding. State: the caches of
`attention.py`, of the G key/value heads. Initialisation: design notes, delphi.md section 5.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ..config import Qwen3Config
from .attention import angles_and_mask, attend, flops, frequencies, init_caches
from .linear import Linear, Norm, routed, truncated

FACTORABLE = ("att/q", "att/k", "att/v", "att/o", "mlp/gate", "mlp/up", "mlp/down")
MLP = ("mlp/gate", "mlp/up", "mlp/down")  # the last reads the neurons that the others make
RESIDUAL = {"att/o": "in", "mlp/down": "out"}
NORM = "rms"
KEEP_WIDE = ()


class Attention(nn.Module):
    """Causal attention of H query and G key/value heads; `state` None or this layer's caches."""

    cfg: Qwen3Config

    @nn.compact
    def __call__(self, h_BTD, state, ctx):
        cfg = self.cfg
        b, T, d = h_BTD.shape
        heads = lambda name, n: Linear(  # noqa: E731
            n * cfg.head_dim, cfg.factored(f"att/{name}"), False, truncated(d**-0.5), name=name
        )(h_BTD).reshape(b, T, n, cfg.head_dim)
        norm = lambda name: Norm("rms", cfg.norm_eps, name=name)  # noqa: E731
        q_BTHh = norm("q_norm")(heads("q", cfg.n_heads))
        k_BTGh = norm("k_norm")(heads("k", cfg.n_kv_heads))
        y, state = attend(q_BTHh, k_BTGh, heads("v", cfg.n_kv_heads), state, ctx)
        inner = cfg.n_heads * cfg.head_dim
        out = Linear(d, cfg.factored("att/o"), False, truncated(inner**-0.5), name="o")
        return out(y.reshape(b, T, inner)), state


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(h)) * up(h))."""

    cfg: Qwen3Config

    @nn.compact
    def __call__(self, h_BTD):
        cfg = self.cfg
        lin = lambda name, n_in, n_out: Linear(  # noqa: E731
            n_out, cfg.factored(f"mlp/{name}"), False, truncated(n_in**-0.5), name=name
        )
        gate, up = (lin(name, cfg.d_model, cfg.d_ffn)(h_BTD) for name in ("gate", "up"))
        return lin("down", cfg.d_ffn, cfg.d_model)(nn.silu(gate) * up)


class Block(nn.Module):
    """One residual layer."""

    cfg: Qwen3Config

    @nn.compact
    def __call__(self, x_BTD, state, ctx):
        cfg = self.cfg
        att, state = Attention(cfg, name="att")(
            Norm("rms", cfg.norm_eps, name="ln1")(x_BTD), state, ctx
        )
        x_BTD = x_BTD + att
        h_BTD = Norm("rms", cfg.norm_eps, name="ln2")(x_BTD)
        return x_BTD + routed(Mlp(cfg, name="mlp"), ctx, h_BTD), state


def init_layers(cfg: Qwen3Config, layers: dict, key) -> dict:
    """Nothing beyond the modules' own initialisers: no scaling with depth."""
    return layers


def init_state(cfg: Qwen3Config, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """Empty caches for `max_len` tokens."""
    return init_caches(cfg, batch, max_len, cfg.n_kv_heads, cfg.head_dim, dtype)


def mixer_flops(cfg: Qwen3Config, T: int) -> int:
    """Of a token and layer, beside its maps: attention over the full T."""
    return flops(T, cfg.n_heads, cfg.head_dim)


def rope_frequencies(cfg: Qwen3Config) -> np.ndarray:
    """Radians per position of each pair, float64; Llama 3's scaling slows the low frequencies.

    With wavelengths beyond original / low all by `factor`, below original / high not at all.
    """
    freq = frequencies(cfg.rope_theta, cfg.head_dim)
    if cfg.rope_scaling is None:
        return freq
    factor, low, high, original = cfg.rope_scaling
    share = (original * freq / (2 * np.pi) - low) / (high - low)
    share = np.clip(share, 0, 1)  # 1: unchanged
    return (1 - share) * freq / factor + share * freq


def context(
    cfg: Qwen3Config, x_BTD, mask_BT=None, state=None, segments_BT=None
) -> tuple[dict, dict]:
    """Rotary angles and attention mask of this call, and the state's advanced bookkeeping."""
    return angles_and_mask(rope_frequencies(cfg), x_BTD, mask_BT, state, segments_BT)
