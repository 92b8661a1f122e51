"""Storage forms of factored maps, made after training: pivot gauge and int8 (`models.linear`).

pivot (compression.md section 6; known as PIFA): r columns p of u are chosen so that every other one
is a combination of them, u = u_p [1 T]. Then y_p = x (v u_p) and y_rest = y_p T: the same map in
r (I + O - r) numbers. Where the inputs are the narrow side the same is done to the rows of v.
int8: both balanced factors rounded in steps of their largest entry per rank index / 127.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from ..config import STORAGES, Config, DelveError, Factored
from ..models import leaf_of
from ..models.linear import declared, dims
from .factorize import Array, balance

SWAP = 2.0  # entries of T beyond this are swapped away


class Pivots(NamedTuple):
    """The columns [r] that span u_KO, the others [O-r], and u_rest = u_p t: t [r, O-r]."""

    p: Array
    rest: Array
    t: Array


def pivots(u_KO: Array) -> Pivots:
    """Columns of u in which all columns have coordinates of at most SWAP in size; any rank.

    Pivoted QR, then swaps until no entry is larger (maxvol): each one multiplies the volume of the
    chosen columns by more than SWAP, so they end.
    """
    rank, n_out = u_KO.shape
    if rank > n_out:
        raise DelveError(f"rank {rank} of a map with only {n_out} channels on its narrow side")
    if not rank:
        return Pivots(np.arange(0), np.arange(n_out), np.zeros((0, n_out)))
    # only the row space counts: an orthonormal basis of it also serves where u has a lower rank
    basis_KO = scipy.linalg.qr(u_KO.T, mode="economic")[0].T
    order = scipy.linalg.qr(basis_KO, mode="r", pivoting=True)[1].astype(np.int64)
    coordinates = lambda: np.linalg.solve(basis_KO[:, order[:rank]], basis_KO[:, order[rank:]])  # noqa: E731
    t = coordinates()
    while t.size and np.abs(t).max() > SWAP:
        i, j = np.unravel_index(np.abs(t).argmax(), t.shape)
        order[[i, rank + j]] = order[[rank + j, i]]
        # the exchange step of the simplex method: t of the swapped order without another solve
        column, row = t[:, j] / t[i, j], t[i].copy()
        t -= np.outer(column, row)
        t[i], t[:, j] = row / row[j], -column
        t[i, j] = 1 / row[j]
    return Pivots(order[:rank], order[rank:], coordinates())


def quantised(v_IK: Array, u_KO: Array) -> dict[str, Array]:
    """int8 factors and the one scale of each rank index, the product of its two step sizes.

    Scales are the largest entries over 127. Fitting each to the activations by least squares
    instead was measured on the proxies and changes nothing that can be seen (see the tests).
    """
    v_IK, u_KO = balance(v_IK, u_KO)
    step_v = np.abs(v_IK).max(0, initial=0) / 127
    step_u = np.abs(u_KO).max(1, initial=0) / 127
    whole = lambda a, step: np.rint(np.divide(a, step, out=np.zeros_like(a), where=step > 0))  # noqa: E731
    return {
        "v_q": whole(v_IK, step_v[None]),
        "u_q": whole(u_KO, step_u[:, None]),
        "q_scale": step_v * step_u,
    }


def _pivoted(v_IK: Array, u_KO: Array, shapes: dict) -> dict[str, Array]:
    """One layer in the pivot form, laid out in the stack's shapes (padded rank, smallest rank)."""
    (n_in, rank), k = v_IK.shape, next(iter(shapes.values()))[0][1]
    if "u_rest" in shapes:
        p, rest, t = pivots(u_KO)
        order = np.zeros(u_KO.shape[1])
        order[p], order[rest] = np.arange(rank), k + np.arange(len(rest))
        return {"v": v_IK @ u_KO[:, p], "u_rest": t, "order": order}
    p, rest, t = pivots(v_IK.T)
    order = np.zeros(shapes["order"][0])  # what pads it meets zero rows of u
    order[:rank], order[k : k + n_in - rank] = p, rest
    return {"v_rest": t.T, "u": v_IK[p] @ u_KO, "order": order}


def factors(leaf: dict, rank: int) -> tuple[Array, Array]:
    """(v [I, rank], u [rank, O]), float64, of one layer of a factored map in any form."""
    leaf = {name: np.asarray(a).astype(np.float64) for name, a in leaf.items()}
    if "v_q" in leaf:
        return balance(leaf["v_q"][:, :rank] * leaf["q_scale"][:rank], leaf["u_q"][:rank])
    if "order" not in leaf:
        return leaf["v"][:, :rank], leaf["u"][:rank]
    order = leaf["order"].astype(int)
    if "u_rest" in leaf:
        k = leaf["u_rest"].shape[0]
        u_KO = np.concatenate([np.eye(k), leaf["u_rest"]], axis=1)[:rank, order]
        return balance(leaf["v"][:, :rank], u_KO)
    k, n_in = leaf["v_rest"].shape[1], order.max() + 1
    v_IK = np.empty((n_in, rank))
    v_IK[order[:rank]] = np.eye(rank)
    v_IK[order[k : k + n_in - rank]] = leaf["v_rest"][: n_in - rank, :rank]
    return balance(v_IK, leaf["u"][:rank])


def _converted(leaf: dict, name: str, ranks: tuple[int, ...], form: str) -> dict:
    """The parameters of one map, all layers, in another form; the bias as it is."""
    stacked = name not in ("embed", "head")
    layers = [
        factors({k: a[i] if stacked else a for k, a in leaf.items() if k != "bias"}, rank)
        for i, rank in enumerate(ranks)
    ]
    how = Factored(max(1, *ranks), min(ranks), form)
    shapes = declared(*dims(leaf, how.least), how, table=name == "embed")
    dtype = next(np.dtype(a.dtype) for k, a in leaf.items() if k in ("v", "u", "q_scale"))
    kinds = {"factor": dtype, "int8": np.int8, "order": np.int32, "scale": np.float32}
    out = {k: np.zeros((len(ranks), *shape), kinds[kind]) for k, (shape, kind) in shapes.items()}
    for i, (v_IK, u_KO) in enumerate(layers):
        if form == "uv":
            made = {"v": v_IK, "u": u_KO}
        elif form == "int8":
            made = quantised(v_IK, u_KO)
        else:
            made = _pivoted(v_IK, u_KO, shapes)
        for k, a in made.items():
            out[k][i][tuple(map(slice, a.shape))] = a
    out = {k: jnp.asarray(a if stacked else a[0]) for k, a in out.items()}
    return out | {k: a for k, a in leaf.items() if k == "bias"}


def convert(cfg: Config, params: dict, form: str) -> tuple[Config, dict]:
    """The same model with its factored maps stored as `form`: "uv", "pivot" or "int8".

    pivot computes the same up to rounding in r (I + O - r) numbers a map; int8 rounds the factors
    to one byte each. Both run everywhere but are not trained: convert back to "uv" first. Factors
    keep their dtype (those made of int8 are float32) and come back on the default device.
    """
    if form not in STORAGES:
        raise DelveError(f"--storage {form}: unknown; available are {', '.join(STORAGES)}")
    if cfg.family == "delve":
        if cfg.codes and form != "uv":
            raise DelveError(
                f"--storage {form}: the streams share their vocabulary tables, which have the uv "
                "form alone; convert the parents before they are fused, or fuse without --codes"
            )
        pairs = {n: convert(sub, params["streams"][n], form) for n, sub in cfg.streams}
        cfg = dataclasses.replace(cfg, streams=tuple((n, c) for n, (c, _) in pairs.items()))
        return cfg, {**params, "streams": {n: p for n, (_, p) in pairs.items()}}
    if form == cfg.storage:
        return cfg, params
    for name, ranks in cfg.ranks:
        path = name.split("/") if name in ("embed", "head") else ["layers", *name.split("/")]
        params = _with(params, path, _converted(leaf_of(params, name), name, ranks, form))
    return dataclasses.replace(cfg, storage=form), params


def _with(tree: dict, path: list[str], leaf: dict) -> dict:
    """The tree with another dictionary at this path."""
    return {**tree, path[0]: _with(tree[path[0]], path[1:], leaf) if path[1:] else leaf}
