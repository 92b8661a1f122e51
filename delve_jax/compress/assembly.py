"""The compressed parent, put together layer by layer from the factors at their chosen sizes.

Stacks stand in memory, or as files of a folder whose pages the system takes back when it needs
room: then one layer and its factors are all that is held, whatever the model's size.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import ParentConfig
from . import device
from .allocate import Plan
from .moments import Student
from .spectra import TABLES, Spectra, at


class Assembled(NamedTuple):
    """What came out of it; errors and spectra by map, in the order of the plan."""

    cfg: ParentConfig
    params: dict
    errors: dict[str, list[float]]  # relative RMS, in the metric of the method
    spectra: dict[str, np.ndarray]  # sigma^2 [L, min(I, O)], float64


def config(cfg: ParentConfig, plan: Plan) -> ParentConfig:
    """The config of a dense parent at the plan's ranks and neurons."""
    new = dataclasses.replace(cfg, ranks=tuple(plan.ranks.items()), nested=plan.nested)
    if not plan.neurons:
        return new
    return dataclasses.replace(new, d_ffn=max(1, *plan.neurons), neurons=plan.neurons)


def assemble(
    source, spectra: Spectra | None, plan: Plan, folder: Path | None = None, tick=lambda: None,
    anchor=None,
) -> Assembled:  # fmt: skip
    """The parent of `source` at the plan's sizes; spectra None: dense, as it is.

    Leaves keep their dtype. folder: where the stacks become files (None: they stay in memory).
    anchor: (config, everything but the layers) -> `anchor.Anchor`, which fits every layer again.
    """
    new, layers = config(source.cfg, plan), range(source.cfg.n_layers)
    shapes = models.abstract_params(new)
    errors, whole = {}, {}

    def shrunk(name: str, index: int, leaf: dict) -> dict:
        rank = plan.ranks[name][index]
        fit = spectra.factors(name, index, rank, leaf["kernel"])
        errors.setdefault(name, []).append(fit.error)
        whole.setdefault(name, []).append(fit.spectrum)
        dtype = leaf["kernel"].dtype
        out = {"v": fit.v_IK.astype(dtype), "u": fit.u_KO.astype(dtype)}
        if "bias" in leaf:
            shift = 0.0 if fit.bias_O is None else fit.bias_O
            bias = np.asarray(leaf["bias"], np.float64) + shift
            out["bias"] = bias.astype(leaf["bias"].dtype)
        return out

    top = source.outer()
    for name in plan.ranks:
        if name in TABLES:
            top = {**top, name: shrunk(name, 0, top[name])}
    again = None if anchor is None else anchor(new, top)
    params = {name: _filled(_stacks(name, tree, shapes[name], folder), tree)
              for name, tree in top.items()}  # fmt: skip
    del top
    stacks = None
    for index in layers:
        layer = source.layer(index)
        for name in plan.ranks:
            if name not in TABLES:
                layer = replaced(layer, name, shrunk(name, index, at(layer, name)))
        if plan.neurons:
            layer = _pruned(spectra, index, plan.neurons[index], layer)
        if again is not None:
            layer = again.layer(index, layer)
        if stacks is None:
            stacks = _stacks("layers", layer, shapes["layers"], folder)
        _filled(jax.tree.map(lambda a, i=index: a[i], stacks), layer)
        tick()
    put = jnp.asarray if folder is None else _on_host
    params = jax.tree.map(put, {**params, "layers": stacks})
    return Assembled(new, params, errors, {name: np.stack(rows) for name, rows in whole.items()})


def student(out: Assembled) -> Student:
    """What was assembled, in the parent's own shapes: the programs that run the parent run it."""
    top = {name: tree for name, tree in out.params.items() if name != "layers"}
    stacks = jax.tree.map(np.asarray, out.params["layers"])
    return Student(
        lambda index, like: _as_dense(jax.tree.map(lambda a: a[index], stacks), like),
        lambda like: _as_dense({name: top[name] for name in like}, like),
    )


def _as_dense(tree: dict, like: dict) -> dict:
    """Factors multiplied out, and zeros for the neurons that went, which do nothing."""
    if "v" in tree and "u" in tree:  # "v" alone: attention's map of values
        tree = {"kernel": device.product(tree["v"], tree["u"]),
                **{key: a for key, a in tree.items() if key == "bias"}}  # fmt: skip
    out = {}
    for name, a in tree.items():
        if isinstance(a, dict):
            out[name] = _as_dense(a, like[name])
        else:
            grow = [(0, most - n) for n, most in zip(a.shape, like[name].shape, strict=True)]
            a = np.pad(a, grow) if any(n for _, n in grow) else a
            out[name] = device.put(a) if device.on() else jax.device_put(a)
    return out


def replaced(tree: dict, name: str, leaf: dict) -> dict:
    """The tree with another leaf as its map `name` ("att/key")."""
    first, _, rest = name.partition("/")
    return {**tree, first: replaced(tree[first], rest, leaf) if rest else leaf}


def _pruned(spectra: Spectra, index: int, keep: int, layer: dict) -> dict:
    """The layer with `keep` of its MLP's neurons, the map that reads them refitted."""
    *makers, reader = spectra.mlp
    old = at(layer, reader)
    kept_K, down_KO, shift_O = spectra.pruning(index).repaired(keep, old["kernel"])
    for name in makers:  # kernel [D, F], bias [F]
        leaf = {key: np.asarray(a)[..., kept_K] for key, a in at(layer, name).items()}
        layer = replaced(layer, name, leaf)
    leaf = {"kernel": down_KO.astype(old["kernel"].dtype)}
    if "bias" in old:
        bias = np.asarray(old["bias"], np.float64) + shift_O
        leaf["bias"] = bias.astype(old["bias"].dtype)
    return replaced(layer, reader, leaf)


def _stacks(name: str, tree: dict, shapes: dict, folder: Path | None) -> dict:
    """Zeros of these shapes in the dtypes of `tree`; beyond a layer's own size they stay zero."""

    def empty(path, leaf, shape) -> np.ndarray:
        dtype = np.dtype(leaf.dtype)
        if folder is None or not np.prod(shape.shape):
            return np.zeros(shape.shape, dtype)
        file = folder / f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}.bin"
        return np.memmap(file, dtype, "w+", shape=shape.shape)

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return jax.tree.map_with_path(empty, tree, shapes)


def _filled(places: dict, tree: dict) -> dict:
    """Every array of the tree written to its place, where it may be smaller than that."""

    def fill(place, leaf):
        place[tuple(map(slice, leaf.shape))] = np.asarray(leaf)
        return place

    return jax.tree.map(fill, places, tree)


def _on_host(stack: np.ndarray) -> jax.Array:
    """A file as an array of the host's own device, which takes the mapping over without a copy."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # a process that was told to use an accelerator alone
        host = None
    return jax.device_put(np.asarray(stack), host)
