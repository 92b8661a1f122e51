"""RWKV-4 (arXiv 2305.13048): time-mix (WKV recurrence) and channel-mix, both with token shift.

x <- x + W_o (sigmoid(r) * wkv(k, v));  x <- x + sigmoid(r') * W_v' relu(W_k' mix)^2.
State per layer: att_shift, ffn_shift [B,D] (previous normalised input), a, b, p [B,A] float32.
HF's `rescale_every` only guards the float16 range and is a no-op up to eps: ignored here.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..config import RwkvConfig
from .linear import Linear, Norm, at_least_f32, in_rows, routed, wide
from .scan import NEG, starts_of, wkv

FACTORABLE = (
    "att/key", "att/value", "att/receptance", "att/output", "ffn/key", "ffn/value",
    "ffn/receptance",
)  # fmt: skip
MLP = ("ffn/key", "ffn/value")  # the last reads the neurons that the others make
RESIDUAL = {"att/output": "in"}  # what its channel mixing adds is gated
NORM = "layer"
KEEP_WIDE = ("att/time_decay", "att/time_first")
FINAL_EPS = 1e-5  # ln_out ignores layer_norm_epsilon in every published implementation


def shifted(h_BTD, last_BD, starts_BT=None):
    """The previous position's input: `last_BD` before the first, zeros where a document starts."""
    prev_BTD = jnp.concatenate([last_BD[:, None].astype(h_BTD.dtype), h_BTD[:, :-1]], axis=1)
    return prev_BTD if starts_BT is None else jnp.where(starts_BT[..., None], 0, prev_BTD)


def mix(h_BTD, prev_BTD, m_D):
    """Interpolate an input with its predecessor, per channel."""
    m_D = m_D.astype(h_BTD.dtype)
    return in_rows(lambda h, prev: h * m_D + prev * (1 - m_D), h_BTD, prev_BTD)


class TimeMix(nn.Module):
    """The attention of RWKV-4; `state` has shift [B,D] and a, b, p [B,A]."""

    cfg: RwkvConfig

    @nn.compact
    def __call__(self, h_BTD, state, ctx):
        cfg, mask_BT = self.cfg, ctx["mask_BT"]
        lin = lambda name, features, scale=0.02: Linear(  # noqa: E731
            features, cfg.factored(f"att/{name}"), False, nn.initializers.normal(scale), name=name
        )
        vec = lambda name, dim: self.param(name, nn.initializers.zeros, (dim,))  # noqa: E731
        prev = shifted(h_BTD, state["shift"], ctx["starts_BT"])
        k = lin("key", cfg.d_att)(mix(h_BTD, prev, vec("mix_k", cfg.d_model)))
        v = lin("value", cfg.d_att)(mix(h_BTD, prev, vec("mix_v", cfg.d_model)))
        r = lin("receptance", cfg.d_att)(mix(h_BTD, prev, vec("mix_r", cfg.d_model)))
        if mask_BT is not None:  # left padding: weight e^k = 0, so the state stays empty
            k = jnp.where(mask_BT[..., None], wide(k), NEG)
            v = jnp.where(mask_BT[..., None], v, 0)
        w_A = -jnp.exp(wide(vec("time_decay", cfg.d_att)))
        u_A = wide(vec("time_first", cfg.d_att))
        y, new = wkv(k, v, w_A, u_A, {name: state[name] for name in "abp"}, ctx["starts_BT"])
        out = lin("output", cfg.d_model, 0.02 / cfg.n_layers**0.5)
        gated = jax.nn.sigmoid(r) * y.astype(r.dtype)
        return out(gated), {"shift": h_BTD[:, -1], **new}


class ChannelMix(nn.Module):
    """The squared-ReLU MLP of RWKV-4 with token shift; `shift` [B,D]."""

    cfg: RwkvConfig

    @nn.compact
    def __call__(self, h_BTD, shift_BD, starts_BT):
        cfg = self.cfg
        lin = lambda name, features, scale=0.02: Linear(  # noqa: E731
            features, cfg.factored(f"ffn/{name}"), False, nn.initializers.normal(scale), name=name
        )
        vec = lambda name: self.param(name, nn.initializers.zeros, (cfg.d_model,))  # noqa: E731
        prev = shifted(h_BTD, shift_BD, starts_BT)
        k = lin("key", cfg.d_ffn)(mix(h_BTD, prev, vec("mix_k")))
        r = lin("receptance", cfg.d_model)(mix(h_BTD, prev, vec("mix_r")))
        value = lin("value", cfg.d_model, 0.02 / cfg.n_layers**0.5)
        return jax.nn.sigmoid(r) * value(jnp.square(nn.relu(k)))


class Block(nn.Module):
    """One residual layer; `state` None starts from zeros and returns None."""

    cfg: RwkvConfig

    @nn.compact
    def __call__(self, x_BTD, state, ctx):
        cfg, mask = self.cfg, ctx["mask_BT"]
        # a padded position must look like "before the text": its normalised input is zero
        keep = (lambda a: a) if mask is None else lambda a: a * mask[..., None].astype(a.dtype)
        old = state
        if old is None:
            one = init_state(cfg, x_BTD.shape[0], 0, x_BTD.dtype)["layers"]
            old = jax.tree.map(lambda a: a[0], one)
        h = keep(Norm("layer", cfg.norm_eps, name="ln1")(x_BTD))
        att = {"shift": old["att_shift"], "a": old["a"], "b": old["b"], "p": old["p"]}
        y, new = TimeMix(cfg, name="att")(h, att, ctx)
        x_BTD = x_BTD + y
        h = keep(Norm("layer", cfg.norm_eps, name="ln2")(x_BTD))
        ffn = ChannelMix(cfg, name="ffn")
        x_BTD = x_BTD + routed(ffn, ctx, h, old["ffn_shift"], ctx["starts_BT"])
        if state is None:
            return x_BTD, None
        new = {"att_shift": new.pop("shift"), "ffn_shift": h[:, -1], **new}
        return x_BTD, jax.tree.map(lambda a, b: a.astype(b.dtype), new, state)


def init_layers(cfg: RwkvConfig, layers: dict, key: jax.Array) -> dict:
    """Decays spread over the channels and mixes by channel and depth, as RWKV-4 is trained from."""
    L, A, D = cfg.n_layers, cfg.d_att, cfg.d_model
    depth = jnp.arange(L)[:, None] / max(L - 1, 1)
    late = 1 - jnp.arange(L)[:, None] / L
    ratio = jnp.arange(A) / max(A - 1, 1)
    x_D = jnp.arange(D) / D
    att, ffn = layers["att"], layers["ffn"]
    att["time_decay"] = -5 + 8 * ratio ** (0.7 + 1.3 * depth)
    zigzag = ((jnp.arange(A) + 1) % 3 - 1) * 0.5
    att["time_first"] = jnp.broadcast_to(jnp.log(0.3) + zigzag, (L, A))
    att["mix_k"] = x_D**late
    att["mix_v"] = x_D**late + 0.3 * depth
    att["mix_r"] = x_D ** (0.5 * late)
    ffn["mix_k"], ffn["mix_r"] = x_D**late, x_D**late  # two buffers: a step donates them
    return layers


def init_state(cfg: RwkvConfig, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """Empty state of all layers; constant in length (`max_len` is ignored)."""
    lead, wide_dtype = (cfg.n_layers, batch), at_least_f32(dtype)
    zeros = lambda dim, kind: jnp.zeros((*lead, dim), kind)  # noqa: E731
    return {
        "layers": {
            "att_shift": zeros(cfg.d_model, dtype),
            "ffn_shift": zeros(cfg.d_model, dtype),
            "a": zeros(cfg.d_att, wide_dtype),
            "b": zeros(cfg.d_att, wide_dtype),
            "p": jnp.full((*lead, cfg.d_att), NEG, wide_dtype),
        }
    }


def mixer_flops(cfg: RwkvConfig, T: int) -> int:
    """Of a token and layer, beside its maps: wkv, two exponentials, numerator and denominator, for
    state and output."""
    return 14 * cfg.d_att


def context(
    cfg: RwkvConfig, x_BTD, mask_BT=None, state=None, segments_BT=None
) -> tuple[dict, dict]:
    """What every layer needs to know of this call, and the state's own bookkeeping (none)."""
    starts_BT = starts_of(segments_BT)
    return {"mask_BT": mask_BT, "segments_BT": segments_BT, "starts_BT": starts_BT}, {}
