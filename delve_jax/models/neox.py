"""GPT-NeoX (arXiv 2204.06745): rotary attention, exact-GELU MLP, parallel or sequential residual.

parallel (Pythia): x <- x + attn(ln1 x) + mlp(ln2 x);  sequential (INCITE): one after the other.
State: k, v [L,B,S,H,h] caches, `index` tokens written, `pos_B` next position of each row and
`valid_BS` (False where a row is left-padded). S is fixed: `LM.step` grows it when it is full.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from ..config import NeoxConfig
from .linear import Linear, Norm

FACTORABLE = ("att/qkv", "att/out", "mlp/up", "mlp/down")


def rotary(x_BTHh, cos_BTr, sin_BTr):
    """Rotate the first 2r dims of each head in half-split form; the others pass through."""
    r = cos_BTr.shape[-1]
    cos, sin = cos_BTr[:, :, None].astype(x_BTHh.dtype), sin_BTr[:, :, None].astype(x_BTHh.dtype)
    a, b = x_BTHh[..., :r], x_BTHh[..., r : 2 * r]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x_BTHh[..., 2 * r :]], axis=-1)


class Attention(nn.Module):
    """Causal attention; `state` None (training) or this layer's k and v caches."""

    cfg: NeoxConfig

    @nn.compact
    def __call__(self, h_BTD, state, ctx):
        cfg = self.cfg
        b, T, d = h_BTD.shape
        qkv = Linear(3 * d, cfg.pad_rank("att/qkv"), cfg.use_bias, name="qkv")(h_BTD)
        # columns are head-major, [q | k | v] inside each head
        q, k, v = jnp.moveaxis(qkv.reshape(b, T, cfg.n_heads, 3, d // cfg.n_heads), 3, 0)
        q, k = rotary(q, ctx["cos"], ctx["sin"]), rotary(k, ctx["cos"], ctx["sin"])
        if state is not None:
            at = (0, ctx["index"], 0, 0)
            k = lax.dynamic_update_slice(state["k"], k.astype(state["k"].dtype), at)
            v = lax.dynamic_update_slice(state["v"], v.astype(state["v"].dtype), at)
            state = {"k": k, "v": v}
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        y = jax.nn.dot_product_attention(q, k, v, mask=ctx["mask_B1TS"])
        scale = 0.02 / (2 * cfg.n_layers) ** 0.5
        out = Linear(d, cfg.pad_rank("att/out"), cfg.use_bias, scale, name="out")
        return out(y.reshape(b, T, d)), state


class Mlp(nn.Module):
    """down(gelu(up(h))) with the exact (erf) GELU."""

    cfg: NeoxConfig

    @nn.compact
    def __call__(self, h_BTD):
        cfg = self.cfg
        up = Linear(cfg.d_ffn, cfg.pad_rank("mlp/up"), True, name="up")
        scale = 0.02 / (2 * cfg.n_layers) ** 0.5
        down = Linear(cfg.d_model, cfg.pad_rank("mlp/down"), True, scale, name="down")
        return down(nn.gelu(up(h_BTD), approximate=False))


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
            return x_BTD + att + mlp(ln2(x_BTD)), state
        x_BTD = x_BTD + att
        return x_BTD + mlp(ln2(x_BTD)), state


def init_layers(cfg: NeoxConfig, layers: dict, key: jax.Array) -> dict:
    """Nothing beyond the modules' own initialisers."""
    return layers


def init_state(cfg: NeoxConfig, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """Empty caches for `max_len` tokens."""
    shape = (cfg.n_layers, batch, max_len, cfg.n_heads, cfg.d_model // cfg.n_heads)
    return {
        "layers": {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)},
        "index": jnp.int32(0),
        "pos_B": jnp.zeros((batch,), jnp.int32),
        "valid_BS": jnp.zeros((batch, max_len), bool),
    }


def context(cfg: NeoxConfig, T: int, mask_BT, state) -> tuple[dict, dict]:
    """Rotary angles and attention mask of this call, and the state's advanced bookkeeping."""
    index = 0 if state is None else state["index"]
    # rows of a left-padded batch count their own positions; unpadded rows all count the same
    ones = jnp.ones((1, T), bool) if mask_BT is None else mask_BT.astype(bool)
    start_B1 = jnp.zeros((1, 1), jnp.int32) if state is None else state["pos_B"][:, None]
    pos_BT = start_B1 + jnp.maximum(jnp.cumsum(ones, axis=1) - 1, 0)
    row_T = index + jnp.arange(T)
    book = {}
    if state is None:
        valid_BS, S = ones, T
    else:
        written = jnp.broadcast_to(ones, (state["valid_BS"].shape[0], T))
        valid_BS = lax.dynamic_update_slice(state["valid_BS"], written, (0, index))
        S = valid_BS.shape[1]
        book = {"index": index + T, "pos_B": state["pos_B"] + written.sum(1), "valid_BS": valid_BS}
    causal_TS = jnp.arange(S)[None, :] <= row_T[:, None]
    r = int(cfg.d_model // cfg.n_heads * cfg.rotary_pct)
    inv = cfg.rotary_base ** (-jnp.arange(0, r, 2, dtype=jnp.float32) / r)
    angle = pos_BT[..., None].astype(jnp.float32) * inv
    ctx = {
        "cos": jnp.cos(angle),
        "sin": jnp.sin(angle),
        "mask_B1TS": (causal_TS[None] & valid_BS[:, None])[:, None],
        "index": index,
    }
    return ctx, book
