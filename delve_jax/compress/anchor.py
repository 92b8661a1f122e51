"""Pass 2: every factored map fitted again, to the inputs that the compressed maps before it give.

Two streams go through the parent block by block: x, its own, and x', that of the student so far. A
map's target are the parent's outputs (`factorize.anchored`, compression.md (3) to (6)); one that
writes to the residual stream also makes up for how far the student's has drifted there. Ranks and
metric are those of pass 1. Held: one block and the moments of one map; the streams are files.
Where much was cut, the student's stream is too far off to be led back: what decides is how far the
result diverges from the parent when it is run (`best`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from .. import models
from ..config import DelveError, ParentConfig
from ..models.linear import HIGHEST, Linear, wide
from . import assembly, behind, curves, device
from .allocate import Plan
from .assembly import Assembled, replaced
from .factorize import anchored
from .moments import Sweep, add, per
from .passes import programs
from .spectra import FLOOR, Spectra, at, write_arrays

RIDGE = 1e-3  # of the mean energy of a map's inputs
BLENDS = (0.5, 0.25)  # of the way from W to the target that fits the parent's outputs best
LEAST = 1e-4  # nats a token: where pass 1 loses less, there is nothing to win
PLENTY = 0.05  # of the divergence: a blend that takes so much off is taken as it is
# Maps with more inputs keep the factors of pass 1: at 16384 the Gram of the inputs and its
# factorisation take 4 GiB and 1.5e12 operations a layer (compression.md section 10).
WIDEST = 8192


def _watched(cfg: ParentConfig, layer: dict, x_BTD) -> tuple[jax.Array, dict]:
    """(what the layer gives, {map: (inputs [n, I], outputs [n, O])})."""
    seen = {}

    def watch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            flat = [wide(a.reshape(-1, a.shape[-1])) for a in (args[0], y)]
            seen["/".join(context.module.path)] = flat
        return y

    with nn.intercept_methods(watch):
        out_BTD = models.block_apply(cfg, layer, x_BTD)
    return out_BTD, seen


@functools.lru_cache(maxsize=64)
def _sums(cfg: ParentConfig, small: ParentConfig, name: str):
    """The jitted sums of one map's moments; what the two blocks do behind it is left out by XLA."""

    fam = models.FAMILY[cfg.family]
    fewer = bool(small.neurons) and name == fam.MLP[-1]  # of its inputs than in the parent

    @device.program
    def sums(dense: dict, student: dict, x_BTD, z_BTD):
        out_BTD, seen = _watched(cfg, dense, x_BTD)
        into_BTD, got = _watched(small, student, z_BTD)
        (x_NI, y_NO), (z_NI, w_NO) = seen[name], got[name]
        if y_NO.shape[1] > x_NI.shape[1] and not fewer:
            drift = x_NI - z_NI
        else:
            drift, stream = y_NO - w_NO, fam.RESIDUAL.get(name)
            if stream == "in":
                drift = drift + (x_BTD - z_BTD).reshape(drift.shape)
            elif stream == "out":  # holds this map's own share of the difference
                drift = (out_BTD - into_BTD).reshape(drift.shape)
        return {
            "gram_II": jnp.matmul(z_NI.T, z_NI, precision=HIGHEST),
            "drift": jnp.matmul(z_NI.T, drift, precision=HIGHEST),
            "mean_I": z_NI.sum(0),
            "shift": drift.sum(0),
        }

    return sums


def best(
    spectra: Spectra,
    plan: Plan,
    centred: bool,
    assembled: Callable[[Callable | None], Assembled],
    before: float | None = None,
    read: Callable = lambda top: top,
    outer: Callable | None = None,
) -> tuple[Assembled, dict, float]:
    """(what was put together, its facts from `curves.checked`, the blend): which of BLENDS diverges
    least from the parent, or pass 1 itself, blend 0. The next is tried where one gains little.

    assembled(anchor) puts the student together, None as pass 1 left it. before: nats that pass 1
    loses, where they are known. read, outer: of a student whose vocabulary tables are not its own,
    what they look like to `Anchor` and to the parent's programs.
    """
    first = curves.student(spectra, plan.ranks, plan.neurons)
    first = first._replace(outer=outer or first.outer, late=False)
    nats = {0.0: before}
    out = facts = at = None

    def put_together(blend):
        make = functools.partial(Anchor, spectra, plan, centred, blend)
        return assembled(blend and (lambda cfg, top: make(cfg, read(top))) or None)

    def checked(out, *others):
        student = assembly.student(out)
        student = student._replace(outer=outer or student.outer)
        return curves.checked(spectra, [student, *others])

    for blend in BLENDS if before is None or before >= LEAST else ():
        verdict = _folder(spectra, plan, centred, blend) / "verdict.json"
        if before is None or not verdict.exists():
            del out  # its files are written anew
            out, at = put_together(blend), blend
            facts, *more = checked(out, *([first] if before is None else []))
            before = nats[0.0] = more[0]["kl"] if more else before
            half = verdict.with_suffix(".writing")
            half.write_text(json.dumps(facts))
            half.replace(verdict)
        nats[blend] = json.loads(verdict.read_text())["kl"]
        if nats[blend] < (1 - PLENTY) * before:
            break
    chosen = min(nats, key=lambda b: (np.nan_to_num(nats[b], nan=np.inf), -b))
    if chosen != at:
        del out
        out = put_together(chosen)
        facts = (
            json.loads((_folder(spectra, plan, centred, chosen) / "verdict.json").read_text())
            if chosen
            else curves.checked(spectra, [first])[0]
        )
    return out, facts, chosen


def _folder(spectra: Spectra, plan: Plan, centred: bool, blend: float) -> Path:
    """Where what one blend fits for a plan is kept."""
    how = [centred, RIDGE, blend, WIDEST, models.FAMILY[spectra.cfg.family].RESIDUAL]
    key = json.dumps([plan.ranks, plan.neurons, plan.budget, plan.tables, plan.nested, how])
    return spectra.folder / f"anchor-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


class Anchor(Sweep):
    """The student of a plan, block by block: `layer` takes what pass 1 made and fits it again.

    cfg, top: the student's config, and its parameters outside of the layers. centred: whether
    biases take up means. What was fitted stands in a folder of the plan inside that of `spectra`.
    """

    def __init__(self, spectra: Spectra, plan: Plan, centred: bool, blend: float,
                 cfg: ParentConfig, top: dict):  # fmt: skip
        super().__init__(spectra.source, spectra.tokens)
        self.spectra, self.plan, self.centred, self.blend = spectra, plan, centred, blend
        self.order = models.FAMILY[cfg.family].FACTORABLE  # as the block runs them
        # factors are multiplied out to be run
        self.small = dataclasses.replace(cfg, ranks=(), nested=())
        self._shapes = models.abstract_params(self.small)["layers"]
        self._streams = (2, *self.tokens.shape, cfg.d_model)
        self.folder = _folder(spectra, plan, centred, blend)
        self.folder.mkdir(exist_ok=True)
        behind.wait()
        for left in spectra.folder.glob("anchor-*/*.npy"):  # of another plan that was stopped
            if left.parent != self.folder:
                left.unlink()
        layers = range(cfg.n_layers)
        fitted = all(self._fitted(i).exists() for i in layers)
        if not fitted and not any(self.has("streams", i) for i in layers):
            if device.on():
                self._ahead()
            tops = (self.source.outer(), top)
            with jax.default_matmul_precision("highest"):
                parts = (x for t in tops for x in self._embedded(t, self.tokens))
                self._keep("streams", 0, self._streams, parts)

    def _ahead(self) -> None:
        """Have an accelerator compile the sums of all maps, and what they are fitted with."""
        dense = self.source.layer(0)
        small = jax.tree.map(lambda a, b: np.zeros(b.shape[1:], a.dtype), dense, self._shapes)
        x_BTD = np.zeros((*self.tokens[: self.rows].shape, self.cfg.d_model), np.float32)
        for name in self.order:
            n_in, n_out = np.shape(at(dense, name)["kernel"])
            fewer = bool(self.plan.neurons) and name == self.spectra.mlp[-1]
            if (name not in self.plan.ranks and not fewer) or n_in > WIDEST:
                continue
            _sums(self.cfg, self.small, name).ahead(dense, small, x_BTD, x_BTD)
            if not device.takes(n_in) or not self.spectra.how.metric:
                continue
            of = n_in if n_out > n_in and not fewer else n_out  # of the drift
            means = (None, None, None)
            if self.centred and "bias" in at(dense, name):
                means = map(np.zeros, (n_in, of, n_out))
            device.ahead(
                "anchored", np.zeros((n_in, n_out), np.float32), np.eye(n_in),
                np.zeros((n_in, of)), *means, np.eye(min(n_in, n_out)), RIDGE, self.blend,
            )  # fmt: skip

    def _fitted(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.npz"

    def layer(self, index: int, layer: dict) -> dict:
        """The student's layer `index` (unstacked, at its own sizes) fitted again; call in order.

        Its maps are fitted as they run, each behind those that are fitted already. What an earlier
        call has fitted is read from its file.
        """
        names = [name for name in self.order if self._wanted(name, at(layer, name))]
        if self._fitted(index).exists():
            with np.load(self._fitted(index)) as kept:
                for name in names:
                    leaf = at(layer, name)
                    leaf = {key: kept[f"{name}:{key}"].astype(a.dtype) for key, a in leaf.items()}
                    layer = replaced(layer, name, leaf)
        else:
            layer = self._fit_all(index, layer, names)
            arrays = {  # a file knows no bfloat16
                f"{n}:{k}": a.astype(np.promote_types(a.dtype, np.float32))
                for n in names
                for k, a in at(layer, n).items()
            }
            behind.do(write_arrays, self._fitted(index), **arrays)
        self._advance(index, layer)
        return layer

    def _wanted(self, name: str, leaf: dict) -> bool:
        """Whether a map is fitted again: factored, or the reader of neurons of which some went."""
        if "v" in leaf:
            return len(leaf["v"]) <= WIDEST
        return bool(self.plan.neurons) and name == self.spectra.mlp[-1]

    def _fit_all(self, index: int, layer: dict, names: list[str]) -> dict:
        dense, grads = self.source.layer(index), self.spectra.grads(index)
        student = layer
        for name in self.order:
            if "v" in at(layer, name):
                student = replaced(student, name, at(dense, name))
        student = jax.tree.map(_padded, student, self._shapes)
        for name in self.order:
            leaf = at(layer, name)
            if name in names:
                m = self._moments(index, name, dense, student)
                leaf = self._refitted(leaf, at(student, name), m, grads.get(name))
                layer = replaced(layer, name, leaf)
            if "v" in leaf or name in names:
                leaf = jax.tree.map(_padded, _product(leaf), at(self._shapes, name))
                student = replaced(student, name, leaf)
        return layer

    def _moments(self, index: int, name: str, dense: dict, student: dict) -> dict:
        """What `anchored` asks for of one map, per token; DelveError where it is not finite."""
        program = _sums(self.cfg, self.small, name)
        with jax.default_matmul_precision("highest"):
            parts = (program(dense, student, x, z) for x, z in self._pairs(index))
            sums = functools.reduce(add, parts, None)
        m = per(sums, self.tokens.size)
        if not device.finite(m):
            raise DelveError(
                f"layer {index}, map {name}: activations behind the compressed maps before it are "
                "not finite; keep more (--keep)"
            )
        return m

    def _refitted(self, leaf: dict, dense: dict, m: dict, grad) -> dict:
        """The leaf in the same shapes and dtypes, fitted; dense: the map that it stands for."""
        bias_O = dense["bias"] if self.centred and "bias" in dense else None
        goal = anchored(
            dense["kernel"], **m, bias_O=bias_O, grad=grad, ridge=RIDGE, blend=self.blend
        )  # fmt: skip
        if "v" in leaf:
            fit = goal.factor(leaf["v"].shape[1], m["mean_I"], FLOOR)
            new = {"v": fit.v_IK, "u": fit.u_KO, "bias": fit.bias_O}
        else:  # beyond a layer's own neurons are zeros
            kernel_IO = np.asarray(goal.kernel_IO)
            new = {"kernel": kernel_IO[: len(leaf["kernel"])], "bias": goal.bias_O}
        return {key: a if new[key] is None else new[key].astype(a.dtype) for key, a in leaf.items()}

    def _pairs(self, index: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        return zip(*map(self._batches, self._load("streams", index)), strict=True)

    def _advance(self, index: int, layer: dict) -> None:
        """Both streams to the next layer; nothing where they went there already."""
        if not self.has("streams", index):
            return
        if not self.has("streams", index + 1) and index + 1 < self.cfg.n_layers:
            x_NTD, z_NTD = self._load("streams", index)
            dense, step = self.source.layer(index), programs(self.small).step
            for name in self.order:
                layer = replaced(layer, name, _product(at(layer, name)))
            student = jax.tree.map(_padded, layer, self._shapes)
            with jax.default_matmul_precision("highest"):
                parts = itertools.chain(
                    (self._run.step(dense, x) for x in self._batches(x_NTD)),
                    (step(student, z) for z in self._batches(z_NTD)),
                )
                self._keep("streams", index + 1, self._streams, parts)
        self._forget("streams", index)


def _product(leaf: dict) -> dict:
    """A map's leaf with its kernel multiplied out."""
    if "v" not in leaf:
        return leaf
    kernel = device.product(leaf["v"], leaf["u"])
    return {"kernel": kernel, **{key: a for key, a in leaf.items() if key == "bias"}}


def _padded(a, stack) -> jax.Array:
    """The array in the shape of one layer of a stack: a layer may have fewer neurons."""
    grow = [(0, most - n) for n, most in zip(a.shape, stack.shape[1:], strict=True)]
    return device.put(np.pad(a, grow) if any(after for _, after in grow) else a)
