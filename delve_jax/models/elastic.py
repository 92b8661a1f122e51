"""Elastic sizes: the first ranks of every map, the first neurons of every MLP are a smaller model.

Factors come ordered from their closed form, the neurons of a pruned MLP by their worth, and stay so
under rank-drop (`train.objective`), which trains a smaller model in every step as well. So one
checkpoint serves many keep ratios: `masked` while it is trained, `shrink` when it is loaded. How
many of each are left at half of the size the allocator has said beforehand (`nested` of the
config); where it has not, all ranks shrink alike. Dense maps stay as they are.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import Config, DelveError, ParentConfig
from . import delve

STEPS = 1024  # shares that are tried


def sizes_at(full, half, share):
    """Sizes (ranks, neurons) at a share: `full` at 1, `half` at 1/2, straight lines, 0 at 0.

    half None: share x full. Rounded up, at least 1 where the half has any. Numbers or traced.
    """
    full = np.array(full)
    half = full / 2 if half is None else np.array(half)
    xp, slack = (np, 1e-6) if isinstance(share, float) else (jnp, 1e-4)  # float32 where traced
    lines = xp.where(share < 0.5, 2 * share * half, half + (2 * share - 1) * (full - half))
    return xp.clip(
        xp.ceil(lines - slack).astype(int), np.ceil(np.minimum(half, 1)).astype(int), full
    )


def masked(cfg: Config, params: dict, share) -> dict:
    """The same tree with all that the model at this share has not set to zero; `share` traced.

    What is cut neither acts nor gets a gradient.
    """
    if cfg.family == "delve":
        streams = {n: masked(sub, params["streams"][n], share) for n, sub in cfg.streams}
        out = {**params, "streams": streams}
        first = cfg.streams[0][1]
        if cfg.codes:  # the long factors, which the streams do not hold
            sizes = sizes_at(first.rank(cfg.codes[0]), _half(first, cfg.codes[0]), share)
            out["codes"] = {t: _zeroed(p, sizes) for t, p in params["codes"].items()}
        return out
    out = params
    for name, ranks in cfg.ranks:
        sizes = sizes_at(ranks, _half(cfg, name), share)
        out = _replaced(cfg, out, name, _zeroed(models.leaf_of(out, name), sizes))
    if (half := _half(cfg, "neurons")) is not None:  # nothing reads those that are cut
        name = models.FAMILY[cfg.family].MLP[-1]
        inside_LF = jnp.arange(cfg.d_ffn) < sizes_at(cfg.neurons, half, share)[:, None]
        out = _replaced(cfg, out, name, _read(models.leaf_of(out, name), inside_LF))
    return out


def _half(cfg: ParentConfig, name: str):
    return dict(cfg.nested).get(name)


def _zeroed(leaf: dict, ranks) -> dict:
    """A map with zeros beyond the ranks: in v, or in u of a map that has no v of its own."""
    name = "v" if "v" in leaf else "u"
    a = leaf[name]
    most = a.shape[-1 if name == "v" else -2]
    inside = jnp.arange(most) < ranks[:, None]  # [L or 1, K]
    inside = inside if a.ndim == 3 else inside[0]
    inside = inside[..., None, :] if name == "v" else inside[..., None]
    return {**leaf, name: a * inside.astype(a.dtype)}


def _read(leaf: dict, inside_LF) -> dict:
    """A map that reads neurons with zeros for those that are cut."""
    name = "v" if "v" in leaf else "kernel"
    return {**leaf, name: leaf[name] * inside_LF[..., None].astype(leaf[name].dtype)}


def _replaced(cfg: ParentConfig, params: dict, name: str, leaf: dict) -> dict:
    """The tree with another leaf as its map `name`."""

    def put(tree, parts):
        first, *rest = parts
        return {**tree, first: put(tree[first], rest) if rest else leaf}

    where = [] if name in ("embed", "head") else ["layers"]
    return put(params, [*where, *name.split("/")])


def config_at(cfg: Config, share: float) -> Config:
    """The config of the model at this share."""
    if cfg.family == "delve":
        streams = tuple((n, config_at(sub, share)) for n, sub in cfg.streams)
        return dataclasses.replace(cfg, streams=streams)

    def sizes(share):
        full = [*cfg.ranks, *([("neurons", cfg.neurons)] if _half(cfg, "neurons") else [])]
        return {n: tuple(map(int, sizes_at(r, _half(cfg, n), share))) for n, r in full}

    new, half = sizes(float(share)), sizes(float(share) / 2)
    nested = tuple(half.items()) if cfg.nested else ()
    if neurons := new.pop("neurons", ()):
        cfg = dataclasses.replace(cfg, neurons=neurons, d_ffn=max(1, *neurons))
    return dataclasses.replace(cfg, ranks=tuple(new.items()), nested=nested)


def shrink(cfg: Config, params: dict, parameters: int) -> tuple[Config, dict]:
    """The largest share of all ranks that needs at most so many parameters -> (config, tree).

    DelveError: no factors in uv form, or even the smallest ranks need more.
    """
    parts = [sub for _, sub in cfg.streams] if cfg.family == "delve" else [cfg]
    if not any(sub.ranks or sub.nested for sub in parts) or any(
        sub.storage != "uv" for sub in parts
    ):
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
    """Zeros beyond each layer's own ranks and neurons."""
    for name, ranks in cfg.ranks:
        if name in skip or min(ranks) == max(ranks):
            continue
        leaf = dict(models.leaf_of(params, name))
        inside_LK = np.arange(max(1, *ranks)) < np.array(ranks)[:, None]
        leaf["v"] = leaf["v"] * inside_LK[:, None].astype(leaf["v"].dtype)
        leaf["u"] = leaf["u"] * inside_LK[:, :, None].astype(leaf["u"].dtype)
        params = _replaced(cfg, params, name, leaf)
    if cfg.neurons and min(cfg.neurons) < cfg.d_ffn:
        inside_LF = np.arange(cfg.d_ffn) < np.array(cfg.neurons)[:, None]
        *makers, reader = models.FAMILY[cfg.family].MLP
        for name in makers:
            leaf = dict(models.leaf_of(params, name))
            for key in leaf.keys() & {"kernel", "u", "bias"}:
                inside = inside_LF if key == "bias" else inside_LF[:, None]
                leaf[key] = leaf[key] * inside.astype(leaf[key].dtype)
            params = _replaced(cfg, params, name, leaf)
        leaf = models.leaf_of(params, reader)
        params = _replaced(cfg, params, reader, _read(leaf, inside_LF))
    return params
