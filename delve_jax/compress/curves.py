"""What each map's rank costs in nats: the tail of its spectrum, calibrated by measured divergences.

Half the tail of a two-sided spectrum estimates KL(parent || compressed) per token; it ignores
curvature and what layers do to each other. Each kind of map is cut at two ranks in all its layers,
alone, the divergence is measured, and E = a tail^b is drawn through both points (kappa of
compression.md section 5, with an exponent). Measured on the proxies: a from 0.6 to 4, b from 1.0
to 1.5; without it vocabulary tables are starved and RWKV ends behind SVD-LLM.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ..config import DelveError
from . import behind, device
from .allocate import Map, Plan, rank_grid
from .assembly import replaced
from .factorize import Array
from .knapsack import Allocation, Item, Kind, Option
from .moments import Student
from .prune import per_neuron, refitted
from .spectra import TABLES, Spectra, at

TOKENS = 8192  # of the calibration windows that divergences are measured on
SHARES = (0.6, 0.3)  # of the largest useful rank
STEEP = (0.8, 2.0)  # bounds of the exponent: two points are few
NOTHING = 1e-9  # nats: below, a map does nothing and has no curve
NEURONS = "neurons"  # the kind of map that the MLP as a whole is, where pruning competes


def tails(spectrum: np.ndarray, ranks) -> np.ndarray:
    """Half the energy beyond each rank."""
    beyond = np.concatenate([np.cumsum(spectrum[::-1])[::-1], [0.0]])
    return 0.5 * beyond[np.asarray(ranks)]


def cut(spectra: Spectra, name: str, layer: int, rank: int, leaf: dict) -> dict:
    """A dense leaf whose kernel (and bias) is that of the map at this rank."""
    fit = spectra.factors(name, layer, rank, leaf["kernel"])
    kernel_IO = device.product(fit.v_IK, fit.u_KO).astype(leaf["kernel"].dtype, copy=False)
    # where `jnp.asarray` would hold a table twice meanwhile
    new = {**leaf, "kernel": jax.device_put(kernel_IO)}
    if fit.bias_O is not None:
        new["bias"] = jnp.asarray(leaf["bias"] + fit.bias_O, leaf["bias"].dtype)
    return new


def measure(spectra: Spectra, maps: list[Map]) -> dict:
    """{map: (a, b)} of E = a tail^b over all layers of each kind of map."""
    L, cfg = spectra.cfg.n_layers, spectra.cfg
    names, expected, students = [], [], []
    for m in maps:
        for share in SHARES:
            ranks = {m.name: [max(1, round(share * m.max_rank))] * m.layers}
            lost = (tails(spectra.spectrum(m.name, i), ranks[m.name][i]) for i in range(m.layers))
            names.append(m.name)
            expected.append(float(sum(lost)))
            students.append(student(spectra, ranks))
    for share in SHARES if spectra.mlp else ():
        k = max(1, round(share * cfg.d_ffn))
        names.append(NEURONS)
        expected.append(sum(0.5 * float(spectra.pruning(i).errors(k)) for i in range(L)))
        students.append(student(spectra, {}, [k] * L))
    nats = [kl for kl, _ in _diverged(spectra, students, "curves")]
    points = list(zip(expected, nats, strict=True))
    return {
        names[i]: through(*points[i : i + 2], of=f"map {names[i]}") for i in range(0, len(names), 2)
    }


def _rows(spectra: Spectra) -> int:
    return max(1, TOKENS // spectra.tokens.shape[1])


def _diverged(spectra: Spectra, students: list[Student], kind: str) -> list[tuple[float, float]]:
    """(KL, nll) of each student, with a bar of this name."""
    with spectra.bar(spectra.cfg.n_layers + len(students), kind) as bar:
        return spectra.sweep.divergences(_rows(spectra), students, kind, bar.update)


def student(spectra: Spectra, ranks: dict, neurons=()) -> Student:
    """The parent, dense, with maps cut to these ranks (one a layer) and MLPs to these neurons."""
    body = {name: r for name, r in ranks.items() if name not in TABLES}
    tables = {name: r[0] for name, r in ranks.items() if name in TABLES}

    def outer(top):
        return {**top, **{n: cut(spectra, n, 0, tables[n], top[n]) for n in tables if n in top}}

    layer = functools.partial(_changed, spectra, body, neurons) if body or neurons else None
    return Student(layer, outer if tables else None, layer is None and "embed" not in tables)


def _changed(spectra: Spectra, ranks: dict, neurons, index: int, params: dict) -> dict:
    """The parameters of a layer with its maps cut to their ranks and its MLP to its neurons."""
    for name, of_layers in ranks.items():
        leaf = cut(spectra, name, index, of_layers[index], at(params, name))
        params = replaced(params, name, leaf)
    if neurons:
        reader = spectra.mlp[-1]
        leaf = refitted(at(params, reader), spectra.pruning(index), neurons[index])
        params = replaced(params, reader, leaf)
    return params


def measured(spectra: Spectra, plans: list[Plan]) -> list[dict]:
    """`checked` for the parent at each plan's sizes, factors as they are."""
    return checked(spectra, [student(spectra, plan.ranks, plan.neurons) for plan in plans])


def checked(spectra: Spectra, students: list[Student]) -> list[dict]:
    """KL(parent || student) as it is, and the nll of both, in nats a token."""
    behind.wait()
    for left in spectra.folder.glob("check-*.npy"):  # of other plans, a call that was stopped
        left.unlink()
    (_, before), *found = _diverged(spectra, [Student(late=True), *students], "check")
    facts = {"nll_before": before, "tokens": spectra.tokens[: _rows(spectra)].size}
    return [{"kl": kl, "nll_after": after, **facts} for kl, after in found]


def through(
    mild: tuple[float, float], hard: tuple[float, float], of: str = "a map"
) -> tuple[float, float]:
    """(a, b) of the power law through two (tail, nats) points; (1, 1) where nothing is lost.

    DelveError: what is lost (of `of`) is not a finite number.
    """
    (t1, e1), (t2, e2) = mild, hard
    if not all(map(math.isfinite, (*mild, *hard))):
        raise DelveError(
            f"{of}: what is lost where it is cut is not a finite number; check the weights and the "
            "calibration text"
        )
    if min(t2, e2) < NOTHING:
        return 1.0, 1.0
    if min(t1, e1) < NOTHING or t2 <= t1 * (1 + 1e-9):
        return e2 / t2, 1.0
    b = min(max(math.log(e2 / e1) / math.log(t2 / t1), STEEP[0]), STEEP[1])
    # where the exponent was bounded the curve passes between the points
    a = math.exp((math.log(e1) - b * math.log(t1) + math.log(e2) - b * math.log(t2)) / 2)
    return a, b


def kinds(spectra: Spectra, maps: list[Map], curves: dict) -> list[Kind]:
    """The allocator's question: every map dense or factored, at which rank, at which loss.

    Where neurons are in order, the maps of the MLP are one kind: its modes are all the ways to
    store them dense or factored, and "pruned", dense at fewer neurons.
    """
    forms, out = {}, []
    for m in maps:
        step = None if min(m.n_in, m.n_out) >= 512 else 1
        grid = rank_grid(m.n_in, m.n_out, step)
        if m.name in TABLES:
            grid = [r for r in grid if r]  # a model without a table is none
        factored, dense = [], []
        for layer in range(m.layers):
            nats = _nats(tails(spectra.spectrum(m.name, layer), grid), m.layers, curves[m.name])
            options = [Option(r, r * m.step, float(e)) for r, e in zip(grid, nats, strict=True)]
            factored.append(Item(m.name, layer, tuple(options)))
            dense.append(Item(m.name, layer, (Option(-1, m.dense, 0.0),)))
        forms[m.name] = {"dense": tuple(dense), "factored": tuple(factored)}
    mlp = [forms.pop(name) for name in spectra.mlp]
    if mlp:
        pruned = _pruned(spectra, curves[NEURONS])
        # what the makers' biases cost is counted with the neurons, so with every other form too
        most = [item.options[-1].cost for item in pruned]
        biases = most[0] - sum(form["dense"][0].options[0].cost for form in mlp)
        modes = {
            "+".join(names): sum((form[n] for form, n in zip(mlp, names, strict=True)), ())
            for names in itertools.product(*mlp)
        }
        modes = {name: _dearer(items, biases) for name, items in modes.items()}
        out.append(Kind(NEURONS, {**modes, "pruned": pruned}))
    return [Kind(name, modes) for name, modes in forms.items()] + out


def dense(kind: Kind) -> tuple[Item, ...]:
    """The items of a kind as the parent has it."""
    return next(items for items in kind.modes.values() if all(i.options[0].size < 0 for i in items))


def chosen(maps: list[Map], choice: Allocation, owner: str = "") -> dict:
    """The ranks and neurons that an allocation chose; owner: what the names of these maps begin
    with there."""
    sizes = {}
    for (name, _), size in sorted(choice.sizes.items()):
        if name.startswith(owner):
            sizes.setdefault(name.removeprefix(owner), []).append(size)
    ranks = {m.name: tuple(sizes[m.name]) for m in maps if min(sizes.get(m.name, [-1])) >= 0}
    return {"ranks": ranks, "neurons": tuple(sizes.get(NEURONS, ()))}


def _nats(tail: Array, layers: int, curve: tuple[float, float]) -> Array:
    """A layer's share of E = a (sum of the tails of all layers)^b, were all layers alike."""
    a, b = curve
    nats = a / layers * (layers * tail) ** b
    return np.where(nats <= NOTHING, 0.0, nats)  # NaN stays: `knapsack` refuses it


def _pruned(spectra: Spectra, curve: tuple[float, float]) -> tuple[Item, ...]:
    """An item a layer: its MLP with any number of neurons, dense."""
    cfg = spectra.cfg
    F, price = cfg.d_ffn, per_neuron(cfg)
    grid = [*range(0, F, 1 if F < 2048 else 64), F]
    out = []
    for layer in range(cfg.n_layers):
        nats = _nats(0.5 * spectra.pruning(layer).errors(grid), cfg.n_layers, curve)
        options = [Option(k, k * price, float(e)) for k, e in zip(grid, nats, strict=True)]
        out.append(Item(NEURONS, layer, tuple(options)))
    return tuple(out)


def _dearer(items: tuple[Item, ...], cost: int) -> tuple[Item, ...]:
    """The items with `cost` more parameters in each layer."""
    first = items[0].name
    return tuple(
        item._replace(options=tuple(o._replace(cost=o.cost + cost) for o in item.options))
        if item.name == first
        else item
        for item in items
    )
