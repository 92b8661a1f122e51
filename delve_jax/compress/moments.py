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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..config import DelveError
from . import behind, device
from .passes import programs, watching

TOKENS = 8192  # of a batch at most: float32 sums over more lose digits that eigh needs
BATCH_BYTES = 2**28  # of the widest activation of a batch
HEAD_TOKENS = 512  # whose logits are held at a time
TABLE_BYTES = 2**28  # of changed vocabulary tables that are held at a time, if it is more than one


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


class Student(NamedTuple):
    """The parent with parameters changed: of its layers, and of what is outside of them."""

    layer: Callable | None = None  # (index, parameters of the layer) -> those of the student
    outer: Callable | None = None  # (everything but the layers) -> that of the student
    late: bool = False  # only what comes after the last layer is changed


def _of_head(outer: dict) -> dict:
    """What logits are made of: beside a head of its own nobody looks at the table of inputs."""
    return {name: tree for name, tree in outer.items() if name != "embed" or "head" not in outer}


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


def add(total: dict | None, part: dict) -> dict:
    """The sum of a tree of float64 sums (None: nothing yet), which is used up, and float32 ones.

    On the host, or on the accelerator that made them; the bits are the same.
    """
    if device.on():
        return device.add(total, part)
    if total is None:
        return jax.tree.map(lambda a: np.array(a, np.float64), part)
    return jax.tree.map(lambda a, b: np.add(a, b, out=a), total, part)


def merge(partials: Iterator[dict]) -> dict:
    """Sum of trees of float32 partial sums, in float64, on the host."""
    return _on_host(functools.reduce(add, partials, None))


def per(total: dict, count: int) -> dict:
    """A tree of float64 sums divided by a count, where it is."""
    if device.on():
        return device.per(total, count)
    return {key: a / count for key, a in total.items()}


def _on_host(total: dict) -> dict:
    return jax.tree.map(lambda a: np.array(a) if isinstance(a, jax.Array) else a, total)


def normalise(sums: dict, over: str, where: str) -> Moments:
    """Moments from a map's sums; DelveError names `where` if they are not finite."""
    count = float(sums["count"])  # in place: a second set of Grams would be a second gigabyte
    mean = {n: np.divide(a, count, out=a) for n, a in sums.items() if n != "count"}
    if not all(np.isfinite(a).all() for a in mean.values()):
        raise DelveError(
            f"{where}: calibration activations are not finite; check the weights for NaN or Inf "
            "and the text, or use --method svd, which needs no activations"
        )
    return Moments(
        mean["gram"], mean["sum_in"], count, over,
        mean.get("abs_in"), mean.get("inputs"), mean.get("grad"),
    )  # fmt: skip


class Sweep:
    """One pass over a parent's layers for the calibration windows tokens_NT.

    source: `cfg`, `outer()` (everything but the layers) and `layer(i)`, read when asked for.
    inputs: whether Grams over the inputs are made of all maps too, or the names of those maps.
    folder: where boundaries and gradients stand while the metric needs them, and an accelerator has
    no room for them; what is found there from an earlier call (same parent, tokens and seed: the
    caller's business) is not made again.
    """

    def __init__(self, source, tokens_NT, folder: Path | None = None, *, inputs=False, seed=0):
        self.cfg, self.source, self.tokens, self.seed = source.cfg, source, tokens_NT, seed
        more = ["inputs"] if inputs is True else [f"inputs {name}" for name in inputs or ()]
        self._run = programs(self.cfg)
        self._watch, self._back = watching(self.cfg, ("moments", *more))
        self.folder = folder
        cfg = self.cfg
        widest = max(getattr(cfg, "d_ffn", 0), 2 * getattr(cfg, "d_inner", 0), 3 * cfg.d_model)
        most = min(TOKENS, BATCH_BYTES // (4 * widest))
        self.rows = max(1, most // tokens_NT.shape[1])
        self._made = set()  # (kind, index) of files that this sweep wrote, or is about to
        self._held: dict[tuple, jax.Array] = {}  # what is on the accelerator instead

    def ahead(self) -> None:
        """Have an accelerator compile what the passes with the metric run (`device.ahead`)."""
        outer, layer = self.source.outer(), self.source.layer(0)
        tokens_BT = np.zeros_like(self.tokens[: self.rows])
        x_BTD = np.zeros((*tokens_BT.shape, self.cfg.d_model), np.float32)
        x_nD = x_BTD.reshape(-1, self.cfg.d_model)[:HEAD_TOKENS]
        self._run.step.ahead(layer, x_BTD)
        self._run.embed.ahead(outer, tokens_BT)
        self._run.head_back.ahead(outer, x_nD, jax.random.key(0), np.uint32(0))
        self._back.ahead(layer, x_BTD, x_BTD)
        self._run.head_inputs.ahead(outer, x_BTD)
        self._run.log_p.ahead(_of_head(outer), x_nD)
        self._run.embed_back.ahead(outer, tokens_BT, x_BTD)

    def _batches(self, array) -> Iterator[jax.Array]:
        for i in range(0, len(array), self.rows):
            yield device.put(array[i : i + self.rows])
            behind.give_back(array)

    def _embedded(self, outer: dict, tokens_NT) -> Iterator[np.ndarray]:
        return (np.asarray(self._run.embed(outer, t)) for t in self._batches(tokens_NT))

    def forward(self) -> Iterator[tuple[int | str, dict[str, Moments] | HeadMoments]]:
        """(layer, {map: Moments}) in order, then ("head", HeadMoments): no metric, no folder."""
        with jax.default_matmul_precision("highest"):  # never across a yield: it is global
            x_NTD = np.concatenate([*self._embedded(self.source.outer(), self.tokens)])
        for index in range(self.cfg.n_layers):
            layer, sums = self.source.layer(index), None
            with jax.default_matmul_precision("highest"):
                for i, x in enumerate(self._batches(x_NTD)):
                    at = i * self.rows
                    x_NTD[at : at + self.rows], sown = self._watch(layer, x)
                    sums = add(sums, sown)
            yield index, _maps(_on_host(sums), layer, f"layer {index}, map ")
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
        for index in range(self.cfg.n_layers + 1):
            if self.has("x", index):
                continue
            with jax.default_matmul_precision("highest"):
                if index:
                    x_NTD, layer = self._load("x", index - 1), self.source.layer(index - 1)
                    parts = (self._run.step(layer, x) for x in self._batches(x_NTD))
                else:
                    parts = self._embedded(self.source.outer(), self.tokens)
                self._keep("x", index, (*self.tokens.shape, self.cfg.d_model), parts)
            tick()

    def head(self, tick=lambda n: None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(E[f f^T], E|f|, mean prediction [V]); leaves the gradient at the last boundary."""
        L, outer = self.cfg.n_layers, self.source.outer()
        x_NTD, key = self._load("x", L), jax.random.key(self.seed)
        flat, total = x_NTD.reshape(-1, x_NTD.shape[-1]), 0.0

        def gradients():
            nonlocal total
            for i in range(0, len(flat), HEAD_TOKENS):
                x_nD = jnp.asarray(flat[i : i + HEAD_TOKENS])
                g, p_V = self._run.head_back(outer, x_nD, key, np.uint32(i))
                total = total + np.asarray(p_V, np.float64)
                tick(len(g))
                yield g

        with jax.default_matmul_precision("highest"):
            self._keep("g", L, x_NTD.shape, gradients())
        return *self._head_sums(x_NTD), total / len(flat)

    def layer(self, index: int) -> dict[str, Moments]:
        """Moments of one layer's maps, gradients too; call from the last layer to the first."""
        x_NTD, g_NTD = self._load("x", index), self._load("g", index + 1)
        layer, sums = self.source.layer(index), None

        def gradients():
            nonlocal sums
            for x, g in zip(self._batches(x_NTD), self._batches(g_NTD), strict=True):
                g, sown = self._back(layer, x, g)
                sums = add(sums, sown)
                yield g

        with jax.default_matmul_precision("highest"):
            self._keep("g", index, g_NTD.shape, gradients())
        return _maps(_on_host(sums), layer, f"layer {index}, map ")

    def embed_grad(self) -> np.ndarray:
        """E[g g^T] [D,D] at the rows of the input table."""
        outer, g_NTD = self.source.outer(), self._load("g", 0)
        pairs = zip(self._batches(self.tokens), self._batches(g_NTD), strict=True)
        with jax.default_matmul_precision("highest"):
            return merge(self._run.embed_back(outer, t, g) for t, g in pairs) / self.tokens.size

    def drop(self, index: int) -> None:
        """Forget what only layer `index` needed (its results are safe)."""
        self._forget("x", index + 1)
        self._forget("g", index + 1)

    # --- the price of a change ------------------------------------------------------------------

    def divergences(self, rows: int, students: list[Student], kind: str, tick=lambda n=1: None):
        """[(KL(parent || student), its nll)], nats a token, on the first `rows` windows.

        All students advance together, so that a layer is read once. Their activations stand in the
        folder as files of this `kind`, from which a call that was stopped goes on.
        """
        tokens_NT, L = self.tokens[:rows], self.cfg.n_layers
        moving = [Student(), *(s for s in students if not s.late)]  # the parent first
        shape = (len(moving), *tokens_NT.shape, self.cfg.d_model)
        behind.wait()
        start = max((i for i in range(L + 1) if self.has(kind, i)), default=-1)
        with jax.default_matmul_precision("highest"):
            if start < 0:
                top = self.source.outer()
                tops = (top if s.outer is None else s.outer(top) for s in moving)
                self._keep(kind, 0, shape, (x for t in tops for x in self._embedded(t, tokens_NT)))
            for index in range(max(start, 0), L):
                x_SNTD = self._load(kind, index)
                self._keep(kind, index + 1, shape, self._advanced(index, moving, x_SNTD))
                self._forget(kind, index)
                tick()
            features = self._load(kind, L).reshape(len(moving), -1, self.cfg.d_model)
            out = self._compared(features, moving, students, tokens_NT, tick)
        self._forget(kind, L)
        return out

    def _advanced(self, index: int, moving: list, x_SNTD) -> Iterator[jax.Array]:
        layer = self.source.layer(index)
        for s, x_NTD in zip(moving, x_SNTD, strict=True):
            params = layer if s.layer is None else s.layer(index, layer)
            for x in self._batches(x_NTD):
                yield self._run.step(params, x)

    def _compared(self, x_SnD, moving: list, students: list, tokens_NT, tick) -> list:
        """KL and nll of each student; as many changed tables at once as TABLE_BYTES hold."""
        top, sums = _of_head(self.source.outer()), np.zeros((len(students), 2))
        label_n = np.concatenate([tokens_NT[:, 1:], np.full_like(tokens_NT[:, :1], -1)], 1).ravel()
        place = {id(s): k for k, s in enumerate(moving)}  # a late one ends where the parent does
        plain = [k for k, s in enumerate(students) if s.outer is None]
        changed = [k for k, s in enumerate(students) if s.outer is not None]
        size = max(1, TABLE_BYTES // sum(leaf.nbytes for leaf in jax.tree.leaves(top)))
        groups = [plain, *(changed[i : i + size] for i in range(0, len(changed), size))]
        if len(groups) == 2 and size > 1:
            groups = [plain + changed]  # the parent's logits once for all
        for group in groups:
            tops = {k: students[k].outer(top) if students[k].outer else top for k in group}
            for i in range(0, len(label_n) if group else 0, HEAD_TOKENS):
                part = slice(i, i + HEAD_TOKENS)
                log_t = self._run.log_p(top, jnp.asarray(x_SnD[0, part]))
                for k in group:
                    x_nD = jnp.asarray(x_SnD[place.get(id(students[k]), 0), part])
                    log_s = self._run.log_p(tops[k], x_nD)
                    sums[k] += np.asarray(self._run.compare(log_t, log_s, label_n[part]))
                behind.give_back(x_SnD)
            del tops
            tick(len(group))
        return [(kl / len(label_n), nll / (label_n >= 0).sum()) for kl, nll in sums]

    def _file(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index:04d}.npy"

    def has(self, kind: str, index: int) -> bool:
        """Whether an array is there: "x" what goes into a layer (or the head), "g" its gradient."""
        place = kind, index
        return place in self._held or place in self._made or self._file(kind, index).exists()

    def _load(self, kind: str, index: int) -> np.ndarray | jax.Array:
        if (kind, index) in self._held:
            return self._held[kind, index]
        behind.wait()
        return np.load(self._file(kind, index), mmap_mode="r")

    def _forget(self, kind: str, index: int) -> None:
        """Remove a file, where there is one, and what else is known of it."""
        self._made.discard((kind, index))
        self._held.pop((kind, index), None)
        behind.do(self._file(kind, index).unlink, missing_ok=True)

    def _keep(self, kind: str, index: int, shape: tuple[int, ...], parts: Iterator) -> None:
        """Write an array as its parts are made: no more than one of them is in memory.

        An accelerator holds it instead as long as it has room: a killed run makes it again, which
        takes less time there than to write it.
        """
        file, size = self._file(kind, index), 4 * int(np.prod(shape))
        if not device.on():
            behind.write_parts(file, shape, parts)
        elif size + sum(a.nbytes for a in self._held.values()) <= device.room():
            parts = [*map(device.put, parts)]
            self._held[kind, index] = jnp.concatenate(parts).astype(jnp.float32).reshape(shape)
        else:
            self._made.add((kind, index))
            behind.do(behind.write_parts, file, shape, [*map(behind.leaving, parts)])


def _maps(sums: dict, params: dict, where: str, path: str = "") -> dict[str, Moments]:
    """{"att/key": Moments, ...} from the nested tree of sown sums, which follows `params`."""
    if "gram" in sums:  # over the narrow side; a square map's is over its outputs
        n_in, n_out = params["kernel"].shape
        return {path: normalise(sums, "inputs" if n_out > n_in else "outputs", where + path)}
    out = {}
    for name, sub in sums.items():
        out |= _maps(sub, params[name], where, f"{path}/{name}" if path else name)
    return out
