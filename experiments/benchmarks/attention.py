"""Heads at once or one by one: which way of causal attention is faster on a CPU?

taskset -c 0,1 python experiments/benchmarks/attention.py [--only forward]
Sets `LOOPED` in models/attention.py. Two CPU cores, 2 minutes, float32, random numbers, forward and
with the gradients. PyTorch's scaled_dot_product_attention stands beside.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
from turns import add_row, arguments, old_rows, quiet_torch, summary, turns, write

attention = importlib.import_module("delve_jax.models.attention")
# rows, tokens, heads, heads of keys, head width
SHAPES = ((16, 128, 8, 8, 64), (2, 256, 8, 8, 64), (8, 256, 8, 8, 64), (1, 512, 8, 8, 64),
          (2, 512, 8, 8, 64), (1, 1024, 8, 8, 64), (1, 1024, 16, 16, 64), (1, 1024, 4, 4, 128),
          (1, 1024, 8, 2, 64), (1, 2048, 8, 8, 64))  # fmt: skip
APART = 1e-5  # of the largest number of a result
WAYS = {"at once": 10**9, "one by one": 0}  # `LOOPED`


def ours(arrays, looped: int, gradients: bool):
    """-> function: attention of q, k, v (and its gradients for g) with this `LOOPED`."""
    q, k, v, g = arrays
    mask_11TT = jnp.tri(q.shape[1], dtype=bool)[None, None]

    def run(q, k, v):
        return attention.weighted(q, k, v, mask_11TT, causal=True)

    def both(q, k, v, g):
        y, backward = jax.vjp(run, q, k, v)
        return y, *backward(g)

    before, attention.LOOPED = attention.LOOPED, looped
    program = jax.jit(both if gradients else run)
    args = (q, k, v, g)[: 4 if gradients else 3]
    program = program.lower(*args).compile()
    attention.LOOPED = before
    return lambda: jax.block_until_ready(program(*args))


def theirs(arrays, gradients: bool):
    """The same by PyTorch, heads first and those of keys repeated beforehand."""
    q, k, v, g = (torch.from_numpy(a) for a in arrays)
    heads = q.shape[2] // k.shape[1]
    q, g = (a.transpose(1, 2).contiguous() for a in (q, g))
    k, v = (a.repeat_interleave(heads, 1) for a in (k, v))
    call = torch.nn.functional.scaled_dot_product_attention
    if not gradients:
        return lambda: (call(q, k, v, is_causal=True).transpose(1, 2),)
    q, k, v = (a.requires_grad_() for a in (q, k, v))

    def once():
        q.grad = k.grad = v.grad = None
        y = call(q, k, v, is_causal=True)
        y.backward(g)
        return (y.detach().transpose(1, 2),)

    return once


def measure(shape, gradients: bool, repeats: int) -> dict:
    """One row; raises SystemExit where the sides do not agree."""
    B, T, H, G, h = shape
    draw = np.random.default_rng(0)
    q, g = (draw.standard_normal((B, T, H, h), np.float32) for _ in range(2))
    k, v = (draw.standard_normal((B, G, T, h), np.float32) for _ in range(2))
    arrays = q, k, v, g
    sides = {way: ours(arrays, looped, gradients) for way, looped in WAYS.items()}
    sides["torch"] = theirs(arrays, gradients)
    seconds, given = turns(sides, repeats)
    want = jax.tree.leaves(given["at once"])
    for side in ("one by one", "torch"):
        for a, b in zip(jax.tree.leaves(given[side]), want, strict=False):
            apart = float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())
            if not apart <= APART:
                raise SystemExit(f"{shape}, {side}: {apart:.2g} from at once")
    row = dict(zip(("batch", "T", "heads", "kv_heads", "head_dim"), shape, strict=True))
    row |= {"gradients": gradients, **summary(seconds)}
    looped = attention._looped(True, T)
    median = row["seconds"]
    return row | {
        "chosen": "one by one" if looped else "at once",
        "one_by_one": median["one by one"] / median["at once"],
        "of_torch": median["torch"] / median["one by one" if looped else "at once"],
    }


def main():
    flags = arguments(__doc__, "attention_cpu", ("forward", "gradients")).parse_args()
    quiet_torch()
    rows = old_rows(flags.out)
    key = ("batch", "T", "heads", "kv_heads", "head_dim", "gradients")
    for shape in SHAPES:
        for what in flags.only:
            one = lambda: measure(shape, what == "gradients", flags.repeats)  # noqa: B023, E731
            rows = add_row(rows, key, one)
            write(flags.out, rows, seed=0, torch=torch.__version__, repeats=flags.repeats)


if __name__ == "__main__":
    main()
