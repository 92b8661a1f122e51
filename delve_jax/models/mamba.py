"""Mamba-1 (arXiv 2312.00752): RMSNorm, gated selective SSM, residual; no attention, no MLP.

x <- x + out_proj(selective_scan(silu(conv(u))) * silu(z)),  [u | z] = in_proj(RMSNorm(x)).
State per layer: conv [B,W-1,E] (inputs of the causal convolution), ssm [B,E,N] float32.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ..config import MambaConfig
from .linear import Linear, Norm, at_least_f32, in_rows, wide
from .scan import selective_scan, starts_of

FACTORABLE = ("in_proj", "out_proj")  # x_proj and dt_proj are narrow already
MLP = ()  # no neurons to prune
RESIDUAL = {"out_proj": "out"}
NORM = "rms"
KEEP_WIDE = ("A_log", "D", "dt_proj/bias")  # half precision here moves the decay itself


def causal_conv(u_BTE, kernel_WE, bias_E, state_BWE, segments_BT=None):
    """Depthwise causal convolution continuing from the last W-1 inputs -> (y_BTE, new state).

    With segments a tap that would reach into another document reads zero.
    """
    width, T = kernel_WE.shape[0], u_BTE.shape[1]
    padded = jnp.concatenate([state_BWE.astype(u_BTE.dtype), u_BTE], axis=1)
    taps = [padded[:, w : w + T] for w in range(width)]
    if segments_BT is not None:
        past_BT = jnp.pad(segments_BT, ((0, 0), (width - 1, 0)), mode="edge")
        same = [past_BT[:, w : w + T] == segments_BT for w in range(width)]
        taps = [jnp.where(s[..., None], tap, 0) for s, tap in zip(same, taps, strict=True)]
    kernel_WE, bias_E = kernel_WE.astype(u_BTE.dtype), bias_E.astype(u_BTE.dtype)

    def weighted(*taps):
        return sum(tap * kernel_WE[w] for w, tap in enumerate(taps)) + bias_E

    return in_rows(weighted, *taps), padded[:, T:]


class Block(nn.Module):
    """One residual layer; `state` None starts from zeros and returns None."""

    cfg: MambaConfig

    @nn.compact
    def __call__(self, x_BTD, state, ctx):
        cfg = self.cfg
        e_dim, n_dim, r_dim = cfg.d_inner, cfg.d_state, cfg.dt_rank
        lin = lambda name, features, bias=False, scale=0.02, out=None: Linear(  # noqa: E731
            features, cfg.factored(name), bias, nn.initializers.normal(scale), out, name=name
        )
        # padded positions must not enter the convolution or the state: zero them on both sides
        mask = ctx["mask_BT"]
        keep = (lambda a: a) if mask is None else lambda a: a * mask[..., None].astype(a.dtype)

        h_BTD = Norm("rms", cfg.norm_eps, name="norm")(x_BTD)
        u_BTE, z_BTE = jnp.split(lin("in_proj", 2 * e_dim, cfg.use_bias)(h_BTD), 2, axis=-1)
        conv = ConvParams(cfg, name="conv")()
        old = (
            jnp.zeros((x_BTD.shape[0], cfg.d_conv - 1, e_dim), x_BTD.dtype)
            if state is None
            else state["conv"]
        )
        u_BTE, conv_state = causal_conv(
            keep(u_BTE), conv["kernel"], conv["bias"], old, ctx["segments_BT"]
        )
        u_BTE = keep(nn.silu(u_BTE))

        dt, B_BTN, C_BTN = jnp.split(
            lin("x_proj", r_dim + 2 * n_dim)(u_BTE), [r_dim, r_dim + n_dim], axis=-1
        )
        wide_sum = at_least_f32(dt.dtype)  # of the bias, which is kept wide
        dt_BTE = jax.nn.softplus(lin("dt_proj", e_dim, True, r_dim**-0.5, wide_sum)(dt))
        A_log = self.param("A_log", _init_a_log, (e_dim, n_dim))
        D_E = self.param("D", nn.initializers.ones, (e_dim,))
        y_BTE, ssm = selective_scan(
            u_BTE, dt_BTE, -jnp.exp(wide(A_log)), B_BTN, C_BTN, D_E,
            None if state is None else state["ssm"], ctx["starts_BT"],
        )  # fmt: skip
        scale = 0.02 / cfg.n_layers**0.5
        y = lin("out_proj", cfg.d_model, cfg.use_bias, scale)(y_BTE * nn.silu(z_BTE))
        new = None if state is None else {"conv": conv_state.astype(old.dtype), "ssm": ssm}
        return x_BTD + y, new


class ConvParams(nn.Module):
    """Taps [W, E] (the last is the current token) and bias [E] of the causal convolution."""

    cfg: MambaConfig

    @nn.compact
    def __call__(self):
        width, e_dim = self.cfg.d_conv, self.cfg.d_inner
        kernel = self.param("kernel", nn.initializers.normal(width**-0.5), (width, e_dim))
        if self.cfg.use_conv_bias:
            return {"kernel": kernel, "bias": self.param("bias", nn.initializers.zeros, (e_dim,))}
        return {"kernel": kernel, "bias": jnp.zeros((e_dim,))}


def _init_a_log(key, shape):
    return jnp.log(jnp.broadcast_to(jnp.arange(1, shape[1] + 1, dtype=jnp.float32), shape))


def init_layers(cfg: MambaConfig, layers: dict, key: jax.Array) -> dict:
    """Initial values that the plain initialisers above cannot give: dt in [1e-3, 1e-1]."""
    bias = layers["dt_proj"]["bias"]
    dt = jnp.exp(jax.random.uniform(key, bias.shape, minval=jnp.log(1e-3), maxval=jnp.log(0.1)))
    layers["dt_proj"]["bias"] = dt + jnp.log(-jnp.expm1(-dt))  # inverse softplus
    return layers


def init_state(cfg: MambaConfig, batch: int, max_len: int, dtype=jnp.float32) -> dict:
    """Zero state of all layers; constant in length (`max_len` is ignored)."""
    lead = (cfg.n_layers, batch)
    return {
        "layers": {
            "conv": jnp.zeros((*lead, cfg.d_conv - 1, cfg.d_inner), dtype),
            "ssm": jnp.zeros((*lead, cfg.d_inner, cfg.d_state), at_least_f32(dtype)),
        }
    }


def mixer_flops(cfg: MambaConfig, T: int) -> int:
    """Of a token and layer, beside its maps: exp(dt A) s + dt u B, s C, and the convolution."""
    return cfg.d_inner * (7 * cfg.d_state + 2 * cfg.d_conv)


def context(
    cfg: MambaConfig, x_BTD, mask_BT=None, state=None, segments_BT=None
) -> tuple[dict, dict]:
    """What every layer needs to know of this call, and the state's own bookkeeping (none)."""
    starts_BT = starts_of(segments_BT)
    return {"mask_BT": mask_BT, "segments_BT": segments_BT, "starts_BT": starts_BT}, {}
