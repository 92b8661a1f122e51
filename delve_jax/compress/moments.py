"""What the closed forms need of each map: moments of its activations and of the loss's gradient.

The dense parent (the teacher) runs layer by layer over the calibration windows. `Sweep` holds the
activations of ONE boundary in memory; with the output metric it keeps every boundary on disk and
then goes back from the head, one layer's vector-Jacobian product at a time, with labels sampled
from the parent's own predictions (the true Fisher metric, compression.md section 4). Sums over at
most 8k tokens are float32, merged in float64 on the host. Everything is a function of the weights,
the tokens and the seed, so a sweep that is repeated gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import DelveError, ParentConfig
from ..models.linear import HIGHEST, lookup, wide

TOKENS = 8192  # of a batch at most: float32 sums over more lose digits that eigh needs
BATCH_BYTES = 2**28  # of the widest activation of a batch
HEAD_TOKENS = 512  # whose logits are held at a time


class Moments(NamedTuple):
    """Of one map y = x W in one layer, float64; per token unless said otherwise."""

    gram: np.ndarray  # E[y y^T] (over "outputs") or E[x x^T] (over "inputs"), uncentred
    mean_I: np.ndarray
    count: float  # tokens
    over: str
    abs_I: np.ndarray | None = None  # E|x|
    inputs: np.ndarray | None = None  # E[x x^T], where it was asked for
    grad: np.ndarray | None = None  # g = d nll / dy: E[g g^T] over "outputs", else E[(W g)(W g)^T]


class HeadMoments(NamedTuple):
    """Of the head's inputs f, its predictions, and the gradient at the embedding's output."""

    gram: np.ndarray  # E[f f^T] [D,D]
    abs_D: np.ndarray  # E|f|
    mean_p_V: np.ndarray | None  # mean predicted distribution (with the metric)
    embed_grad: np.ndarray | None  # E[g g^T] [D,D] at the looked-up rows (with the metric)


def check_tokens(tokens_NT: np.ndarray, vocab_size: int) -> np.ndarray:
    """Calibration windows as int32 [N,T]; DelveError where they are empty or out of range."""
    tokens_NT = np.asarray(tokens_NT)
    if tokens_NT.ndim != 2 or not tokens_NT.size or tokens_NT.dtype.kind not in "iu":
        raise DelveError(
            f"calibration tokens: integer windows [N, T] expected, got {tokens_NT.dtype} "
            f"{list(tokens_NT.shape)}; give a longer --calibrate text"
        )
    low, high = int(tokens_NT.min()), int(tokens_NT.max())
    if low < 0 or high >= vocab_size:
        raise DelveError(
            f"calibration tokens: id {low if low < 0 else high} is outside the vocabulary of "
            f"{vocab_size}; tokenize with this parent's own tokenizer"
        )
    return tokens_NT.astype(np.int32)


def merge(partials: Iterator[dict]) -> dict:
    """Sum of trees of float32 partial sums, in float64 on the host."""
    total = None
    for part in partials:
        part = jax.tree.map(lambda a: np.asarray(a, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def normalise(sums: dict, over: str, where: str) -> Moments:
    """Moments from a map's sums; DelveError names `where` if they are not finite."""
    count = float(sums["count"])
    mean = {name: sums[name] / count for name in sums if name != "count"}
    if not all(np.isfinite(a).all() for a in mean.values()):
        raise DelveError(
            f"{where}: calibration activations are not finite; check the weights for NaN or Inf "
            "and the text, or use --method svd, which needs no activations"
        )
    return Moments(
        mean["gram"], mean["sum_in"], count, over,
        mean.get("abs_in"), mean.get("inputs"), mean.get("grad"),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _programs(cfg: ParentConfig, collections: tuple[str, ...]):
    """The jitted pieces of a parent's passes; with "moments" in `collections` layers sow them."""
    block = models.FAMILY[cfg.family].Block(cfg)

    def context(x_BTD):
        return models.FAMILY[cfg.family].context(cfg, x_BTD)[0]

    @jax.jit
    def embed(outer, tokens_BT):
        return models.embed_tokens(cfg, outer, tokens_BT)

    @jax.jit
    def step(layer, x_BTD):
        return models.block_apply(cfg, layer, x_BTD)

    @jax.jit
    def watch(layer, x_BTD):
        x_BTD, sown = models.block_apply(cfg, layer, x_BTD, mutable=list(collections))
        return x_BTD, sown["moments"]

    @jax.jit
    def back(layer, x_BTD, g_BTD):
        ctx = context(x_BTD)

        def run(x_BTD, bumps):
            (x_BTD, _), sown = block.apply(
                {"params": layer, "perturbations": bumps}, x_BTD, None, ctx,
                mutable=list(collections),
            )  # fmt: skip
            return x_BTD, sown["moments"]

        like = jax.eval_shape(
            lambda: block.apply({"params": layer}, x_BTD, None, ctx, mutable=["perturbations"])[1]
        )["perturbations"]
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        _, pull, sums = jax.vjp(run, x_BTD, zeros, has_aux=True)
        g_BTD, g_maps = pull(g_BTD)
        return g_BTD, _with_gradients(sums, g_maps, layer)

    @jax.jit
    def head_inputs(outer, x_BTD):
        f_BTD = wide(models.final_features(cfg, outer, x_BTD))
        gram = jnp.einsum("btd,bte->de", f_BTD, f_BTD, precision=HIGHEST)
        return {"gram": gram, "abs": jnp.abs(f_BTD).sum((0, 1))}

    @jax.jit
    def head_back(outer, x_nD, key):
        def logits_of(x):
            return models.head_logits(cfg, outer, models.final_features(cfg, outer, x))

        logits_nV, pull = jax.vjp(logits_of, x_nD)
        labels = jax.random.categorical(key, logits_nV, axis=-1)
        p_nV = jax.nn.softmax(logits_nV)
        (g_nD,) = pull(p_nV - jax.nn.one_hot(labels, p_nV.shape[-1], dtype=p_nV.dtype))
        return g_nD, p_nV.sum(0)

    @jax.jit
    def embed_back(outer, tokens_BT, g_BTD):
        rows = lookup(outer["embed"], tokens_BT)

        def rest(rows):  # RWKV normalises what it looks up
            ln0 = outer.get("ln0")
            return rows if ln0 is None else models.layer_norm(ln0, rows, cfg.norm_eps)

        (g,) = jax.vjp(rest, rows)[1](g_BTD)
        return jnp.einsum("btd,bte->de", g, g, precision=HIGHEST)

    @jax.jit
    def final(outer, x_BTD):
        return models.final_features(cfg, outer, x_BTD)

    @jax.jit
    def kl(teacher, student, f_nD, h_nD):
        log_t = jax.nn.log_softmax(models.head_logits(cfg, teacher, f_nD))
        log_s = jax.nn.log_softmax(models.head_logits(cfg, student, h_nD))
        return (jnp.exp(log_t) * (log_t - log_s)).sum()

    return SimpleNamespace(
        embed=embed, step=step, watch=watch, back=back, head_inputs=head_inputs,
        head_back=head_back, embed_back=embed_back, final=final, kl=kl,
    )  # fmt: skip


def _with_gradients(sums: dict, g: dict, params: dict) -> dict:
    """The tree of sums with "grad": the Gram of g over the narrow side of each map."""
    if "gram" in sums:
        g_NO = wide(g["out"].reshape(-1, g["out"].shape[-1]))
        n_in, n_out = params["kernel"].shape
        side = g_NO @ wide(params["kernel"]).T if n_out > n_in else g_NO
        return {**sums, "grad": jnp.matmul(side.T, side, precision=HIGHEST)}
    return {name: _with_gradients(sub, g[name], params[name]) for name, sub in sums.items()}


class Sweep:
    """One pass over a parent's layers for the calibration windows tokens_NT.

    source: `cfg`, `outer()` (everything but the layers) and `layer(i)`, read when asked for.
    folder: where boundaries and gradients stand while the metric needs them; what is found there
    from an earlier call (same parent, tokens and seed: the caller's business) is not made again.
    """

    def __init__(self, source, tokens_NT, folder: Path | None = None, *, inputs=False, seed=0):
        self.cfg, self.source, self.tokens, self.seed = source.cfg, source, tokens_NT, seed
        collections = ("moments", "inputs") if inputs else ("moments",)
        self._run = _programs(self.cfg, collections)
        self.folder = folder
        cfg = self.cfg
        widest = max(getattr(cfg, "d_ffn", 0), 2 * getattr(cfg, "d_inner", 0), 3 * cfg.d_model)
        most = min(TOKENS, BATCH_BYTES // (4 * widest))
        self.rows = max(1, most // tokens_NT.shape[1])

    def _batches(self, array) -> Iterator[jax.Array]:
        for i in range(0, len(array), self.rows):
            yield jnp.asarray(array[i : i + self.rows])

    def _embedded(self) -> np.ndarray:
        outer = self.source.outer()
        with jax.default_matmul_precision("highest"):
            return np.concatenate([self._run.embed(outer, t) for t in self._batches(self.tokens)])

    def forward(self) -> Iterator[tuple[int | str, dict[str, Moments] | HeadMoments]]:
        """(layer, {map: Moments}) in order, then ("head", HeadMoments): no metric, no folder."""
        x_NTD = self._embedded()
        for index in range(self.cfg.n_layers):
            layer, sums = self.source.layer(index), []
            with jax.default_matmul_precision("highest"):  # never across a yield: it is global
                for i, x in enumerate(self._batches(x_NTD)):
                    at = i * self.rows
                    x_NTD[at : at + self.rows], sown = self._run.watch(layer, x)
                    sums.append(sown)
            yield index, _maps(merge(iter(sums)), layer, f"layer {index}, map ")
        yield "head", HeadMoments(*self._head_sums(x_NTD), None, None)

    def _head_sums(self, x_NTD) -> tuple[np.ndarray, np.ndarray]:
        outer = self.source.outer()
        with jax.default_matmul_precision("highest"):
            sums = merge(self._run.head_inputs(outer, x) for x in self._batches(x_NTD))
        gram = sums["gram"] / self.tokens.size
        if not np.isfinite(gram).all():
            raise DelveError("map head: calibration activations are not finite; check the weights")
        return gram, sums["abs"] / self.tokens.size

    # --- with the output metric -----------------------------------------------------------------

    def boundaries(self, tick=lambda: None) -> None:
        """Run the parent forward and keep the input of every layer, and of the head, on disk."""
        x_NTD = None
        for index in range(self.cfg.n_layers + 1):
            if self._file("x", index).exists():
                continue
            if x_NTD is None:
                x_NTD = self._load("x", index - 1) if index else self._embedded()
            if index:
                layer = self.source.layer(index - 1)
                with jax.default_matmul_precision("highest"):
                    for i, x in enumerate(self._batches(x_NTD)):
                        x_NTD[i * self.rows : (i + 1) * self.rows] = self._run.step(layer, x)
            self._keep("x", index, x_NTD)
            tick()

    def head(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(E[f f^T], E|f|, mean prediction [V]); leaves the gradient at the last boundary."""
        L, outer = self.cfg.n_layers, self.source.outer()
        x_NTD = self._load("x", L)
        flat, g_nD = x_NTD.reshape(-1, x_NTD.shape[-1]), np.empty(x_NTD.shape, np.float32)
        g_nD, total = g_nD.reshape(flat.shape), 0.0
        with jax.default_matmul_precision("highest"):
            for i in range(0, len(flat), HEAD_TOKENS):
                key = jax.random.fold_in(jax.random.key(self.seed), i)
                g, p_V = self._run.head_back(outer, jnp.asarray(flat[i : i + HEAD_TOKENS]), key)
                g_nD[i : i + HEAD_TOKENS] = g
                total = total + np.asarray(p_V, np.float64)
        self._keep("g", L, g_nD.reshape(x_NTD.shape))
        return *self._head_sums(x_NTD), total / len(flat)

    def layer(self, index: int) -> dict[str, Moments]:
        """Moments of one layer's maps, gradients too; call from the last layer to the first."""
        x_NTD, g_NTD = self._load("x", index), self._load("g", index + 1)
        layer, sums = self.source.layer(index), []
        with jax.default_matmul_precision("highest"):
            for i, (x, g) in enumerate(
                zip(self._batches(x_NTD), self._batches(g_NTD), strict=True)
            ):
                g_NTD[i * self.rows : (i + 1) * self.rows], sown = self._run.back(layer, x, g)
                sums.append(jax.tree.map(np.asarray, sown))
        self._keep("g", index, g_NTD)
        return _maps(merge(iter(sums)), layer, f"layer {index}, map ")

    def embed_grad(self) -> np.ndarray:
        """E[g g^T] [D,D] at the rows of the input table."""
        outer, g_NTD = self.source.outer(), self._load("g", 0)
        pairs = zip(self._batches(self.tokens), self._batches(g_NTD), strict=True)
        with jax.default_matmul_precision("highest"):
            return merge(self._run.embed_back(outer, t, g) for t, g in pairs) / self.tokens.size

    def drop(self, index: int) -> None:
        """Forget what only layer `index` needed (its results are safe)."""
        self._file("x", index + 1).unlink(missing_ok=True)
        self._file("g", index + 1).unlink(missing_ok=True)

    # --- the price of a change ------------------------------------------------------------------

    def logit_inputs(self, rows: int, layer=None, outer=None) -> np.ndarray:
        """Final-norm features [n, D] of the first `rows` windows, some parameters replaced.

        layer(i, params) -> params and outer(params) -> params say what replaces them.
        """
        top = self.source.outer()
        top = top if outer is None else outer(top)
        x_NTD = [self._run.embed(top, t) for t in self._batches(self.tokens[:rows])]
        for index in range(self.cfg.n_layers):
            params = self.source.layer(index)
            params = params if layer is None else layer(index, params)
            x_NTD = [self._run.step(params, x) for x in x_NTD]
        return np.concatenate([self._run.final(top, x) for x in x_NTD]).reshape(
            -1, self.cfg.d_model
        )

    def kl(self, teacher_nD, student_nD, outer=None) -> float:
        """Mean KL(parent || changed parent), nats a token, from the features of both."""
        top = self.source.outer()
        new, total = top if outer is None else outer(top), 0.0
        for i in range(0, len(teacher_nD), HEAD_TOKENS):
            part = slice(i, i + HEAD_TOKENS)
            total += float(self._run.kl(top, new, teacher_nD[part], student_nD[part]))
        return total / len(teacher_nD)

    def _file(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:04d}.npy"

    def _load(self, kind: str, index: int) -> np.ndarray:
        return np.load(self._file(kind, index))

    def _keep(self, kind: str, index: int, array: np.ndarray) -> None:
        file = self._file(kind, index)
        half = file.with_suffix(".writing")
        with half.open("wb") as out:
            np.save(out, array)
        half.replace(file)  # a killed run leaves no half a file under the name


def _maps(sums: dict, params: dict, where: str, path: str = "") -> dict[str, Moments]:
    """{"att/key": Moments, ...} from the nested tree of sown sums, which follows `params`."""
    if "gram" in sums:  # over the narrow side; a square map's is over its outputs
        n_in, n_out = params["kernel"].shape
        return {path: normalise(sums, "inputs" if n_out > n_in else "outputs", where + path)}
    out = {}
    for name, sub in sums.items():
        out |= _maps(sub, params[name], where, f"{path}/{name}" if path else name)
    return out
