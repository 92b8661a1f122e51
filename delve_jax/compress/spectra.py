"""Factors of every map at every rank, made once per parent and kept on disk: any keep ratio slices.

A `Spectra` folder holds one file per layer and per vocabulary table. Each gets its name when it is
whole, so that a killed run goes on with the next one and ends with the same bits. Memory: one
layer, its Grams, and the activations of one boundary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from .. import metrics
from ..config import DelveError, ParentConfig, to_json
from . import baselines, behind, device, factorize, prune, vocab
from .allocate import Map
from .factorize import Array, Factors
from .moments import HeadMoments, Moments, Sweep

TABLES = ("embed", "head")
FLOOR = float(np.finfo(np.float32).eps)  # of a spectrum: the Grams were summed in float32
FORMAT = 2  # of the files; folders of another are refused, not half understood (2: "grad:" arrays)


class Recipe(NamedTuple):
    """How one map is factored: what the sweep collects, and the functions that use it."""

    activations: bool  # plain SVD needs none
    metric: bool  # gradients, for the two-sided form
    inputs: bool  # Grams over the inputs of every map
    body: Callable  # (kernel_IO, rank, Moments | None, bias_O | None) -> Factors
    table: Callable  # (name, kernel, rank, HeadMoments | None, p_V | None, tied) -> Factors
    neurons: Callable | None = None  # (kernel_FO, Moments, has a bias) -> Pruning


def recipe(method: str, metric: bool = True, centred: bool = True) -> Recipe:
    """The recipe of a method; metric and centred (bias taken up) are parts of "delve" alone."""
    if method == "svd":
        return Recipe(False, False, False, lambda w, r, m, b: factorize.svd(w, r, b),
                      lambda name, w, r, h, p, tied: factorize.svd(w, r))  # fmt: skip
    if method == "asvd":
        return Recipe(
            True, False, False,
            lambda w, r, m, b: baselines.asvd(w, r, m.abs_I, bias_O=b), _asvd_table,
        )  # fmt: skip
    if method == "svd-llm":
        return Recipe(
            True, False, True,
            lambda w, r, m, b: baselines.svd_llm(w, r, m.inputs, b, m.count), _svd_llm_table,
        )  # fmt: skip

    def body(w, rank, m: Moments, b):
        return factorize.factor(
            w, rank, m.gram, over=m.over, mean_I=m.mean_I if centred else None, bias_O=b,
            grad=m.grad, floor=FLOOR,
        )  # fmt: skip

    def neurons(w, m: Moments, has_bias: bool):
        return prune.ordered(
            m.inputs, w, mean_F=m.mean_I if centred and has_bias else None, grad_OO=m.grad,
            floor=FLOOR,
        )  # fmt: skip

    return Recipe(True, metric, False, body, _table, neurons)


def _table(name, kernel, rank, head: HeadMoments, p_V, tied) -> Factors:
    """Ours: rows by frequency or prediction, columns by the metric and the head's inputs."""
    predicted = p_V if head.mean_p_V is None else head.mean_p_V
    if name == "head":
        return vocab.factor_head(kernel, head.gram, vocab.weights(predicted), rank)
    if tied:
        w_V = vocab.weights((p_V + predicted) / 2)
        return vocab.factor_tied(kernel, head.gram, w_V, rank, head.embed_grad)
    return vocab.factor_embed(kernel, vocab.weights(p_V), rank, head.embed_grad)


def _asvd_table(name, kernel, rank, head: HeadMoments, p_V, tied) -> Factors:
    """An input table is a linear map of one-hot rows; a tied one is scaled as the head it is."""
    if name == "embed" and tied:
        fit = baselines.asvd(np.asarray(kernel).T, rank, head.abs_D)
        return fit._replace(v_IK=fit.u_KO.T, u_KO=fit.v_IK.T)
    return baselines.asvd(kernel, rank, head.abs_D if name == "head" else p_V)


def _svd_llm_table(name, kernel, rank, head: HeadMoments, p_V, tied, count=1.0) -> Factors:
    """As `_asvd_table`, whitened by the Gram of the table's inputs (one-hot: diagonal)."""
    if name == "embed" and tied:
        fit = baselines.svd_llm(np.asarray(kernel).T, rank, head.gram, count=count)
        return fit._replace(v_IK=fit.u_KO.T, u_KO=fit.v_IK.T)
    gram = head.gram if name == "head" else p_V + vocab.SMOOTH  # unseen words have no frequency
    return baselines.svd_llm(kernel, rank, gram, count=count)


class InMemory:
    """A parent whose parameters are all there, as a source of layers."""

    def __init__(self, cfg: ParentConfig, params: dict):
        self.cfg = cfg
        # a slice of a CPU device's array would be compiled, once for every shape
        on_host = jax.default_backend() == "cpu"
        self._params = jax.tree.map(np.asarray, params) if on_host else params

    def outer(self) -> dict:
        """Everything but the layers."""
        outer = {name: tree for name, tree in self._params.items() if name != "layers"}
        return jax.tree.map(jax.device_put, outer)

    def layer(self, index: int) -> dict:
        """The parameters of one layer."""
        return jax.tree.map(lambda a: jax.device_put(a[index]), self._params["layers"])


def fingerprint(source, tick=lambda: None) -> str:
    """sha256 of all parameters, the same wherever they come from; DelveError where one is NaN.

    Checked before anything runs: after the passes a NaN would name the head alone.
    """
    digest = hashlib.sha256()
    for index in range(-1, source.cfg.n_layers):
        tree = source.outer() if index < 0 else source.layer(index)
        for path, leaf in jax.tree.leaves_with_path(tree):
            name, a = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)
            digest.update(f"{index} {name} {a.shape} {a.dtype}".encode())
            digest.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)
            if not np.isfinite(a).all():
                name = name.removesuffix("/kernel")
                where = f"map {name}" if index < 0 else f"layer {index}, map {name}"
                raise DelveError(
                    f"{where}: NaN or Inf in the weights; the source checkpoint is damaged"
                )
        tick()
    return digest.hexdigest()


def at(tree: dict, name: str) -> dict:
    """The map `name` ("att/key") of a layer's tree."""
    for part in name.split("/"):
        tree = tree[part]
    return tree


class Spectra:
    """All factors of a parent under one recipe, from `folder` or made now.

    body, tables: the maps that can be factored. tokens_NT: calibration windows (None: not needed).
    mlp: maps of the MLP whose neurons are put in order as well, the one that reads them last.
    """

    def __init__(self, source, body: list[Map], tables: list[Map], tokens_NT, folder: Path,
                 how: Recipe, key: dict, seed: int = 0, progress: bool = True,
                 mlp: tuple[str, ...] = ()):  # fmt: skip
        self.source, self.cfg, self.how, self.folder = source, source.cfg, how, Path(folder)
        self.body, self.tables, self.mlp = body, tables, mlp
        self.sweep = None
        self.tokens = tokens_NT
        if how.activations:
            inputs = how.inputs or mlp[-1:]
            self.sweep = Sweep(source, tokens_NT, self.folder, inputs=inputs, seed=seed)
        self.bar = functools.partial(metrics.progress, unit="layer", hide=not progress)
        self._kept = {}  # the factors read last: candidates of one map come together
        windows = shape = None
        if tokens_NT is not None:
            windows, shape = hashlib.sha256(tokens_NT.tobytes()).hexdigest(), tokens_NT.shape
        if device.on() and how.metric and self._missing():
            self._ahead()
        with self.bar(self.cfg.n_layers + 1, "read the weights") as bar:
            parent = fingerprint(source, bar.update)
        # the weights run as the config says; of what it says beside, dtypes are in `parent`
        config = to_json(dataclasses.replace(self.cfg, dtype="", hf_config=""))
        self._claim({**key, "seed": seed, "parent": parent, "config": config,
                     "tokens": windows, "windows": shape})  # fmt: skip
        self._make()

    def _ahead(self) -> None:
        """Have the programs of the passes and of the closed form compiled, all at the same time."""
        self.sweep.ahead()
        layer, outer = self.source.layer(0), self.source.outer()
        leaves = [at(layer, m.name) for m in self.body]
        leaves += [outer[m.name] for m in self.tables if m.name == "embed"]
        for (n_in, n_out), biased in {(a["kernel"].shape, "bias" in a) for a in leaves}:
            over, eye = ("inputs" if n_out > n_in else "outputs"), np.eye(min(n_in, n_out))
            if device.takes(len(eye)):
                w_IO, mean_I = np.zeros((n_in, n_out), np.float32), np.zeros(n_in)
                device.ahead("two_sided", w_IO, 1, eye, over, eye, factorize.DAMPING,
                             mean_I if biased else None)  # fmt: skip

    def _claim(self, key: dict) -> None:
        """Refuse a folder that was made from something else, or by another version."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**key, "format": FORMAT}, sort_keys=True)
        file = self.folder / "key.json"
        if file.exists() and file.read_text() != text:
            raise DelveError(f"{self.folder}: holds factors of another parent, text, method or "
                             "version; remove it or name another folder")  # fmt: skip
        file.write_text(text)
        self.key = hashlib.sha256(text.encode()).hexdigest()

    def _missing(self) -> list[int]:
        """Layers without factors."""
        return [i for i in range(self.cfg.n_layers) if not self._file(i).exists()]

    def _make(self) -> None:
        L = self.cfg.n_layers
        missing = self._missing()
        whole = all(self._file(m.name).exists() for m in self.tables)
        if not missing and whole and (not self.how.metric or self._file("lookups").exists()):
            return
        if self.how.metric:
            head = self._two_sided(missing)
        else:
            with self.bar(L, "factors") as bar:
                for i, sown in self.sweep.forward() if self.sweep else ((i, None) for i in missing):
                    if i == "head":
                        head = sown
                    elif i in missing:
                        self._layer(i, sown)
                    bar.update(i != "head")
            head = head if self.sweep else None
        self._tables(head)
        if self.how.metric:
            self.sweep.drop(-1)
        behind.wait()

    def _two_sided(self, missing: list[int]) -> HeadMoments:
        """Forward once, keeping boundaries; then from the head back to the first layer."""
        L, done, lookups = self.cfg.n_layers, self._file("moments"), self._file("lookups")
        if not missing and done.exists() and lookups.exists():
            return self.head()
        # the way back goes on from here; an accelerator that was stopped has forgotten it
        top = max(missing, default=-1) + 1
        there = self.sweep.has("g", top) and all(self.sweep.has("x", i) for i in missing)
        if not (done.exists() and there):
            with self.bar(self.cfg.n_layers + 1, "forward") as bar:
                self.sweep.boundaries(bar.update)
            with self.bar(self.tokens.size, "head", unit="token") as bar:
                gram, abs_D, mean_p_V = self.sweep.head(bar.update)
            behind.do(write_arrays, done, gram=gram, abs=abs_D, p=mean_p_V)
        with self.bar(L, "back, factors") as bar:
            for i in reversed(range(L)):
                if i in missing:
                    self._layer(i, self.sweep.layer(i))
                elif not there:
                    self.sweep.layer(i)  # for the gradient at its input
                self.sweep.drop(i)
                bar.update()
        if not lookups.exists():
            behind.do(write_arrays, lookups, grad=self.sweep.embed_grad())
        behind.wait()
        return self.head()

    def head(self) -> HeadMoments:
        """Moments of the vocabulary tables, of a recipe with a metric."""
        with np.load(self._file("moments")) as kept, np.load(self._file("lookups")) as rows:
            return HeadMoments(kept["gram"], kept["abs"], kept["p"], rows["grad"])

    def _layer(self, index: int, sown: dict[str, Moments] | None) -> None:
        layer, out = self.source.layer(index), {}
        for m in self.body:
            leaf = at(layer, m.name)
            kernel = leaf["kernel"]
            if not device.on():
                kernel = np.asarray(kernel).astype(np.float64)
            bias = np.asarray(leaf["bias"], np.float64) if "bias" in leaf else None
            moments = None if sown is None else sown[m.name]
            fit = self.how.body(kernel, m.max_rank, moments, bias)
            # the mean only where the bias takes up what is lost on it
            shifted = fit.bias_O is not None and not np.array_equal(fit.bias_O, bias)
            out |= _pack(m.name, fit, moments.mean_I if shifted else None)
            if moments is not None and moments.grad is not None:  # for the second pass
                out[f"grad:{m.name}"] = moments.grad.astype(np.float32)
        if self.mlp:
            leaf = at(layer, self.mlp[-1])
            order = self.how.neurons(leaf["kernel"], sown[self.mlp[-1]], "bias" in leaf)
            out |= {f"neurons:{k}": a for k, a in order.packed().items()}
        behind.do(write_arrays, self._file(index), **out)

    def _tables(self, head: HeadMoments | None) -> None:
        p_V = None if self.tokens is None else vocab.frequencies(self.tokens, self.cfg.vocab_size)
        with self.bar(len(self.tables), "tables", unit="table") as bar:
            for m in self.tables:
                if not self._file(m.name).exists():
                    kernel = np.asarray(self.source.outer()[m.name]["kernel"])
                    tied = self.cfg.tie_embeddings
                    fit = self.how.table(m.name, kernel, m.max_rank, head, p_V, tied)
                    write_arrays(self._file(m.name), **_pack(m.name, fit, None))
                bar.update()

    def _file(self, what: int | str) -> Path:
        name = f"layer-{what:04d}" if isinstance(what, int) else what
        return self.folder / f"{name}.npz"

    def curves(self, measure: Callable[[], dict]) -> dict[str, tuple[float, float]]:
        """What `curves.measure` gives for these factors; measured once."""
        file = self.folder / "curves.json"
        if not file.exists():
            half = file.with_suffix(".writing")
            half.write_text(json.dumps(measure()))
            half.replace(file)
        return {name: tuple(ab) for name, ab in json.loads(file.read_text()).items()}

    def spectrum(self, name: str, layer: int = 0) -> Array:
        """All sigma^2 of a map, descending, float64."""
        with np.load(self._file(name if name in TABLES else layer)) as kept:
            return kept[f"{name}:spectrum"]

    def factors(self, name: str, layer: int, rank: int, kernel_IO=None) -> Factors:
        """Factors of a map at a rank, as a slice; bias_O is what to ADD to its bias (or None)."""
        kept = self._kept.get((name, layer))
        if kept is None:
            # an accelerator waits for what is read, and gets the maps of a layer at many ranks
            self._kept = {k: a for k, a in self._kept.items() if device.on() and k[1] == layer}
            with np.load(self._file(name if name in TABLES else layer)) as file:
                of_map = [key for key in file.files if key.startswith(f"{name}:")]
                kept = {key.removeprefix(f"{name}:"): file[key] for key in of_map}
            if device.on() or name not in TABLES:  # those of a 7B parent are a gigabyte each
                self._kept[name, layer] = kept
        v, u, shift = kept["v"][:, :rank], kept["u"][:rank], None
        if "mean" in kept:
            shift = kept["mean"] @ np.asarray(kernel_IO, np.float64) - (kept["mean"] @ v) @ u
        return Factors(v, u, shift, kept["spectrum"])

    def grads(self, layer: int) -> dict[str, Array]:
        """{map: the metric that it was factored in, as in `Moments.grad`}; {} without a metric."""
        with np.load(self._file(layer)) as kept:
            names = [key for key in kept.files if key.startswith("grad:")]
            return {key.removeprefix("grad:"): kept[key] for key in names}

    def pruning(self, layer: int) -> prune.Pruning:
        """The neurons of a layer's MLP in order."""
        with np.load(self._file(layer)) as kept:
            names = [k for k in kept.files if k.startswith("neurons:")]
            return prune.Pruning(**{k.removeprefix("neurons:"): kept[k] for k in names})


def _pack(name: str, fit: Factors, mean_I) -> dict[str, Array]:
    out = {f"{name}:v": fit.v_IK.astype(np.float32), f"{name}:u": fit.u_KO.astype(np.float32),
           f"{name}:spectrum": fit.spectrum}  # fmt: skip
    return out if mean_I is None else {**out, f"{name}:mean": mean_I}


def write_arrays(file: Path, **arrays) -> None:
    half = file.with_suffix(".writing")
    with half.open("wb") as out:
        np.savez(out, **arrays)
    half.replace(file)
