"""A recurrence as Pallas programs, forward and backward (`kernels` says which recurrences).

One program has one row of the batch and one block of channels and walks T in a loop with its states
in registers. Memory gets one state a chunk of tokens, [B, T/chunk, E, N], never [B,T,E,N]; the
backward program makes a chunk's states again and pulls cotangents back through the same steps.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .linear import at_least_f32


class Tile(NamedTuple):
    """How a program holds its block of eh * el channels and n = product(n) numbers for each.

    On a GPU a program works on `eh` tiles [el, *n] one after the other. Triton spreads a tile's
    axes over the threads from the first on, as long as no axis but the last is contiguous in memory
    (a thread loads 4 numbers of that at once): so with el = 32 and n = (1, 4, 4) a thread has a
    channel and all its N, with el = 8, n = (4, 1, 4) it has 4 of N. Sums over what a thread holds
    itself are free, those between threads are exchanges.
    """

    eh: int
    el: int
    n: tuple[int, ...] = ()
    lanes: bool = False  # channels last (a TPU's): tiles [eh, *n, el]

    @property
    def warps(self) -> int:
        """Of 32 threads, in a program."""
        return max(1, self.el * (self.n[0] if self.n else 1) // 32)

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
    ahead: tuple[bool, bool]  # whether a turn reads the next one's rows: forward, backward
    where: str  # "gpu" (Triton), "tpu" (Mosaic), "interpret" or "interpret-tpu" (slow: for tests)


def where_now():
    """How `pallas_call` runs on the default backend."""
    return {"cpu": "interpret", "tpu": "tpu"}.get(jax.default_backend(), "gpu")


def fit(x, multiple, axis=-1, value=0):
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
    return pl.BlockSpec((None, None, *tile), lambda b, g: (b, g, *(0 for _ in tile)))


def _each_token(x):
    """[B, T, G, ..], or T/chunk in T's place."""
    tile = x.shape[3:]
    return pl.BlockSpec((None, x.shape[1], None, *tile), lambda b, g: (b, 0, g, *(0 for _ in tile)))


def _all_channels(x):
    """[B, T, ..]."""
    rest = x.shape[1:]
    return pl.BlockSpec((None, *rest), lambda b, g: (b, *(0 for _ in rest)))


def _all_rows(x):
    """[G, ..]."""
    tile = x.shape[1:]
    return pl.BlockSpec((None, *tile), lambda b, g: (g, *(0 for _ in tile)))


def _call(plan, tile, kernel, grid, ins, outs):
    """`pallas_call` over (B, G); ins: (spec of a leaf, tree), outs: the same with shapes only."""
    params = None
    if plan.where == "gpu":
        from jax.experimental.pallas import triton

        params = triton.CompilerParams(num_warps=tile.warps, num_stages=1)
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
    s = _chunks(n, plan.ahead[0], load, work, _tiles(tile, state))
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
    ds, total = _chunks(n, plan.ahead[1], load, work, carry)
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
def recurrence(plan, fixed, state, rows, shared, fresh):
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
        plan, tile, functools.partial(_forward_kernel, plan), (B, G),
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
        plan, tile, functools.partial(_backward_kernel, plan), (B, G),
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


recurrence.defvjp(_forward, _backward)
