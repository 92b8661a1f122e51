"""Factors of every map at every rank, made once per parent and kept on disk: any keep ratio slices.

A `Spectra` folder holds one file per layer and per vocabulary table. Each gets its name when it is
whole, so that a killed run goes on with the next one and ends with the same bits. Memory: one
layer, its Grams, and the activations of one boundary.
"""

from __future__ import annotations

import hashlib
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ..config import DelveError, ParentConfig
from . import baselines, factorize, vocab
from .allocate import Map
from .factorize import Array, Factors
from .moments import HeadMoments, Moments, Sweep

TABLES = ("embed", "head")
FLOOR = float(np.finfo(np.float32).eps)  # of a spectrum: the Grams were summed in float32


class Recipe(NamedTuple):
    """How one map is factored: what the sweep collects, and the two functions that use it."""

    activations: bool  # plain SVD needs none
    metric: bool  # gradients, for the two-sided form
    inputs: bool  # Grams over the inputs of every map
    body: Callable  # (kernel_IO, rank, Moments | None, bias_O | None) -> Factors
    table: Callable  # (name, kernel, rank, HeadMoments | None, p_V | None, tied) -> Factors


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

    return Recipe(True, metric, False, body, _table)


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
        self.cfg, self._params = cfg, params

    def outer(self) -> dict:
        """Everything but the layers."""
        return {name: tree for name, tree in self._params.items() if name != "layers"}

    def layer(self, index: int) -> dict:
        """The parameters of one layer."""
        return jax.tree.map(operator.itemgetter(index), self._params["layers"])

    def fingerprint(self) -> str:
        """sha256 of all parameters."""
        digest = hashlib.sha256()
        for path, leaf in jax.tree.leaves_with_path(self._params):
            digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
            digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        return digest.hexdigest()


def at(tree: dict, name: str) -> dict:
    """The map `name` ("att/key") of a layer's tree."""
    for part in name.split("/"):
        tree = tree[part]
    return tree


class Spectra:
    """All factors of a parent under one recipe, from `folder` or made now.

    body, tables: the maps that can be factored. tokens_NT: calibration windows (None: not needed).
    """

    def __init__(self, source, body: list[Map], tables: list[Map], tokens_NT, folder: Path,
                 how: Recipe, key: dict, seed: int = 0, progress: bool = True):  # fmt: skip
        self.source, self.cfg, self.how, self.folder = source, source.cfg, how, Path(folder)
        self.body, self.tables = body, tables
        self.sweep = None
        self.tokens = tokens_NT
        if how.activations:
            self.sweep = Sweep(source, tokens_NT, self.folder, inputs=how.inputs, seed=seed)
        windows = None if tokens_NT is None else hashlib.sha256(tokens_NT.tobytes()).hexdigest()
        self._claim({**key, "seed": seed, "parent": source.fingerprint(), "tokens": windows})
        self._make(progress)

    def _claim(self, key: dict) -> None:
        """Refuse a folder that was made from something else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, text = self.folder / "key.json", json.dumps(key, sort_keys=True)
        if file.exists() and file.read_text() != text:
            raise DelveError(f"{self.folder}: holds factors of another parent, text or method; "
                             "remove it or name another folder")  # fmt: skip
        file.write_text(text)

    def _make(self, progress: bool) -> None:
        L, steps = self.cfg.n_layers, self.cfg.n_layers + 1
        missing = [i for i in range(L) if not self._file(i).exists()]
        tables = [m for m in self.tables if not self._file(m.name).exists()]
        if not missing and not tables:
            return
        two = self.how.metric
        with tqdm(total=steps + two * steps, desc="compress", unit="layer", file=sys.stderr,
                  disable=not progress) as bar:  # fmt: skip
            if not self.how.activations:
                for i in range(L):
                    self._layer(i, None)
                    bar.update()
                self._tables(None)
            elif two:
                self._two_sided(bar)
            else:
                for where, sown in self.sweep.forward():
                    if where == "head":
                        self._tables(sown)
                    elif not self._file(where).exists():
                        self._layer(where, sown)
                    bar.update()

    def _two_sided(self, bar) -> None:
        """Forward once, keeping boundaries; then from the head back to the first layer."""
        done = self._file("moments")
        last = min((i for i in range(self.cfg.n_layers) if self._file(i).exists()),
                   default=self.cfg.n_layers)  # fmt: skip
        if not done.exists():
            for i in range(self.cfg.n_layers):  # after the passes a NaN would name the head alone
                layer = self.source.layer(i)
                for m in self.body:
                    _finite(np.asarray(at(layer, m.name)["kernel"]), f"layer {i}, map {m.name}")
            self.sweep.boundaries(bar.update)
            gram, abs_D, mean_p_V = self.sweep.head()
            _write(done, gram=gram, abs=abs_D, p=mean_p_V)
        for i in range(last - 1, -1, -1):
            self._layer(i, self.sweep.layer(i))
            self.sweep.drop(i)
            bar.update()
        with np.load(done) as kept:
            head = HeadMoments(kept["gram"], kept["abs"], kept["p"], self.sweep.embed_grad())
        self._tables(head)
        self.sweep.drop(-1)
        bar.update()

    def _layer(self, index: int, sown: dict[str, Moments] | None) -> None:
        layer, out = self.source.layer(index), {}
        for m in self.body:
            leaf = at(layer, m.name)
            kernel = np.asarray(leaf["kernel"]).astype(np.float64)
            bias = np.asarray(leaf["bias"], np.float64) if "bias" in leaf else None
            _finite(kernel, f"layer {index}, map {m.name}")
            moments = None if sown is None else sown[m.name]
            fit = self.how.body(kernel, m.max_rank, moments, bias)
            # the mean only where the bias takes up what is lost on it
            shifted = fit.bias_O is not None and not np.array_equal(fit.bias_O, bias)
            out |= _pack(m.name, fit, moments.mean_I if shifted else None)
        _write(self._file(index), **out)

    def _tables(self, head: HeadMoments | None) -> None:
        outer = self.source.outer()
        p_V = None if self.tokens is None else vocab.frequencies(self.tokens, self.cfg.vocab_size)
        for m in self.tables:
            if self._file(m.name).exists():
                continue
            kernel = np.asarray(outer[m.name]["kernel"])
            _finite(kernel, f"table {m.name}")
            tied = self.cfg.tie_embeddings
            fit = self.how.table(m.name, kernel, m.max_rank, head, p_V, tied)
            _write(self._file(m.name), **_pack(m.name, fit, None))

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
        with np.load(self._file(name if name in TABLES else layer)) as kept:
            v, u = kept[f"{name}:v"][:, :rank], kept[f"{name}:u"][:rank]
            shift = None
            if f"{name}:mean" in kept:
                mean_I = kept[f"{name}:mean"]
                shift = mean_I @ np.asarray(kernel_IO, np.float64) - (mean_I @ v) @ u
            return Factors(v, u, shift, kept[f"{name}:spectrum"])


def _finite(kernel: Array, where: str) -> None:
    if not np.isfinite(kernel).all():
        raise DelveError(f"{where}: NaN or Inf in the weights; the source checkpoint is damaged")


def _pack(name: str, fit: Factors, mean_I) -> dict[str, Array]:
    out = {f"{name}:v": fit.v_IK.astype(np.float32), f"{name}:u": fit.u_KO.astype(np.float32),
           f"{name}:spectrum": fit.spectrum}  # fmt: skip
    return out if mean_I is None else {**out, f"{name}:mean": mean_I}


def _write(file: Path, **arrays) -> None:
    half = file.with_suffix(".writing")
    with half.open("wb") as out:
        np.savez(out, **arrays)
    half.replace(file)
