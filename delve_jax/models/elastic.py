"""Elastic ranks: the first components of every factored map are a smaller model.

Factors come ordered from their closed form and stay so under rank-drop (`train.objective`), which
trains the first r' of r ranks as often as all. So one checkpoint serves many keep ratios: `masked`
while it is trained, `shrink` when it is loaded. Maps that are dense, and pruned MLPs, stay as they
are, which bounds how small it gets.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import Config, DelveError, ParentConfig
from . import delve

STEPS = 1024  # shares of the ranks that are tried


def ranks_at(ranks, share):
    """ceil(share r), at least 1, of each rank (0 stays 0); numbers or traced."""
    if isinstance(share, float):
        return tuple(min(r, max(1, math.ceil(share * r - 1e-6))) for r in ranks)
    r_L = jnp.array(ranks)
    return jnp.clip(jnp.ceil(share * r_L - 1e-4).astype(int), jnp.minimum(r_L, 1), r_L)


def masked(cfg: Config, params: dict, share) -> dict:
    """The same tree, every factored map cut to this share of its ranks by zeros; `share` traced.

    What is cut neither acts nor gets a gradient.
    """
    if cfg.family == "delve":
        streams = {n: masked(sub, params["streams"][n], share) for n, sub in cfg.streams}
        out = {**params, "streams": streams}
        if cfg.codes:  # the long factors, which the streams do not hold
            rank = cfg.streams[0][1].rank(cfg.codes[0])
            out["codes"] = {t: _zeroed(p, rank, share) for t, p in params["codes"].items()}
        return out
    out = params
    for name, ranks in cfg.ranks:
        out = _replaced(cfg, out, name, _zeroed(models.leaf_of(out, name), ranks, share))
    return out


def _zeroed(leaf: dict, ranks, share) -> dict:
    """A map with zeros beyond the share: in v, or in u of a map that has no v of its own."""
    name = "v" if "v" in leaf else "u"
    a = leaf[name]
    most = a.shape[-1 if name == "v" else -2]
    inside = jnp.arange(most) < ranks_at(ranks, share)[:, None]  # [L or 1, K]
    inside = inside if a.ndim == 3 else inside[0]
    inside = inside[..., None, :] if name == "v" else inside[..., None]
    return {**leaf, name: a * inside.astype(a.dtype)}


def _replaced(cfg: ParentConfig, params: dict, name: str, leaf: dict) -> dict:
    """The tree with another leaf as its map `name`."""

    def put(tree, parts):
        first, *rest = parts
        return {**tree, first: put(tree[first], rest) if rest else leaf}

    where = [] if name in ("embed", "head") else ["layers"]
    return put(params, [*where, *name.split("/")])


def config_at(cfg: Config, share: float) -> Config:
    """The config at this share of all ranks."""
    if cfg.family == "delve":
        streams = tuple((n, config_at(sub, share)) for n, sub in cfg.streams)
        return dataclasses.replace(cfg, streams=streams)
    ranks = tuple((name, ranks_at(r, float(share))) for name, r in cfg.ranks)
    return dataclasses.replace(cfg, ranks=ranks)


def shrink(cfg: Config, params: dict, parameters: int) -> tuple[Config, dict]:
    """The largest share of all ranks that needs at most so many parameters -> (config, tree).

    DelveError: no factors in uv form, or even the smallest ranks need more.
    """
    parts = [sub for _, sub in cfg.streams] if cfg.family == "delve" else [cfg]
    if not any(sub.ranks for sub in parts) or any(sub.storage != "uv" for sub in parts):
        raise DelveError("--keep: only a factored checkpoint in uv form can be loaded smaller")
    if models.count(cfg) <= parameters:
        return cfg, params
    low, high = 0, STEPS  # count is monotone in the share
    while high - low > 1:
        middle = (low + high) // 2
        fits = models.count(config_at(cfg, middle / STEPS)) <= parameters
        low, high = (middle, high) if fits else (low, middle)
    if not low:
        least = models.count(config_at(cfg, 1 / STEPS))
        raise DelveError(
            f"--keep: {parameters:,} parameters are asked for, the smallest ranks need {least:,} "
            "(dense maps stay as they are)"
        )
    return config_at(cfg, low / STEPS), _cut(cfg, config_at(cfg, low / STEPS), params)


def _cut(cfg: Config, new: Config, params: dict) -> dict:
    """Every array cut to the shape that the smaller config gives it, zeros beyond unequal ranks."""
    shapes = models.abstract_params(new)

    def cut(a, shape):
        return a[tuple(map(slice, shape.shape))]

    def of(tree, like):
        return {
            k: of(a, like[k]) if isinstance(a, dict) else cut(a, like[k]) for k, a in tree.items()
        }

    out = of(params, shapes)
    # layers of unequal ranks: what the slice of the longest left beyond a layer's own
    if new.family != "delve":
        return _tidy(new, out)
    streams = delve.whole(new, out)
    tidy = {n: _tidy(sub, streams[n], set(new.codes)) for n, sub in new.streams}
    own = {n: {**p, **{t: out["streams"][n][t] for t in new.codes}} for n, p in tidy.items()}
    return {**out, "streams": own}


def _tidy(cfg: ParentConfig, params: dict, skip=()) -> dict:
    for name, ranks in cfg.ranks:
        if name in skip or min(ranks) == max(ranks):
            continue
        leaf = dict(models.leaf_of(params, name))
        inside_LK = np.arange(max(1, *ranks)) < np.array(ranks)[:, None]
        leaf["v"] = leaf["v"] * inside_LK[:, None].astype(leaf["v"].dtype)
        leaf["u"] = leaf["u"] * inside_LK[:, :, None].astype(leaf["u"].dtype)
        params = _replaced(cfg, params, name, leaf)
    return params
