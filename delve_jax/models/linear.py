"""A linear map that is dense (`kernel` [I,O]) or factored (`v` [I,K], `u` [K,O]): y = x v u + bias.

The only file that knows the difference. Stacked factors whose layers have unequal true ranks are
zero in BOTH factors beyond the true rank, so training leaves them zero. While compression collects
moments (collection "moments" mutable), every map sows what its closed form needs.

Factors have further forms, made by `compress.storage` after training; the names of a map's
parameters tell which one it is (r: true rank, least: the smallest of the stack):
  int8          v_q [I,K], u_q [K,O], q_scale [K]       y = ((x v_q) q_scale) u_q
  pivot, O <= I v [I,K], u_rest [K,O-least], order [O]  z = x v, y = [z, z u_rest][order]
  pivot, O > I  v_rest [I-least,K], u [K,O], order      [a, b] = x[order], y = (a + b v_rest) u
Pivot: r of the outputs (inputs) are the factor's own coordinates: r (I + O - r) numbers.
"""

import functools
from collections.abc import Callable

import jax
import jax.extend
import jax.numpy as jnp
from flax import linen as nn

from ..config import Factored

HIGHEST = jax.lax.Precision.HIGHEST


def at_least_f32(dtype) -> jnp.dtype:
    """The dtype of norms, softmaxes, states and logits: float32, or float64 where x is."""
    return jnp.promote_types(dtype, jnp.float32)


@functools.cache
def on_cuda() -> bool:
    """Whether the default backend is NVIDIA's, of compute capability 8 or more: what cuDNN's fused
    attention and Triton ask for. (AMD's has the same name "gpu"; a T4 has 7.5.)"""
    if jax.default_backend() != "gpu":
        return False
    if "cuda" not in jax.extend.backend.get_backend().platform_version:
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8


def wide(x: jax.Array) -> jax.Array:
    """x in at least float32."""
    return x.astype(at_least_f32(x.dtype))


def product(x: jax.Array, w: jax.Array, out=None, flipped: bool = False) -> jax.Array:
    """x [.., I] w [I, O] in x's dtype, or summed up in `out`; flipped: w is an array's transpose.

    Where that is wider, the cotangent is rounded to x's dtype before it is multiplied: else XLA
    multiplies wide numbers for both gradients, at a fraction of the speed (of a step of Qwen3 1B on
    an H200 those of the head took a fifth). The gradient of w is summed up in w's own dtype.
    """
    if out is not None and jnp.dtype(out) != x.dtype:
        return _wider(x, w, jnp.dtype(out).name)
    if not flipped and few_rows(x, w):
        return _unpacked(x, w.astype(x.dtype))
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wider(x, w, out):
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out)


def _wider_backward(out, saved, g):
    x, w = saved
    g, flat = g.astype(x.dtype), lambda a: a.reshape(-1, a.shape[-1])
    dw = jnp.matmul(flat(x).T, flat(g), preferred_element_type=w.dtype)
    return jnp.matmul(g, w.astype(x.dtype).T), dw


_wider.defvjp(lambda x, w, out: (_wider(x, w, out), (x, w)), _wider_backward)


def few_rows(x: jax.Array, w: jax.Array) -> bool:
    """Whether x [.., I] in float32 has few rows for a large w [I, O], on a CPU."""
    few = x.dtype == jnp.float32 and 1 < x.size // x.shape[-1] < 64
    return few and w.size >= 2**21 and jax.default_backend() == "cpu"


def _unpacked(x, w):
    """x w for few rows.

    YNNPACK, which XLA:CPU multiplies with, packs all of w first; Eigen, which gets a product whose
    x lies transposed, takes 0.45 to 1.0 of the time, but five times as long where w does too
    (results/forms_cpu.json). XLA would undo the transposition without barriers.
    """
    barrier = jax.lax.optimization_barrier
    x_IN = barrier(barrier(x.reshape(-1, x.shape[-1])).T)
    y_NO = jax.lax.dot_general(x_IN, w, (((0,), (0,)), ((), ())))
    return y_NO.reshape(*x.shape[:-1], -1)


def in_rows(fn: Callable, *xs: jax.Array) -> jax.Array:
    """fn(*xs [.., D]) -> [.., D], row by row; on a CPU the leading axes are one in it.

    XLA:CPU takes 7 times as long for the gradients of gains and biases where they are sums over a
    batch of one row and its tokens (results/forms_cpu.json).
    """
    if jax.default_backend() != "cpu":
        return fn(*xs)  # a reshape may move what is spread over devices
    return fn(*(x.reshape(-1, x.shape[-1]) for x in xs)).reshape(xs[0].shape)


def linear(p: dict, x: jax.Array, out=None) -> jax.Array:
    """x [.., I] times the map `p` plus its bias -> [.., O], in x's dtype, or summed up in `out`."""
    # rows in one axis: XLA's CPU products and their gradients are faster so
    x, lead = x.reshape(-1, x.shape[-1]), x.shape[:-1]
    if "kernel" in p:
        y = product(x, p["kernel"], out)
    else:
        y = _expand(p, _reduce(p, x), out)
    y = y + p["bias"].astype(y.dtype) if "bias" in p else y
    return y.reshape(*lead, y.shape[-1])


def _reduce(p: dict, x: jax.Array) -> jax.Array:
    """x [.., I] -> z [.., K], the coordinates between the factors."""
    if "v_q" in p:
        return _scaled(p, product(x, p["v_q"]))
    if "v_rest" in p:
        rank = p["v_rest"].shape[-1]
        x = jnp.take(x, p["order"], axis=-1)
        return x[..., :rank] + product(x[..., rank:], p["v_rest"])
    return product(x, p["v"])


def _expand(p: dict, z: jax.Array, out=None) -> jax.Array:
    """z [.., K] -> y [.., O]."""
    name = next(name for name in ("u", "u_q", "u_rest") if name in p)
    y = product(z, p[name], out)
    if name == "u_rest":
        return jnp.take(jnp.concatenate([z.astype(y.dtype), y], axis=-1), p["order"], axis=-1)
    return y


def _scaled(p: dict, z: jax.Array) -> jax.Array:
    """z in units of the int8 factors -> in those of the map."""
    return (z * p["q_scale"]).astype(z.dtype)


def lookup(p: dict, tokens: jax.Array, dtype=None) -> jax.Array:
    """Rows of a vocabulary table [V, D], dense or factored, for integer ids, as `dtype`."""
    if "kernel" in p:
        return jnp.take(p["kernel"], tokens, axis=0).astype(dtype or p["kernel"].dtype)
    if "v_q" in p:
        rows = jnp.take(p["v_q"], tokens, axis=0).astype(dtype or p["q_scale"].dtype)
        return _expand(p, _scaled(p, rows))
    return _expand(p, jnp.take(p["v"], tokens, axis=0).astype(dtype or p["v"].dtype))


def transposed(p: dict, x: jax.Array, out=None) -> jax.Array:
    """x [.., D] times the transpose of a table [V, D] -> [.., V]: the head of a tied model."""
    if "kernel" in p:
        return product(x, p["kernel"].T, out, flipped=True)
    if "u_rest" in p:
        rank, size = p["u_rest"].shape[0], sum(p["u_rest"].shape)
        x = jnp.zeros((*x.shape[:-1], size), x.dtype).at[..., p["order"]].add(x)
        z = x[..., :rank] + x[..., rank:] @ p["u_rest"].astype(x.dtype).T
    elif "u_q" in p:
        z = _scaled(p, x @ p["u_q"].astype(x.dtype).T)
    else:
        z = x @ p["u"].astype(x.dtype).T
    v_VK = p["v_q"] if "v_q" in p else p["v"]
    return product(z, v_VK.T, out, flipped=True)


def materialise(p: dict) -> jax.Array:
    """The dense kernel [.., I, O] of a map, factors multiplied out (not inside jit)."""
    if "kernel" in p:
        return p["kernel"]
    if "v" in p and "u" in p:
        return jnp.matmul(p["v"], p["u"], precision=HIGHEST)
    if "v_rest" in p:  # every input has its place in the permutation
        n_in = int(p["order"].max()) + 1
        z_of = lambda p: _reduce(p, jnp.eye(n_in, dtype=p["u"].dtype))  # noqa: E731
    elif "v_q" in p:
        z_of = lambda p: _scaled(p, p["v_q"].astype(p["q_scale"].dtype))  # noqa: E731
    else:
        z_of = lambda p: p["v"]  # noqa: E731
    rows = lambda p: _expand(p, z_of(p))  # noqa: E731
    stacked = p["order" if "order" in p else "q_scale"].ndim == 2
    with jax.default_matmul_precision("highest"):
        return (jax.vmap(rows) if stacked else rows)(p)


def moments(x: jax.Array, y: jax.Array) -> dict:
    """Sums over the tokens of inputs x and outputs y = x W, for the closed forms of `compress`.

    `gram` [n, n] is over the narrow side of the map: outputs where O <= I, else inputs.
    """
    x, y = wide(x.reshape(-1, x.shape[-1])), wide(y.reshape(-1, y.shape[-1]))
    side = x if y.shape[-1] > x.shape[-1] else y
    gram = jnp.matmul(side.T, side, precision=HIGHEST)
    count = jnp.asarray(x.shape[0], gram.dtype)
    return {"gram": gram, "sum_in": x.sum(0), "abs_in": jnp.abs(x).sum(0), "count": count}


def truncated(std: float) -> Callable:
    """Normal numbers times `std`, none beyond 3 of them (their true deviation is 0.9866 std)."""
    return nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


# ---- what a map declares -------------------------------------------------------------------------


def declared(n_in: int, n_out: int, how: Factored, table: bool = False) -> dict[str, tuple]:
    """Name -> (shape, kind) of the parameters of a factored map; kind: factor, int8, order, scale.

    A pivot form permutes the narrow side; a vocabulary table [V, D], whose rows are looked up, D.
    """
    k, rest = how.rank, how.rank - how.least
    if how.storage == "uv":
        return {"v": ((n_in, k), "factor"), "u": ((k, n_out), "factor")}
    if how.storage == "int8":
        return {"v_q": ((n_in, k), "int8"), "u_q": ((k, n_out), "int8"), "q_scale": ((k,), "scale")}
    if n_out <= n_in or table:
        wide = n_out - how.least
        return {"v": ((n_in, k), "factor"), "u_rest": ((k, wide), "factor"),
                "order": ((n_out,), "order")}  # fmt: skip
    return {"v_rest": ((n_in - how.least, k), "factor"), "u": ((k, n_out), "factor"),
            "order": ((n_in + rest,), "order")}  # fmt: skip


def dims(p: dict, least: int) -> tuple[int, int]:
    """(I, O) of a factored map, from the shapes of its parameters and its smallest true rank."""
    if "u_rest" in p:
        return p["v"].shape[-2], p["order"].shape[-1]
    if "v_rest" in p:
        return p["v_rest"].shape[-2] + least, p["u"].shape[-1]
    v, u = (p[side] if side in p else p[f"{side}_q"] for side in "vu")
    return v.shape[-2], u.shape[-1]


def parameters(storage: str, rank: int, n_in: int, n_out: int) -> int:
    """Numbers that a map of this true rank has; a permutation is none, int8 scales are."""
    both = rank * (n_in + n_out)
    return {"uv": both, "pivot": both - rank * rank, "int8": both + rank}[storage]


def _factors(module: nn.Module, n_in: int, n_out: int, how: Factored, of_v, of_u, table=False):
    """Declares them in a module; initial values of other forms than "uv" only make it run."""
    out = declared(n_in, n_out, how, table)
    permuted = n_in if "v_rest" in out else n_out
    initial = {
        "int8": lambda key, shape: jax.random.randint(key, shape, -127, 128, jnp.int8),
        "order": lambda key, shape: jnp.arange(shape[0], dtype=jnp.int32) % permuted,
        "scale": lambda key, shape: jnp.full(shape, 1e-5, jnp.float32),
    }
    return {
        name: module.param(name, initial.get(kind, of_v if name[0] == "v" else of_u), shape)
        for name, (shape, kind) in out.items()
    }


class Linear(nn.Module):
    """Declares one map: dense where `factored` is None, else its factors in their form."""

    features: int
    factored: Factored | None = None
    use_bias: bool = False
    initial: Callable = nn.initializers.normal(0.02)
    out: jnp.dtype | None = None  # of the sum with the bias; None: that of x

    @nn.compact
    def __call__(self, x):
        i_dim = x.shape[-1]
        if self.factored is None:
            p = {"kernel": self.param("kernel", self.initial, (i_dim, self.features))}
        else:
            of_u = nn.initializers.normal(1 / max(self.factored.rank, 1) ** 0.5)
            p = _factors(self, i_dim, self.features, self.factored, self.initial, of_u)
        # where compression takes the gradient of the loss by this map's output; else nothing
        y = self.perturb("out", linear(p, x))
        if self.is_mutable_collection("moments") and not self.is_initializing():
            sums = moments(x, y)
            # of every map, or of those that are named
            asked = ("inputs", "inputs " + "/".join(self.path))
            if any(map(self.is_mutable_collection, asked)):
                x_NI = wide(x.reshape(-1, x.shape[-1]))
                sums["inputs"] = jnp.matmul(x_NI.T, x_NI, precision=HIGHEST)
            for name, value in sums.items():
                self.variable("moments", name, lambda: None).value = value
        if not self.use_bias:
            return y
        out = x.dtype if self.out is None else self.out
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return in_rows(lambda y: y.astype(out) + bias.astype(out), y)


class Table(nn.Module):
    """Declares a vocabulary table [V, D] (embedding), dense or factored."""

    rows: int
    features: int
    factored: Factored | None = None
    initial: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, tokens):
        if self.factored is None:
            p = {"kernel": self.param("kernel", self.initial, (self.rows, self.features))}
        else:
            of_u = nn.initializers.normal(1.0)
            p = _factors(
                self, self.rows, self.features, self.factored, self.initial, of_u, table=True
            )
        return lookup(p, tokens)


def layer_norm(p: dict, x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm with the biased variance in float32 (two passes: the fast form loses digits).

    p: scale and bias, or empty: neither.
    """

    def norm(x):
        x32 = wide(x)
        centred = x32 - x32.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
        return (y * p["scale"] + p["bias"] if p else y).astype(x.dtype)

    return in_rows(norm, x)


def rms_norm(x: jax.Array, eps: float, scale: jax.Array | None = None) -> jax.Array:
    """RMSNorm in float32, with or without gain."""

    def norm(x):
        x32 = wide(x)
        y = x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps)
        return (y if scale is None else y * scale).astype(x.dtype)

    return in_rows(norm, x)


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


def routed(ffn: nn.Module, ctx: dict, h_BTD: jax.Array, *more) -> jax.Array:
    """ffn(h, *more) times a token's weight ctx["ffn_BT1"] where the call has one (`delve.router`).

    Where a call is one token long and no row has a weight, nothing is computed.
    """
    weight_BT1 = ctx.get("ffn_BT1")
    if weight_BT1 is None:
        return ffn(h_BTD, *more)

    def run(ffn, weight_BT1):
        y = ffn(h_BTD, *more)
        return (weight_BT1.astype(y.dtype) * y).astype(h_BTD.dtype)

    if h_BTD.shape[1] > 1:
        return run(ffn, weight_BT1)
    none = lambda ffn, weight_BT1: jnp.zeros_like(h_BTD)  # noqa: E731
    return nn.cond((weight_BT1 > 0).any(), run, none, ffn, weight_BT1)
