"""The two recurrences: `selective_scan` (Mamba-1, arXiv 2312.00752) and `wkv` (RWKV-4, 2305.13048).

One function each for training, prefill and one step; output and last state come back together; the
state is at least float32. Where `starts_BT` is True the state before a token counts as empty, so
documents packed into a row stay apart. "sequential" is the plain reference, "chunked" runs
`lax.associative_scan` inside checkpointed chunks of `lax.scan`, so [B,T,E,N] is never held, "fused"
is sequential with its own backward pass, "pallas" a kernel (`kernels.py`). `DEFAULT` is the
measured choice per platform.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from .linear import at_least_f32, in_rows, on_cuda, wide

# (implementation, chunk length; None: the kernel's own); the chunk also bounds what the backward
# pass recomputes. "cuda": texts in 16 or 32 bits on one NVIDIA GPU; else that of any accelerator.
# On an H200 wkv's kernel is 13 times as fast as "chunked" forward and 10 times where states are
# kept (results/scan_peers_gpu.json), Mamba's 1.1 and 3.4 times, of a tiny case. TPUs: not measured.
DEFAULT = {
    "cpu": {"mamba": ("fused", 16), "wkv": ("sequential", 16)},
    "cuda": {"mamba": ("pallas", None), "wkv": ("pallas", None)},
    "accelerator": {"mamba": ("chunked", 64), "wkv": ("sequential", 64)},
}
SHORTEST = 16  # tokens that are worth a kernel
# tokens of `wkv` per loop step: with 8, XLA:CPU takes twice as long and compiles four times longer
UNROLL = {"cpu": 1, "accelerator": 8}
NEG = -1e38  # "minus infinity" of the running maximum: finite, so that differences never give NaN


def starts_of(segments_BT):
    """Where a document starts: True where the segment differs from the one before (None: None)."""
    if segments_BT is None:
        return None
    return jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))


def _platform():
    return "cpu" if jax.default_backend() == "cpu" else "accelerator"


def _choice(name, impl, chunk, x_BTE):
    """(implementation, chunk) of a call, whose largest input is x."""
    where = _platform()
    # XLA cannot split a kernel over devices
    if on_cuda() and jax.device_count() == 1 and x_BTE.shape[1] >= SHORTEST:
        where = "cuda" if x_BTE.dtype != jnp.float64 else where
    best_impl, best_chunk = DEFAULT[where][name]
    impl = impl or best_impl
    if impl == "pallas":
        return impl, chunk
    return impl, chunk or best_chunk or DEFAULT["accelerator"][name][1]


def _over_chunks(step, carry, xs, chunk):
    """`lax.scan(step, carry, xs)` over leading axis T, recomputed per chunk in the backward pass.

    `step` takes a chunk of xs (leading axis c <= chunk). A remainder chunk runs on its own, so any
    T works without padding (padding would have to leave the state untouched).
    """
    T = jax.tree.leaves(xs)[0].shape[0]
    chunk, outs = min(chunk, T), []
    n_full = T // chunk
    if n_full:
        full = jax.tree.map(lambda a: a[: n_full * chunk].reshape(n_full, chunk, *a.shape[1:]), xs)
        if n_full == 1:
            carry, ys = step(carry, jax.tree.map(lambda a: a[0], full))
        else:
            carry, ys = lax.scan(jax.checkpoint(step, prevent_cse=False), carry, full)
            ys = ys.reshape(n_full * chunk, *ys.shape[2:])
        outs.append(ys)
    if T % chunk:
        carry, ys = step(carry, jax.tree.map(lambda a: a[n_full * chunk :], xs))
        outs.append(ys)
    return carry, outs[0] if len(outs) == 1 else jnp.concatenate(outs)


def _time_first(starts_BT):
    return None if starts_BT is None else starts_BT.swapaxes(0, 1)


def _decay(exponent, starts):
    """exp of [.., E, N], or 0 where a document starts (starts [..] or None)."""
    a = jnp.exp(exponent)
    return a if starts is None else jnp.where(starts[..., None, None], 0, a)


def selective_scan(
    u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN=None, starts_BT=None, *, impl=None, chunk=None
):
    """s_t = exp(dt A) s_{t-1} + dt u (x) B;  y_t = s_t C + D u  ->  (y_BTE, last state_BEN f32).

    `dt` after softplus, `A` = -exp(A_log). Exact (ZOH) in A, Euler in B, as in the reference code.
    impl: "sequential", "fused", "chunked", "associative" (one associative scan over all of T) or
    "pallas" (a kernel of `kernels`).
    """
    batch, T, e_dim = u_BTE.shape
    if impl is None and batch == 1 and _platform() == "cpu":
        impl = "sequential"  # measured: for one row the plain scan's forward is 3 times faster
    impl, chunk = _choice("mamba", impl, chunk, u_BTE)
    if state_BEN is None:
        state_BEN = jnp.zeros((batch, e_dim, A_EN.shape[-1]), at_least_f32(u_BTE.dtype))
    if impl == "pallas":
        from . import kernels  # only here: importing Pallas takes time

        return kernels.selective_scan(
            u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, starts_BT, chunk=chunk
        )
    u, dt, b, c = (wide(a).swapaxes(0, 1) for a in (u_BTE, dt_BTE, B_BTN, C_BTN))
    starts = _time_first(starts_BT)

    def passed(y_TBE):
        y_BTE = in_rows(lambda y, u: y + D_E * u, y_TBE.swapaxes(0, 1), wide(u_BTE))
        return y_BTE.astype(u_BTE.dtype)

    def one(s_BEN, x):
        dt_BE, du_BE, b_BN, c_BN, starts_B = x
        a_BEN = _decay(dt_BE[..., None] * A_EN, starts_B)
        s_BEN = a_BEN * s_BEN + du_BE[..., None] * b_BN[:, None]
        return s_BEN, jnp.einsum("ben,bn->be", s_BEN, c_BN)

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def parallel(s_BEN, xs):
        dt_c, du_c, b_c, c_c, starts_c = xs  # leading axis: positions of the chunk
        a = _decay(dt_c[..., None] * A_EN, starts_c)
        bx = du_c[..., None] * b_c[:, :, None]
        bx = bx.at[0].add(a[0] * s_BEN)
        _, s = lax.associative_scan(combine, (a, bx), axis=0)
        return s[-1], jnp.einsum("tben,tbn->tbe", s, c_c)

    if impl == "fused":
        y_TBE, state_BNE = _fused(chunk, dt, dt * u, A_EN.T, b, c, state_BEN.swapaxes(1, 2), starts)
        return passed(y_TBE), state_BNE.swapaxes(1, 2)
    if impl == "sequential":
        body = functools.partial(lax.scan, one)
    elif impl in ("chunked", "associative"):
        body, chunk = parallel, T if impl == "associative" else chunk
    else:
        raise ValueError(f"selective_scan: impl {impl!r}")
    state_BEN, y_TBE = _over_chunks(body, state_BEN, (dt, dt * u, b, c, starts), chunk)
    return passed(y_TBE), state_BEN


def _pad_chunks(chunk, xs):
    """[T, ..] -> [T/c, c, ..], padded with zeros: dt = 0 leaves the state as it is."""
    T = jax.tree.leaves(xs)[0].shape[0]
    fill = -T % chunk
    return jax.tree.map(
        lambda a: jnp.pad(a, ((0, fill),) + ((0, 0),) * (a.ndim - 1)).reshape(
            (T + fill) // chunk, chunk, *a.shape[1:]
        ),
        xs,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(chunk, dt_TBE, du_TBE, A_NE, b_TBN, c_TBN, s_BNE, starts_TB):
    """The sequential scan with E innermost and a hand-written backward pass -> (y_TBE, s_BNE).

    Autodiff of the plain scan spends most of its time in many small reductions; here each step of
    the backward pass is a handful of fused loops, and only one state per chunk is kept.
    """
    return _fused_forward(chunk, dt_TBE, du_TBE, A_NE, b_TBN, c_TBN, s_BNE, starts_TB)[0]


def _fused_forward(chunk, dt_TBE, du_TBE, A_NE, b_TBN, c_TBN, s_BNE, starts_TB):
    T = dt_TBE.shape[0]
    chunk = min(chunk, T)

    def one(s_BNE, x):
        dt_BE, du_BE, b_BN, c_BN, starts_B = x
        a_BNE = _decay(dt_BE[:, None] * A_NE, starts_B)
        s_BNE = a_BNE * s_BNE + du_BE[:, None] * b_BN[..., None]
        return s_BNE, (s_BNE * c_BN[..., None]).sum(1)

    def over_chunk(s_BNE, xs):
        last, y = lax.scan(one, s_BNE, xs)
        return last, (y, s_BNE)

    xs = _pad_chunks(chunk, (dt_TBE, du_TBE, b_TBN, c_TBN, starts_TB))
    last, (y, kept) = lax.scan(over_chunk, s_BNE, xs)
    saved = (dt_TBE, du_TBE, A_NE, b_TBN, c_TBN, starts_TB, kept)
    return (y.reshape(-1, *y.shape[2:])[:T], last), saved


def _fused_backward(chunk, saved, grads):
    """lambda_t = dL/ds_t obeys lambda_{t-1} = (lambda_t + dy_t c_t) exp(dt A); the rest follows."""
    dt_TBE, du_TBE, A_NE, b_TBN, c_TBN, starts_TB, kept = saved
    dy_TBE, lam_BNE = grads
    T = dt_TBE.shape[0]
    chunk = min(chunk, T)

    def state(s_BNE, x):
        dt_BE, du_BE, b_BN, starts_B = x
        a_BNE = _decay(dt_BE[:, None] * A_NE, starts_B)
        return a_BNE * s_BNE + du_BE[:, None] * b_BN[..., None], s_BNE

    def one(carry, x):
        lam_BNE, dA_NE = carry
        dt_BE, du_BE, b_BN, c_BN, dy_BE, starts_B, prev_BNE = x
        a_BNE = _decay(dt_BE[:, None] * A_NE, starts_B)
        s_BNE = a_BNE * prev_BNE + du_BE[:, None] * b_BN[..., None]
        lam_BNE = lam_BNE + dy_BE[:, None] * c_BN[..., None]
        dlog_BNE = lam_BNE * prev_BNE * a_BNE  # gradient of the exponent dt A
        out = (
            (dlog_BNE * A_NE).sum(1),
            (lam_BNE * b_BN[..., None]).sum(1),
            (lam_BNE * du_BE[:, None]).sum(2),
            (s_BNE * dy_BE[:, None]).sum(2),
        )
        return (lam_BNE * a_BNE, dA_NE + (dlog_BNE * dt_BE[:, None]).sum(0)), out

    def over_chunk(carry, x):
        (dt, du, b, c, dy, starts), first_BNE = x
        _, prev = lax.scan(state, first_BNE, (dt, du, b, starts))
        return lax.scan(one, carry, (dt, du, b, c, dy, starts, prev), reverse=True)

    xs = _pad_chunks(chunk, (dt_TBE, du_TBE, b_TBN, c_TBN, dy_TBE, starts_TB))
    carry = (lam_BNE, jnp.zeros_like(A_NE))
    (lam_BNE, dA_NE), outs = lax.scan(over_chunk, carry, (xs, kept), reverse=True)
    d_dt, d_du, d_b, d_c = (o.reshape(-1, *o.shape[2:])[:T] for o in outs)
    return d_dt, d_du, dA_NE, d_b, d_c, lam_BNE, None


_fused.defvjp(_fused_forward, _fused_backward)


def wkv_state(batch: int, a_dim: int, dtype=jnp.float32) -> dict:
    """Empty state of `wkv`: numerator a, denominator b, running maximum p, each [B, A]."""
    zero = jnp.zeros((batch, a_dim), dtype)
    return {"a": zero, "b": zero, "p": jnp.full((batch, a_dim), NEG, dtype)}


def wkv(k_BTA, v_BTA, w_A, u_A, state=None, starts_BT=None, *, impl=None, chunk=None):
    """RWKV-4's attention, stabilised by a running maximum -> (wkv_BTA, state dict of [B,A] f32).

    wkv_t = (sum_{i<t} e^{(t-1-i)w + k_i} v_i + e^{u+k_t} v_t) / (the same without v); w < 0.
    impl: "sequential" (`lax.scan` over tokens), "chunked" (associative scan inside chunks) or
    "pallas" (a kernel of `kernels`).
    """
    impl, chunk = _choice("wkv", impl, chunk, k_BTA)
    state = state or wkv_state(k_BTA.shape[0], k_BTA.shape[-1], at_least_f32(k_BTA.dtype))
    if impl == "pallas":
        from . import kernels

        return kernels.wkv(k_BTA, v_BTA, w_A, u_A, state, starts_BT, chunk=chunk)
    k, v, w_A, u_A = (wide(a) for a in (k_BTA, v_BTA, w_A, u_A))
    k, v, starts = k.swapaxes(0, 1), v.swapaxes(0, 1), _time_first(starts_BT)
    carry = (state["a"], state["b"], state["p"])

    def emptied(p, starts):
        # a state whose maximum is NEG has weight e^NEG = 0: nothing of it is read or kept
        return p if starts is None else jnp.where(starts[..., None], NEG, p)

    def read(a, b, p, k_t, v_t):
        q = jnp.maximum(p, u_A + k_t)
        old, new = jnp.exp(p - q), jnp.exp(u_A + k_t - q)
        return (old * a + new * v_t) / (old * b + new)

    def one(carry, kv):
        a, b, p = carry
        k_t, v_t, starts_t = kv
        p = emptied(p, starts_t)
        q = jnp.maximum(p + w_A, k_t)
        old, new = jnp.exp(p + w_A - q), jnp.exp(k_t - q)
        return (old * a + new * v_t, old * b + new, q), read(a, b, p, k_t, v_t)

    def combine(left, right):
        (w1, p1, a1, b1), (w2, p2, a2, b2) = left, right
        p = jnp.maximum(p1 + w2, p2)
        e1, e2 = jnp.exp(p1 + w2 - p), jnp.exp(p2 - p)
        w = w1 + w2 if starts is None else jnp.maximum(w1 + w2, NEG)  # two NEGs: still finite
        return w, p, e1 * a1 + e2 * a2, e1 * b1 + e2 * b2

    def parallel(carry, kv):
        k_c, v_c, starts_c = kv
        first = (jnp.zeros_like(carry[2])[None], carry[2][None], carry[0][None], carry[1][None])
        rest = (emptied(jnp.broadcast_to(w_A, k_c.shape), starts_c), k_c, v_c, jnp.ones_like(k_c))
        elems = jax.tree.map(lambda s, r: jnp.concatenate([s, r]), first, rest)
        _, p, a, b = lax.associative_scan(combine, elems, axis=0)
        # element t of the scan is the state BEFORE token t (the carry stands first)
        return (a[-1], b[-1], p[-1]), read(a[:-1], b[:-1], emptied(p[:-1], starts_c), k_c, v_c)

    if impl == "sequential":
        body = functools.partial(lax.scan, one, unroll=UNROLL[_platform()])
    elif impl == "chunked":
        body = parallel
    else:
        raise ValueError(f"wkv: impl {impl!r}")
    (a, b, p), y_TBA = _over_chunks(body, carry, (k, v, starts), chunk)
    return y_TBA.swapaxes(0, 1).astype(k_BTA.dtype), {"a": a, "b": b, "p": p}
