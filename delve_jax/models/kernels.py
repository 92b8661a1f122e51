"""Pallas kernels of `selective_scan` and `wkv`, forward and backward: impl="pallas" of `scan.py`.

Not measured on an accelerator: not a default. The mathematics is one token's step (Mamba-1: arXiv
2312.00752, RWKV-4: 2305.13048); the backward kernel pulls cotangents back through the same step.
The plain references are the "sequential" forms in `scan.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .linear import at_least_f32

# One program has one row of the batch and one block of channels and walks T in a loop; states stay
# in registers. A chunk of tokens is unrolled: its inputs are read together, its states are held at
# once in the backward pass, and memory gets one state a chunk: [B, T/chunk, E, N], never [B,T,E,N].
# Longer chunks save memory and traffic and take registers.
CHUNK = {"mamba": 8, "wkv": 8}
# A Mamba state is a tile [nh, nl, el, eh]: N = nh nl, a block has el eh channels. Triton gives a
# thread 4 numbers of the contiguous last axis to load at once, and a warp's 32 threads the axes
# before it; so with nl el = 32 a thread has nh eh numbers of its own, and sums over n and over
# channels need few exchanges between threads.
NL, EL, EH = 8, 4, 4  # on a GPU: 16 channels
WKV_BLOCK = 32  # channels of a program of `wkv`, one a thread
LANES = 128  # on a TPU the last axis has 128 lanes
NEG = -1e38  # as in scan.py: finite, so that differences never give NaN


class Plan(NamedTuple):
    """What is static in a call."""

    step: object  # (fixed, state, rows, shared, fresh) -> (state, y) of one token and one block
    chunk: int
    where: str  # "gpu" (Triton), "tpu" (Mosaic) or "interpret" (any backend, slow: for tests)


def _where():
    """How `pallas_call` runs on the default backend."""
    return {"cpu": "interpret", "tpu": "tpu"}.get(jax.default_backend(), "gpu")


def _fit(x, multiple, axis=-1, value=0):
    """x with `axis` filled up to a multiple."""
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, fill, constant_values=value) if fill[axis][1] else x


# Letters below: G blocks of channels; `tile` is the shape that a block of an array has. Arrays are
# fixed [G, *tile], state [B, G, *tile], rows [B, T, G, *tile], shared [B, T, *tile] (the same for
# all channels), fresh [B, T, 1] int32 or None.
def _one_row(x):
    """[B, G, *tile]: the block of one row and one block of channels."""
    tile = x.shape[2:]
    return pl.BlockSpec((None, None, *tile), lambda b, g: (b, g, *(0 for _ in tile)))


def _each_token(x):
    """[B, T, G, *tile], or T/chunk in T's place."""
    tile = x.shape[3:]
    return pl.BlockSpec((None, x.shape[1], None, *tile), lambda b, g: (b, 0, g, *(0 for _ in tile)))


def _all_channels(x):
    """[B, T, *tile]."""
    rest = x.shape[1:]
    return pl.BlockSpec((None, *rest), lambda b, g: (b, *(0 for _ in rest)))


def _all_rows(x):
    """[G, *tile]."""
    tile = x.shape[1:]
    return pl.BlockSpec((None, *tile), lambda b, g: (g, *(0 for _ in tile)))


def _call(plan, kernel, grid, ins, outs):
    """`pallas_call` over (B, G); ins: (spec of a leaf, tree), outs: the same with shapes only."""
    params = None
    if plan.where == "gpu":
        from jax.experimental.pallas import triton

        params = triton.CompilerParams(num_warps=1, num_stages=1)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[jax.tree.map(spec, tree) for spec, tree in ins],
        out_specs=[jax.tree.map(spec, tree) for spec, tree in outs],
        out_shape=[tree for _, tree in outs],
        compiler_params=params,
        interpret=plan.where == "interpret",
    )(*(tree for _, tree in ins))


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _read(refs, *index):
    """What stands in the refs, in at least float32."""
    return jax.tree.map(lambda r: r[index or ...].astype(at_least_f32(r.dtype)), refs)


def _write(refs, values, *index):
    def put(ref, value):
        ref[index or ...] = value.astype(ref.dtype)

    jax.tree.map(put, refs, values)


def _tokens(plan, j, length, rows, shared, fresh):
    """The inputs of the tokens of chunk j: read before anything is written, so all at once."""
    ts = [j * plan.chunk + i for i in range(length)]
    starts = [None if fresh is None else fresh[t, 0] != 0 for t in ts]
    return ts, [(_read(rows, t), _read(shared, t), f) for t, f in zip(ts, starts, strict=True)]


def _forward_kernel(plan, fixed, state, rows, shared, fresh, y, last, kept):
    T = y.shape[0]
    fixed = _read(fixed)

    def chunk(j, s, length=plan.chunk):
        if kept is not None:
            _write(kept, s, j)
        ts, tokens = _tokens(plan, j, length, rows, shared, fresh)
        ys = []
        for token in tokens:
            s, y_t = plan.step(fixed, s, *token)
            ys.append(y_t)
        for t, y_t in zip(ts, ys, strict=True):
            _write(y, y_t, t)
        return s

    s = lax.fori_loop(0, T // plan.chunk, chunk, _read(state))
    if T % plan.chunk:
        s = chunk(T // plan.chunk, s, T % plan.chunk)
    _write(last, s)


def _backward_kernel(plan, fixed, kept, rows, shared, fresh, dy, dlast, *outs):
    """Chunks from the last to the first: states again from the kept one, then cotangents back."""
    dfixed, dstate, drows, dshared = outs
    T = dy.shape[0]
    fixed = _read(fixed)

    def chunk(j, carry, length=plan.chunk):
        ds, total = carry
        ts, tokens = _tokens(plan, j, length, rows, shared, fresh)
        dys = [_read(dy, t) for t in ts]
        states = [_read(kept, j)]
        for token in tokens[:-1]:
            states.append(plan.step(fixed, states[-1], *token)[0])
        for t, s, (row, share, new), dy_t in reversed(
            list(zip(ts, states, tokens, dys, strict=True))
        ):
            pull = jax.vjp(lambda *args, new=new: plan.step(*args, new), fixed, s, row, share)[1]
            d, ds, drow, dshare = pull((ds, dy_t))
            total = jax.tree.map(jnp.add, total, d)
            _write(drows, drow, t)
            _write(dshared, dshare, t)
        return ds, total

    carry = _read(dlast), jax.tree.map(jnp.zeros_like, fixed)
    n_full = T // plan.chunk
    if T % plan.chunk:
        carry = chunk(n_full, carry, T % plan.chunk)
    ds, total = lax.fori_loop(0, n_full, lambda i, c: chunk(n_full - 1 - i, c), carry)
    _write(dstate, ds)
    _write(dfixed, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(plan, fixed, state, rows, shared, fresh):
    """All tokens of a recurrence -> (y [B,T,G,*tile] in the dtype of rows, last state)."""
    return _forward(plan, fixed, state, rows, shared, fresh, save=False)[0]


def _forward(plan, fixed, state, rows, shared, fresh, save=True):
    B, T, G = rows[0].shape[:3]
    kept = None
    if save:
        kept = jax.tree.map(
            lambda s: _shape((B, -(-T // plan.chunk), G, *s.shape[2:]), s.dtype), state
        )
    y, last, kept = _call(
        plan, functools.partial(_forward_kernel, plan), (B, G),
        [(_all_rows, fixed), (_one_row, state), (_each_token, rows), (_all_channels, shared),
         (_all_channels, fresh)],
        [(_each_token, _shape(rows[0].shape, rows[0].dtype)),
         (_one_row, jax.tree.map(lambda s: _shape(s.shape, s.dtype), state)), (_each_token, kept)],
    )  # fmt: skip
    return (y, last), (fixed, kept, rows, shared, fresh)


def _backward(plan, saved, grads):
    fixed, kept, rows, shared, fresh = saved
    dy, dlast = grads
    B, T, G = rows[0].shape[:3]
    acc = kept[0].dtype
    # Summed over the batch, or over blocks of channels, outside of the kernel: no atomic additions,
    # whose order would differ from run to run. The price for B and C is [B, T, G, N] each.
    dfixed = jax.tree.map(lambda f: _shape((B, *f.shape), acc), fixed)
    dshared = jax.tree.map(lambda s: _shape((B, T, G, *s.shape[2:]), acc), shared)
    like = lambda tree: jax.tree.map(lambda a: _shape(a.shape, a.dtype), tree)  # noqa: E731
    dfixed, dstate, drows, dshared = _call(
        plan, functools.partial(_backward_kernel, plan), (B, G),
        [(_all_rows, fixed), (_each_token, kept), (_each_token, rows), (_all_channels, shared),
         (_all_channels, fresh), (_each_token, dy), (_one_row, dlast)],
        [(_one_row, dfixed), (_one_row, like(dlast)), (_each_token, like(rows)),
         (_each_token, dshared)],
    )  # fmt: skip
    dfixed = jax.tree.map(lambda d, f: d.sum(0).astype(f.dtype), dfixed, fixed)
    dshared = jax.tree.map(lambda d, s: d.sum(2).astype(s.dtype), dshared, shared)
    return dfixed, dstate, drows, dshared, None


_recurrence.defvjp(_forward, _backward)


# Spread over a tile in two stages, what a thread holds itself last: the transpose, a sum, then adds
# that up first and exchanges only what is left.
def _over_n(x, nl):
    """[el, eh] -> [1, nl, el, eh]."""
    return jnp.broadcast_to(x, (nl, *x.shape))[None]


def _over_e(x, el):
    """[nh, nl] -> [nh, nl, el, 1]."""
    return jnp.broadcast_to(x[..., None], (*x.shape, el))[..., None]


def _mamba_step(fixed, state, rows, shared, fresh):
    """s = exp(dt A) s + dt u (x) B, y = s C + D u, with A log2(e) for the machine's own 2^x."""
    A, D = fixed
    (s,), (u, dt), (b, c) = state, rows, shared
    nl, el = A.shape[1:3]
    a = jnp.exp2(_over_n(dt, nl) * A)
    if fresh is not None:
        a = jnp.where(fresh, jnp.zeros_like(a), a)
    s = a * s + _over_n(dt * u, nl) * _over_e(b, el)
    return (s,), (s * _over_e(c, el)).sum(0).sum(0) + D * u


def _wkv_step(fixed, state, rows, shared, fresh):
    """One token under the running maximum p: the same sums as the sequential form."""
    (w, u), (a, b, p), (k, v) = fixed, state, rows
    if fresh is not None:
        p = jnp.where(fresh, jnp.full_like(p, NEG), p)
    q = jnp.maximum(p, u + k)
    old, new = jnp.exp(p - q), jnp.exp(u + k - q)
    y = (old * a + new * v) / (old * b + new)
    q = jnp.maximum(p + w, k)
    old, new = jnp.exp(p + w - q), jnp.exp(k - q)
    return (old * a + new * v, old * b + new, q), y


def selective_scan(
    u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, starts_BT=None, *, chunk=None, where=None
):  # fmt: skip
    """As `scan.selective_scan`, whose state must be given -> (y_BTE, last state_BEN).

    Not measured on an accelerator: not a default. Under a mesh wrap it in `jax.shard_map` over
    batch and channels: XLA cannot split a kernel. where: "gpu", "tpu", "interpret" (None: by the
    default backend). On a TPU all of T stands in VMEM, which bounds T.
    """
    where = where or _where()
    E, N = A_EN.shape
    if where == "tpu":
        n, nl, el, eh = N, N, 1, LANES
    else:  # Triton takes powers of two only
        n, el, eh = pl.next_power_of_2(N), EL, EH
        nl = min(NL, n)
    acc, block = at_least_f32(u_BTE.dtype), el * eh

    def channels(x):
        x = _fit(x, block)
        return x.reshape(*x.shape[:-1], -1, el, eh)

    def states(x):
        """[.., E, N] -> [.., G, nh, nl, el, eh]."""
        x = _fit(_fit(x.astype(acc), n), block, -2)
        x = x.reshape(*x.shape[:-2], -1, el, eh, n // nl, nl)
        return jnp.moveaxis(x, (-2, -1), (-4, -3))

    def shared(x):
        return _fit(x, n).reshape(*x.shape[:2], n // nl, nl)

    y, (last,) = _recurrence(
        Plan(_mamba_step, chunk or CHUNK["mamba"], where),
        (states(A_EN.astype(acc) * math.log2(math.e)), channels(D_E.astype(acc))),
        (states(state_BEN),),
        (channels(u_BTE), channels(dt_BTE)),
        (shared(B_BTN), shared(C_BTN)),
        None if starts_BT is None else starts_BT.astype(jnp.int32)[..., None],
    )
    last = jnp.moveaxis(last, (-4, -3), (-2, -1))
    last = last.reshape(*last.shape[:1], -1, n)[:, :E, :N]
    return y.reshape(*y.shape[:2], -1)[..., :E], last


def wkv(k_BTA, v_BTA, w_A, u_A, state, starts_BT=None, *, chunk=None, where=None):
    """As `scan.wkv`, whose state must be given -> (wkv_BTA, state dict of [B,A]).

    Not measured on an accelerator: not a default. Meshes, `where`, TPU: as in `selective_scan`.
    """
    where = where or _where()
    block = (1, LANES if where == "tpu" else WKV_BLOCK)
    acc, A = at_least_f32(k_BTA.dtype), k_BTA.shape[-1]

    def channels(x, value=0):
        x = _fit(x, block[1], value=value)
        return x.reshape(*x.shape[:-1], -1, *block)

    empty = {"a": 0, "b": 0, "p": NEG}
    y, last = _recurrence(
        Plan(_wkv_step, chunk or CHUNK["wkv"], where),
        tuple(channels(x.astype(acc)) for x in (w_A, u_A)),
        tuple(channels(state[name].astype(acc), value) for name, value in empty.items()),
        (channels(k_BTA), channels(v_BTA)),
        (),
        None if starts_BT is None else starts_BT.astype(jnp.int32)[..., None],
    )
    flat = lambda x: x.reshape(*x.shape[:-3], -1)[..., :A]  # noqa: E731
    return flat(y), {name: flat(s) for name, s in zip(empty, last, strict=True)}
