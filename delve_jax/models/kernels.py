"""Pallas kernels of `selective_scan` and `wkv`, forward and backward: impl="pallas" of `scan.py`.

The mathematics is one token's step (Mamba-1: arXiv 2312.00752, RWKV-4: 2305.13048) and its
transpose; `programs` makes kernels of them. The plain references are the "sequential" forms in
`scan.py`.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .linear import at_least_f32
from .programs import Plan, Tile, fit, recurrence, where_now

NEG = -1e38  # as in scan.py: finite, so that differences never give NaN
LOG2E = math.log2(math.e)
LANES = 128  # on a TPU the last axis has 128 lanes


def _mamba_step(functions, tile, fixed, state, rows, shared, fresh):
    """s = exp(dt A) s + dt u (x) B, y = s C + D u, with A log2(e) for the machine's own 2^x."""
    exp2, _ = functions
    # spread over channels once for all tiles: their cotangents are added up before the exchange
    b, c = (tile.over_e(x) for x in shared)
    states, ys = [], []
    for (A, D), (s,), (u, dt) in zip(fixed, state, rows, strict=True):
        a = exp2(tile.over_n(dt) * A)
        if fresh is not None:
            a = jnp.where(fresh, jnp.zeros_like(a), a)
        s = a * s + tile.over_n(dt * u) * b
        states.append((s,))
        ys.append(tile.sum_n(s * c) + D * u)
    return states, ys


def _mamba_pull(functions, tile, total, fixed, state, rows, shared, fresh, dstate, dy):
    """By hand: jax.vjp of the step takes half as many instructions again. h is the gradient of the
    exponent dt A, of whose ln 2 the caller takes care in A."""
    exp2, _ = functions
    b, c = (tile.over_e(x) for x in shared)
    db = dc = 0.0
    totals, states, drows = [], [], []
    for (dA, dD), (A, D), (s,), (u, dt), (ds,), dy_e in zip(
        total, fixed, state, rows, dstate, dy, strict=True
    ):
        over_dt, over_du, over_dy = (tile.over_n(x) for x in (dt, dt * u, dy_e))
        a = exp2(over_dt * A)
        if fresh is not None:
            a = jnp.where(fresh, jnp.zeros_like(a), a)
        ds = ds + over_dy * c
        dc = dc + over_dy * (a * s + over_du * b)
        db = db + ds * over_du
        ddu = tile.sum_n(ds * b)
        before = ds * a
        h = before * s
        ddt = tile.sum_n(h * A) * math.log(2)
        totals.append((dA + h * over_dt, dD + dy_e * u))
        states.append((before,))
        drows.append((ddu * dt + dy_e * D, ddt + ddu * u))
    return totals, states, drows, (tile.sum_e(db), tile.sum_e(dc))


@jax.custom_vjp
def _in_powers_of_2(A):
    """A log2(e); its cotangent is that of A already (`_mamba_pull`)."""
    return A * LOG2E


_in_powers_of_2.defvjp(lambda A: (A * LOG2E, None), lambda _, dA: (dA,))


def _by_vjp(step):
    """The transpose of a step by JAX."""

    def pull(functions, tile, total, fixed, state, rows, shared, fresh, dstate, dy):
        def of(*args):
            return step(functions, tile, *args, fresh)

        d, *others = jax.vjp(of, fixed, state, rows, shared)[1]((dstate, dy))
        return jax.tree.map(jnp.add, total, d), *others

    return pull


def _wkv_step(functions, tile, fixed, state, rows, shared, fresh):
    """One token under the running maximum p, in powers of 2: of the two weights that are compared
    the larger is 1, so one exponential is enough."""
    exp2, reciprocal = functions
    states, ys = [], []
    for (w, u), (a, b, p), (k, v) in zip(fixed, state, rows, strict=True):
        if fresh is not None:
            p = jnp.where(fresh, jnp.full_like(p, NEG), p)
        k = k * LOG2E

        def weights(old, new):
            less = exp2(-jnp.abs(old - new))
            one = jnp.ones_like(less)
            return jnp.where(old > new, one, less), jnp.where(old > new, less, one)

        old, new = weights(p, u + k)
        ys.append((old * a + new * v) * reciprocal(old * b + new))
        old, new = weights(p + w, k)
        states.append((old * a + new * v, old * b + new, jnp.maximum(p + w, k)))
    return states, ys


MAMBA, WKV = (_mamba_step, _mamba_pull), (_wkv_step, _by_vjp(_wkv_step))

# Tiles, tokens of a turn, tokens of a kept state, what reads ahead (forward, backward): the best of
# 29 variants on an H200 (results/scan_tiles_gpu.json), of nearly equal ones what compiles soonest.
# Still 2.7 (wkv) and 7 (Mamba) times the bandwidth's floor forward, 4 and 14 times backward.
TUNED = {
    "mamba": {
        "forward": (1, 32, (1, 4, 4)), "backward": (1, 32, (1, 4, 4)), "unroll": 8, "chunk": 4,
        "ahead": (False, False),
    },
    "wkv": {
        "forward": (1, 32), "backward": (1, 32), "unroll": 16, "chunk": 8, "ahead": (True, True),
    },
}  # fmt: skip


def _tile(how, channels, n):
    """The tile `how` (eh, el, n) of TUNED for so many channels and another N than 16."""
    eh, el, *of_n = how
    while el > 32 and channels % (eh * el):  # fewer warps rather than channels that are padding
        el //= 2
    if of_n and math.prod(of_n[0]) != n:
        nh = min(4, n)
        of_n = [(1, n // nh, nh)]
    return Tile(eh, el, *of_n)


def _plan(name, steps, channels, n, where, chunk):
    """The Plan of a call; on a TPU tiles have 128 channels and all n."""
    how = TUNED[name]
    if where.endswith("tpu"):
        forward = backward = Tile(1, LANES, (n,) * (name == "mamba"), lanes=True)
    else:
        forward, backward = (_tile(how[side], channels, n) for side in ("forward", "backward"))
    chunk = chunk or how["chunk"]
    return Plan(*steps, forward, backward, how["unroll"], chunk, how["ahead"], where)


def selective_scan(
    u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, starts_BT=None, *, chunk=None, where=None
):  # fmt: skip
    """As `scan.selective_scan`, whose state must be given -> (y_BTE, last state_BEN).

    Under a mesh wrap it in `jax.shard_map` over batch and channels: XLA cannot split a kernel.
    where: "gpu", "tpu", "interpret" (None: by the default backend). On a TPU all of T stands in
    VMEM, which bounds T.
    """
    where = where or where_now()
    E, N = A_EN.shape
    n = N if where.endswith("tpu") else pl.next_power_of_2(N)  # Triton takes powers of two only
    plan = _plan("mamba", MAMBA, E, n, where, chunk)
    acc, block = at_least_f32(u_BTE.dtype), math.lcm(plan.forward.block, plan.backward.block)
    rows = lambda x: fit(x, block)  # noqa: E731
    states = lambda x: fit(fit(x.astype(acc), n), block, -2)  # noqa: E731
    y, (last,) = recurrence(
        plan,
        (_in_powers_of_2(states(A_EN.astype(acc))), rows(D_E.astype(acc))),
        (states(state_BEN),),
        (rows(u_BTE), rows(dt_BTE)),
        # all channels read them: once in float32 is less work than each time from 16 bits
        (fit(B_BTN.astype(acc), n), fit(C_BTN.astype(acc), n)),
        None if starts_BT is None else starts_BT.astype(jnp.int32)[..., None],
    )
    return y[..., :E], last[:, :E, :N]


def wkv(k_BTA, v_BTA, w_A, u_A, state, starts_BT=None, *, chunk=None, where=None):
    """As `scan.wkv`, whose state must be given -> (wkv_BTA, state dict of [B,A]).

    Meshes, `where`, TPU: as in `selective_scan`.
    """
    acc, A = at_least_f32(k_BTA.dtype), k_BTA.shape[-1]
    plan = _plan("wkv", WKV, A, 0, where or where_now(), chunk)
    block = math.lcm(plan.forward.block, plan.backward.block)
    rows = lambda x, value=0: fit(x, block, value=value)  # noqa: E731
    empty = {"a": 0, "b": 0, "p": NEG}
    scale = {"a": 1, "b": 1, "p": LOG2E}  # of the running maximum in powers of 2
    y, last = recurrence(
        plan,
        tuple(rows(x.astype(acc) * LOG2E) for x in (w_A, u_A)),
        tuple(rows(state[s].astype(acc) * scale[s], value) for s, value in empty.items()),
        (rows(k_BTA), rows(v_BTA)),
        (),
        None if starts_BT is None else starts_BT.astype(jnp.int32)[..., None],
    )
    return y[..., :A], {s: x[..., :A] / scale[s] for s, x in zip(empty, last, strict=True)}
