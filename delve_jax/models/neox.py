"""GPT-NeoX (arXiv 2204.06745): rotary attention, exact-GELU MLP, parallel or sequential residual.

parallel (Pythia): x <- x + attn(ln1 x) + mlp(ln2 x);  sequential (INCITE): one after the other.
State: the caches of `attention.py`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ..config import NeoxConfig
from .attention import angles_and_mask, attend, flops, frequencies, init_caches
from .linear import Linear, Norm, routed

FACTORABLE = ("att/qkv", "att/out", "mlp/up", "mlp/down")
MLP = ("mlp/up", "mlp/down")  # the last reads the neurons that the others make
RESIDUAL = {"att/out": "in", "mlp/down": "out"}
NORM = "layer"
KEEP_WIDE = ()


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU as PyTorch computes it: with jax.nn.gelu's erfc XLA:CPU takes 1.3 to 1.5 times
    as long, gradient included (results/forms_cpu.json)."""
    return 0.5 * x * (1 + lax.erf(x * 0.5**0.5))


class Attention(nn.Module):
    """Causal attention; `state` None (training) or this layer's k and v caches."""

    cfg: NeoxConfig

    @nn.compact
    def __call__(self, h_BTD, state, ctx):
        cfg = self.cfg
        b, T, d = h_BTD.shape
        qkv = Linear(3 * d, cfg.factored("att/qkv"), cfg.use_bias, name="qkv")(h_BTD)
        # columns are head-major, [q | k | v] inside each head
        q, k, v = jnp.moveaxis(qkv.reshape(b, T, cfg.n_heads, 3, d // cfg.n_heads), 3, 0)
        y, state = attend(q, k, v, state, ctx)
        init = nn.initializers.normal(0.02 / (2 * cfg.n_layers) ** 0.5)
        out = Linear(d, cfg.factored("att/out"), cfg.use_bias, init, name="out")
        return out(y.reshape(b, T, d)), state


class Mlp(nn.Module):
    """down(gelu(up(h))) with the exact (erf) GELU."""

    cfg: NeoxConfig

    @nn.compact
    def __call__(self, h_BTD):
        cfg = self.cfg
        up = Linear(cfg.d_ffn, cfg.factored("mlp/up"), True, name="up")
        init = nn.initializers.normal(0.02 / (2 * cfg.n_layers) ** 0.5)
        down = Linear(cfg.d_model, cfg.factored("mlp/down"), True, init, name="down")
        return down(gelu(up(h_BTD)))


class Block(nn.Module):
    """One residual layer."""

    cfg: NeoxConfig

    @nn.compact
    def __call__(self, x_BTD, state, ctx):
        cfg = self.cfg
        ln1 = Norm("layer", cfg.norm_eps, name="ln1")
        ln2 = Norm("layer", cfg.norm_eps, name="ln2")
        att, state = Attention(cfg, name="att")(ln1(x_BTD), state, ctx)
        mlp = Mlp(cfg, name="mlp")
        if cfg.parallel_residual:
            return x_BTD + att + routed(mlp, ctx, ln2(x_BTD)), state
        x_BTD = x_BTD + att
        return x_BTD + routed(mlp, ctx, ln2(x_BTD)), state


def init_layers(cfg: NeoxConfig, layers: dict, key: jax.Array) -> dict:
    """Nothing beyond the modules' own initialisers."""
    return layers


def init_state(cfg: NeoxConfig, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """Empty caches for `max_len` tokens."""
    return init_caches(cfg, batch, max_len, cfg.n_heads, cfg.d_model // cfg.n_heads, dtype)


def mixer_flops(cfg: NeoxConfig, T: int) -> int:
    """Of a token and layer, beside its maps: attention over the full T."""
    return flops(T, cfg.n_heads, cfg.d_model // cfg.n_heads)


def context(
    cfg: NeoxConfig, x_BTD, mask_BT=None, state=None, segments_BT=None
) -> tuple[dict, dict]:
    """Rotary angles and attention mask of this call, and the state's advanced bookkeeping."""
    rotated = int(cfg.d_model // cfg.n_heads * cfg.rotary_pct)
    freq = frequencies(cfg.rotary_base, rotated)
    return angles_and_mask(freq, x_BTD, mask_BT, state, segments_BT)
