"""Pallas kernels of `selective_scan` and `wkv`, forward and backward: impl="pallas" of `scan.py`.

The mathematics is one token's step (Mamba-1: arXiv 2312.00752, RWKV-4: 2305.13048); the backward
kernel pulls cotangents back through the same step. One program has one row of the batch and one
block of channels and walks T in a loop with its states in registers; memory gets one state a chunk
of tokens, [B, T/chunk, E, N], never [B,T,E,N]. The plain references are the "sequential" forms in
`scan.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .linear import at_least_f32

NEG = -1e38  # as in scan.py: finite, so that differences never give NaN
LOG2E = math.log2(math.e)
LANES = 128  # on a TPU the last axis has 128 lanes


class Tile(NamedTuple):
    """How a program holds its block of eh * el channels and n = product(n) numbers for each.

    On a GPU a program is one warp of 32 threads. It works on `eh` tiles [el, *n] one after the
    other. Triton spreads a tile's axes over the threads from the first on, as long as no axis but
    the last is contiguous in memory (a thread loads 4 numbers of that at once): so with el = 32 a
    thread has a channel of its own and all its N, and with el = 8, n = (4, 1, 4) it has 4 of N.
    Sums over what a thread holds itself are free, those between threads are exchanges.
    """

    eh: int
    el: int
    n: tuple[int, ...] = ()
    lanes: bool = False  # channels last (a TPU's): tiles [eh, *n, el]

    @property
    def block(self) -> int:
        """Channels of a program."""
        return self.eh * self.el

    def rows(self, x):
        """[.., E] -> [.., G, eh, el]."""
        return x.reshape(*x.shape[:-1], -1, self.eh, self.el)

    def states(self, x):
        """[.., E, N] -> [.., G, eh, el, *n]; with lanes [.., G, eh, *n, el]."""
        x = x.reshape(*x.shape[:-2], -1, self.eh, self.el, *self.n)
        return jnp.moveaxis(x, -1 - len(self.n), -1) if self.lanes else x

    def channels(self, x, has_n):
        """The inverse of `states` (has_n) or `rows`."""
        if has_n and self.lanes:
            x = jnp.moveaxis(x, -1, -1 - len(self.n))
        last = (math.prod(self.n),) if has_n else ()
        return x.reshape(*x.shape[: x.ndim - 2 - len(self.n) * has_n - 1], -1, *last)

    def shared(self, x):
        """[.., N] -> [.., *n]."""
        return x.reshape(*x.shape[:-1], *self.n)

    # Spread over a tile axis by axis, what a thread holds itself last: the transpose, a sum, then
    # adds that up first and exchanges only what is left.
    def over_n(self, x):
        """A row's tile -> a state's tile."""
        if self.lanes:
            return jnp.broadcast_to(x[:, None], (self.eh, *self.n, self.el))
        for size in self.n:
            x = jnp.broadcast_to(x[..., None], (*x.shape, size))
        return x

    def over_e(self, x):
        """[*n] -> a state's tile."""
        if self.lanes:
            return jnp.broadcast_to(x[None, :, None], (self.eh, *self.n, self.el))
        return jnp.broadcast_to(x[None], (self.el, *self.n))

    def sum_e(self, x):
        """A state's tile -> [*n]."""
        return x.sum(2).sum(0) if self.lanes else x.sum(0)

    def sum_n(self, x):
        """A state's tile -> a row's."""
        if self.lanes:
            return x.sum(1)
        for _ in self.n:
            x = x.sum(-1)
        return x


class Plan(NamedTuple):
    """What is static in a call."""

    step: object  # (functions, tile, fixed, state, rows, shared, fresh) -> (state, y) of one token
    # (functions, tile, sum of dfixed, fixed, state before, rows, shared, fresh, dstate after, dy)
    # -> (sum of dfixed, dstate before, drows, dshared): the step's transpose
    pull: object
    forward: Tile
    backward: Tile
    unroll: int  # tokens of a loop's turn, in a forward pass that keeps nothing
    chunk: int  # tokens of a loop's turn, and of a kept state
    ahead: bool  # whether a turn reads the next one's rows
    where: str  # "gpu" (Triton), "tpu" (Mosaic), "interpret" or "interpret-tpu" (slow: for tests)


def _where():
    """How `pallas_call` runs on the default backend."""
    return {"cpu": "interpret", "tpu": "tpu"}.get(jax.default_backend(), "gpu")


def _fit(x, multiple, axis=-1, value=0):
    """x with `axis` filled up to a multiple."""
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, fill, constant_values=value) if fill[axis][1] else x


def _asm(instruction, plain, slope):
    """The machine's own approximate function of float32 numbers (2 units in the last place; XLA's
    takes three instructions more, for denormal numbers), with `plain` for other dtypes."""

    @jax.custom_jvp
    def fn(x):
        from jax.experimental.pallas import triton

        like = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        return triton.elementwise_inline_asm(
            f"{instruction}.approx.ftz.f32 $0, $1;",
            args=[x], constraints="=f,f", pack=1, result_shape_dtypes=like,
        )[0]  # fmt: skip

    @fn.defjvp
    def _(primals, tangents):
        y = fn(*primals)
        return y, tangents[0] * slope(y)

    return lambda x: fn(x) if x.dtype == jnp.float32 else plain(x)


_gpu_exp2 = _asm("ex2", jnp.exp2, lambda y: y * math.log(2))
_gpu_reciprocal = _asm("rcp", lambda x: 1 / x, lambda y: -y * y)


def _functions(where):
    """(2^x, 1/x) inside of a kernel."""
    return (_gpu_exp2, _gpu_reciprocal) if where == "gpu" else (jnp.exp2, lambda x: 1 / x)


# Letters below: G blocks of channels. Arrays are fixed [G, ..], state [B, G, ..], rows
# [B, T, G, ..], shared [B, T, *n] (the same for all channels), fresh [B, T, 1] int32 or None.
def _one_row(x):
    """[B, G, ..]: the block of one row and one block of channels."""
    tile = x.shape[2:]
    return pl.BlockSpec((None, None, *tile), lambda g, b: (b, g, *(0 for _ in tile)))


def _each_token(x):
    """[B, T, G, ..], or T/chunk in T's place."""
    tile = x.shape[3:]
    return pl.BlockSpec((None, x.shape[1], None, *tile), lambda g, b: (b, 0, g, *(0 for _ in tile)))


def _all_channels(x):
    """[B, T, ..]."""
    rest = x.shape[1:]
    return pl.BlockSpec((None, *rest), lambda g, b: (b, *(0 for _ in rest)))


def _all_rows(x):
    """[G, ..]."""
    tile = x.shape[1:]
    return pl.BlockSpec((None, *tile), lambda g, b: (g, *(0 for _ in tile)))


def _call(plan, kernel, grid, ins, outs):
    """`pallas_call`; ins: (spec of a leaf, tree), outs: the same with shapes only.

    The grid's first axis is the one that neighbours on a GPU differ in: blocks of channels, which
    read what all channels share, and pieces of the same memory pages.
    """
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
        interpret=plan.where.startswith("interpret"),
    )(*(tree for _, tree in ins))


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _like(tree):
    return jax.tree.map(lambda a: _shape(a.shape, a.dtype), tree)


def _read(refs, *index):
    """What stands in the refs."""
    return jax.tree.map(lambda r: r[index or ...], refs)


def _wide(tree):
    """In at least float32."""
    return jax.tree.map(lambda x: x.astype(at_least_f32(x.dtype)), tree)


def _write(refs, values, *index):
    def put(ref, value):
        ref[index or ...] = value.astype(ref.dtype)

    jax.tree.map(put, refs, values)


def _tiles(tile, refs, *index):
    """`_read`, a list of trees: one for each of a program's tiles."""
    if tile.lanes:
        return [_read(refs, *index)]
    return [_read(refs, *index, e) for e in range(tile.eh)]


def _put_tiles(tile, refs, values, *index):
    for e, value in enumerate(values):
        _write(refs, value, *index, *(() if tile.lanes else (e,)))


def _chunks(n, ahead, load, work, carry):
    """carry = work(i, load(i), carry) for all i < n; ahead: load(i + 1) is under way meanwhile.

    A GPU has few programs to fill the time in which others wait for memory: what is read ahead
    stays in registers, as it was read.
    """
    if not n:
        return carry
    if not ahead:
        return lax.fori_loop(0, n, lambda i, carry: work(i, load(i), carry), carry)

    def body(i, state):
        carry, loaded = state
        following = load(jnp.minimum(i + 1, n - 1))
        return work(i, loaded, carry), following

    return lax.fori_loop(0, n, body, (carry, load(0)))[0]


def _forward_kernel(plan, fixed, state, rows, shared, fresh, y, last, kept):
    T, tile = y.shape[0], plan.forward
    size = plan.unroll if kept is None else plan.chunk
    step = functools.partial(plan.step, _functions(plan.where), tile, _tiles(tile, fixed))

    def load(j, length=size):
        return [_tiles(tile, rows, j * size + i) for i in range(length)]

    def work(j, tokens, s):
        if kept is not None:
            _put_tiles(tile, kept, s, j)
        ys, ts = [], [j * size + i for i in range(len(tokens))]
        for t, token in zip(ts, tokens, strict=True):
            new = None if fresh is None else fresh[t, 0] != 0
            s, y_t = step(s, _wide(token), _wide(_read(shared, t)), new)
            ys.append(y_t)
        for t, y_t in zip(ts, ys, strict=True):  # nothing is written before all is read
            _put_tiles(tile, y, y_t, t)
        return s

    n = T // size
    s = _chunks(n, plan.ahead, load, work, _tiles(tile, state))
    if T % size:
        s = work(n, load(n, T % size), s)
    _put_tiles(tile, last, s)


def _backward_kernel(plan, fixed, kept, rows, shared, fresh, dy, dlast, *outs):
    """Chunks from the last to the first: states again from the kept one, then cotangents back."""
    dfixed, dstate, drows, dshared = outs
    T, tile, size = dy.shape[0], plan.backward, plan.chunk
    fixed, n = _tiles(tile, fixed), T // size
    step, pull = (functools.partial(f, _functions(plan.where), tile) for f in plan[:2])

    def load(i, j=None, length=size):
        j = n - 1 - i if j is None else j
        ts = [j * size + k for k in range(length)]
        return _tiles(tile, kept, j), [(_tiles(tile, rows, t), _tiles(tile, dy, t)) for t in ts]

    def work(i, loaded, carry, j=None):
        (ds, total), (first, tokens) = carry, loaded
        j, states = n - 1 - i if j is None else j, [first]
        ts = [j * size + k for k in range(len(tokens))]
        share = [_wide(_read(shared, t)) for t in ts]
        new = [None if fresh is None else fresh[t, 0] != 0 for t in ts]
        for k, (row, _) in enumerate(tokens[:-1]):
            states.append(step(fixed, states[-1], _wide(row), share[k], new[k])[0])
        for k in reversed(range(len(tokens))):
            row, dy_t = _wide(tokens[k])
            total, ds, drow, dshare = pull(total, fixed, states[k], row, share[k], new[k], ds, dy_t)
            _put_tiles(tile, drows, drow, ts[k])
            _write(dshared, dshare, ts[k])
        return ds, total

    carry = _tiles(tile, dlast), jax.tree.map(jnp.zeros_like, fixed)
    if T % size:
        carry = work(None, load(None, n, T % size), carry, n)
    ds, total = _chunks(n, plan.ahead, load, work, carry)
    _put_tiles(tile, dstate, ds)
    _put_tiles(tile, dfixed, total)


def _tiled(tile, fixed, states, rows):
    """Arrays as a program's tiles: fixed [E(, N)], states [.., E(, N)], rows [.., E]."""
    split = lambda lead: lambda x: (tile.rows if x.ndim == lead else tile.states)(x)  # noqa: E731
    return (
        jax.tree.map(split(1), fixed),
        jax.tree.map(split(states[0].ndim - bool(tile.n)), states),
        jax.tree.map(tile.rows, rows),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(plan, fixed, state, rows, shared, fresh):
    """All tokens of a recurrence -> (y [B,T,E] in the dtype of rows, last state)."""
    return _forward(plan, fixed, state, rows, shared, fresh, save=False)[0]


def _forward(plan, fixed, state, rows, shared, fresh, save=True):
    tile, kept = plan.forward, None
    fixed_, state_, rows_ = _tiled(tile, fixed, state, rows)
    B, T, G = rows_[0].shape[:3]
    if save:
        of = lambda s: _shape((B, -(-T // plan.chunk), *s.shape[1:]), s.dtype)  # noqa: E731
        kept = jax.tree.map(of, state_)
    y, last, kept = _call(
        plan, functools.partial(_forward_kernel, plan), (G, B),
        [(_all_rows, fixed_), (_one_row, state_), (_each_token, rows_),
         (_all_channels, jax.tree.map(tile.shared, shared)), (_all_channels, fresh)],
        [(_each_token, _like(rows_[0])), (_one_row, _like(state_)), (_each_token, kept)],
    )  # fmt: skip
    flat = lambda x: tile.channels(x, bool(tile.n))  # noqa: E731
    y, last, kept = tile.channels(y, False), jax.tree.map(flat, last), jax.tree.map(flat, kept)
    return (y, last), (fixed, kept, rows, shared, fresh)


def _backward(plan, saved, grads):
    fixed, kept, rows, shared, fresh = saved
    dy, dlast = grads
    tile, acc = plan.backward, kept[0].dtype
    fixed_, kept_, rows_ = _tiled(tile, fixed, kept, rows)
    _, dlast, dy = _tiled(tile, (), dlast, dy)
    B, T, G = rows_[0].shape[:3]
    # Summed over the batch, or over blocks of channels, outside of the kernel: no atomic additions,
    # whose order would differ from run to run. The price for B and C is [B, T, G, N] each.
    dfixed = jax.tree.map(lambda f: _shape((B, *f.shape), acc), fixed_)
    dshared = jax.tree.map(lambda s: _shape((B, T, G, *tile.n), acc), shared)
    dfixed, dstate, drows, dshared = _call(
        plan, functools.partial(_backward_kernel, plan), (G, B),
        [(_all_rows, fixed_), (_each_token, kept_), (_each_token, rows_),
         (_all_channels, jax.tree.map(tile.shared, shared)), (_all_channels, fresh),
         (_each_token, dy), (_one_row, dlast)],
        [(_one_row, dfixed), (_one_row, _like(dlast)), (_each_token, _like(rows_)),
         (_each_token, dshared)],
    )  # fmt: skip
    dfixed = jax.tree.map(
        lambda d, f: tile.channels(d.sum(0), f.ndim > 1).astype(f.dtype), dfixed, fixed
    )
    dshared = jax.tree.map(lambda d, s: d.sum(2).reshape(s.shape).astype(s.dtype), dshared, shared)
    dstate = jax.tree.map(lambda d: tile.channels(d, bool(tile.n)), dstate)
    return dfixed, dstate, jax.tree.map(lambda d: tile.channels(d, False), drows), dshared, None


_recurrence.defvjp(_forward, _backward)


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

# Tiles, tokens of a turn, tokens of a kept state.
TUNED = {
    "mamba": {"forward": (1, 32, (1, 4, 4)), "backward": (4, 8, (4, 1, 4)), "unroll": 8, "chunk": 4, "ahead": True},
    "wkv": {"forward": (1, 32), "backward": (1, 32), "unroll": 16, "chunk": 16, "ahead": True},
}  # fmt: skip


def _plan(name, steps, n, where, chunk):
    """The Plan of a call; on a TPU tiles have 128 channels and all n."""
    how = TUNED[name]
    if where.endswith("tpu"):
        tile = Tile(1, LANES, (n,) * (name == "mamba"), lanes=True)
        return Plan(*steps, tile, tile, how["unroll"], chunk or how["chunk"], how["ahead"], where)
    forward, backward = Tile(*how["forward"]), Tile(*how["backward"])
    if name == "mamba" and n != math.prod(forward.n):  # a power of 2, not 16 as in all parents
        nh = min(4, n)
        forward = Tile(forward.eh, forward.el, (1, n // nh, nh))
        backward = Tile(backward.eh, backward.el, (1, n // nh, nh))
    return Plan(
        *steps, forward, backward, how["unroll"], chunk or how["chunk"], how["ahead"], where
    )


def selective_scan(
    u_BTE, dt_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, starts_BT=None, *, chunk=None, where=None
):  # fmt: skip
    """As `scan.selective_scan`, whose state must be given -> (y_BTE, last state_BEN).

    Under a mesh wrap it in `jax.shard_map` over batch and channels: XLA cannot split a kernel.
    where: "gpu", "tpu", "interpret" (None: by the default backend). On a TPU all of T stands in
    VMEM, which bounds T.
    """
    where = where or _where()
    E, N = A_EN.shape
    n = N if where.endswith("tpu") else pl.next_power_of_2(N)  # Triton takes powers of two only
    plan = _plan("mamba", MAMBA, n, where, chunk)
    acc, block = at_least_f32(u_BTE.dtype), math.lcm(plan.forward.block, plan.backward.block)
    rows = lambda x: _fit(x, block)  # noqa: E731
    states = lambda x: _fit(_fit(x.astype(acc), n), block, -2)  # noqa: E731
    y, (last,) = _recurrence(
        plan,
        (_in_powers_of_2(states(A_EN.astype(acc))), rows(D_E.astype(acc))),
        (states(state_BEN),),
        (rows(u_BTE), rows(dt_BTE.astype(u_BTE.dtype))),
        # all channels read them: once in float32 is less work than each time from 16 bits
        (_fit(B_BTN.astype(acc), n), _fit(C_BTN.astype(acc), n)),
        None if starts_BT is None else starts_BT.astype(jnp.int32)[..., None],
    )
    return y[..., :E], last[:, :E, :N]


def wkv(k_BTA, v_BTA, w_A, u_A, state, starts_BT=None, *, chunk=None, where=None):
    """As `scan.wkv`, whose state must be given -> (wkv_BTA, state dict of [B,A]).

    Meshes, `where`, TPU: as in `selective_scan`.
    """
    plan = _plan("wkv", WKV, 0, where or _where(), chunk)
    acc, A = at_least_f32(k_BTA.dtype), k_BTA.shape[-1]
    block = math.lcm(plan.forward.block, plan.backward.block)
    rows = lambda x, value=0: _fit(x, block, value=value)  # noqa: E731
    empty = {"a": 0, "b": 0, "p": NEG}
    scale = {"a": 1, "b": 1, "p": LOG2E}  # of the running maximum in powers of 2
    y, last = _recurrence(
        plan,
        tuple(rows(x.astype(acc) * LOG2E) for x in (w_A, u_A)),
        tuple(rows(state[s].astype(acc) * scale[s], value) for s, value in empty.items()),
        (rows(k_BTA), rows(v_BTA)),
        (),
        None if starts_BT is None else starts_BT.astype(jnp.int32)[..., None],
    )
    return y[..., :A], {s: x[..., :A] / scale[s] for s, x in zip(empty, last, strict=True)}
