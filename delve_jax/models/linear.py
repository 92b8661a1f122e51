"""A linear map that is dense (`kernel` [I,O]) or factored (`v` [I,K], `u` [K,O]): y = x v u + bias.

The only file that knows the difference. Stacked factors whose layers have unequal true ranks are
zero in BOTH factors beyond the true rank, so training leaves them zero. While compression collects
moments (collection "moments" mutable), every map sows what its closed form needs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

HIGHEST = jax.lax.Precision.HIGHEST


def at_least_f32(dtype) -> jnp.dtype:
    """The dtype of norms, softmaxes, states and logits: float32, or float64 where x is."""
    return jnp.promote_types(dtype, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32."""
    return x.astype(at_least_f32(x.dtype))


def linear(p: dict, x: jax.Array, out=None) -> jax.Array:
    """x [.., I] times the map `p` plus its bias -> [.., O], in x's dtype, or summed up in `out`."""
    # rows in one axis: XLA's CPU products and their gradients are faster so
    x, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if "kernel" in p:
        y = jnp.matmul(x, p["kernel"].astype(x.dtype), preferred_element_type=out)
    else:
        z = x @ p["v"].astype(x.dtype)
        y = jnp.matmul(z, p["u"].astype(x.dtype), preferred_element_type=out)
    y = y.reshape(*lead, y.shape[-1])
    return y + p["bias"].astype(y.dtype) if "bias" in p else y


def lookup(p: dict, tokens: jax.Array, dtype=None) -> jax.Array:
    """Rows of a vocabulary table [V, D], dense or factored, for integer ids, as `dtype`."""
    if "kernel" in p:
        return jnp.take(p["kernel"], tokens, axis=0).astype(dtype or p["kernel"].dtype)
    rows = jnp.take(p["v"], tokens, axis=0).astype(dtype or p["v"].dtype)
    return rows @ p["u"].astype(rows.dtype)


def transposed(p: dict, x: jax.Array, out=None) -> jax.Array:
    """x [.., D] times the transpose of a table [V, D] -> [.., V]: the head of a tied model."""
    if "kernel" in p:
        return jnp.matmul(x, p["kernel"].astype(x.dtype).T, preferred_element_type=out)
    z = x @ p["u"].astype(x.dtype).T
    return jnp.matmul(z, p["v"].astype(x.dtype).T, preferred_element_type=out)


def materialise(p: dict) -> jax.Array:
    """The dense kernel [.., I, O] of a map, factors multiplied out."""
    return p["kernel"] if "kernel" in p else jnp.matmul(p["v"], p["u"], precision=HIGHEST)


def moments(x: jax.Array, y: jax.Array, weight: jax.Array | None = None) -> dict:
    """Streaming sums for the whitened closed form (SVD-LLM, Swift-SVD): inputs x, outputs y = x W.

    `gram` [n, n] is over the narrow side of the map: outputs where O <= I, else inputs.
    """
    x, y = wide(x.reshape(-1, x.shape[-1])), wide(y.reshape(-1, y.shape[-1]))
    side = x if y.shape[-1] > x.shape[-1] else y
    gram = jnp.matmul(side.T, side, precision=HIGHEST)
    return {"gram": gram, "sum_in": x.sum(0), "count": jnp.asarray(x.shape[0], gram.dtype)}


def truncated(std: float) -> Callable:
    """Normal numbers times `std`, none beyond 3 of them (their true deviation is 0.9866 std)."""
    return nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


class Linear(nn.Module):
    """Declares one map: dense where `rank` is None, else factored at that (padded) rank."""

    features: int
    rank: int | None = None
    use_bias: bool = False
    initial: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x):
        i_dim = x.shape[-1]
        if self.rank is None:
            p = {"kernel": self.param("kernel", self.initial, (i_dim, self.features))}
        else:
            p = {
                "v": self.param("v", self.initial, (i_dim, self.rank)),
                "u": self.param("u", nn.initializers.normal(1 / self.rank**0.5),
                                (self.rank, self.features)),
            }  # fmt: skip
        y = linear(p, x)
        if self.is_mutable_collection("moments") and not self.is_initializing():
            for name, value in moments(x, y).items():
                self.variable("moments", name, lambda: None).value = value
        return (
            y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
            if self.use_bias
            else y
        )


class Table(nn.Module):
    """Declares a vocabulary table [V, D] (embedding), dense or factored."""

    rows: int
    features: int
    rank: int | None = None
    initial: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, tokens):
        if self.rank is None:
            p = {"kernel": self.param("kernel", self.initial, (self.rows, self.features))}
        else:
            p = {
                "v": self.param("v", self.initial, (self.rows, self.rank)),
                "u": self.param("u", nn.initializers.normal(1.0), (self.rank, self.features)),
            }
        return lookup(p, tokens)


def layer_norm(p: dict, x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm with the biased variance in float32 (two passes: the fast form loses digits)."""
    x32 = wide(x)
    centred = x32 - x32.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def rms_norm(x: jax.Array, eps: float, scale: jax.Array | None = None) -> jax.Array:
    """RMSNorm in float32, with or without gain."""
    x32 = wide(x)
    y = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps)
    return (y if scale is None else y * scale).astype(x.dtype)


class Norm(nn.Module):
    """LayerNorm (kind "layer": scale and bias) or RMSNorm (kind "rms": scale)."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.kind == "rms":
            return rms_norm(x, self.eps, scale)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm({"scale": scale, "bias": bias}, x, self.eps)
