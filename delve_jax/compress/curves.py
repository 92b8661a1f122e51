"""What each map's rank costs in nats: the tail of its spectrum, calibrated by measured divergences.

Half the tail of a two-sided spectrum estimates KL(parent || compressed) per token; it ignores
curvature and what layers do to each other. Each kind of map is cut at two ranks in all its layers,
alone, the divergence is measured, and E = a tail^b is drawn through both points (kappa of
compression.md section 5, with an exponent). Measured on the proxies: a from 0.6 to 4, b from 1.0
to 1.5; without it vocabulary tables are starved and RWKV ends behind SVD-LLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from .allocate import Map, rank_grid
from .knapsack import Item, Kind, Option
from .spectra import TABLES, Spectra, at

TOKENS = 8192  # of the calibration windows that divergences are measured on
SHARES = (0.6, 0.3)  # of the largest useful rank
STEEP = (0.8, 2.0)  # bounds of the exponent: two points are few
NOTHING = 1e-9  # nats: below, a map does nothing and has no curve


def tails(spectrum: np.ndarray, ranks) -> np.ndarray:
    """Half the energy beyond each rank."""
    beyond = np.concatenate([np.cumsum(spectrum[::-1])[::-1], [0.0]])
    return 0.5 * beyond[np.asarray(ranks)]


def cut(spectra: Spectra, m: Map, layer: int, rank: int, leaf: dict) -> dict:
    """A dense leaf whose kernel (and bias) is that of the map at this rank."""
    fit = spectra.factors(m.name, layer, rank, leaf["kernel"])
    new = {**leaf, "kernel": jnp.asarray(fit.v_IK @ fit.u_KO, leaf["kernel"].dtype)}
    if fit.bias_O is not None:
        new["bias"] = jnp.asarray(leaf["bias"] + fit.bias_O, leaf["bias"].dtype)
    return new


def _put(tree: dict, name: str, leaf: dict) -> dict:
    first, _, rest = name.partition("/")
    return {**tree, first: _put(tree[first], rest, leaf) if rest else leaf}


def measure(spectra: Spectra, maps: list[Map], progress: Callable = lambda: None) -> dict:
    """{map: (a, b)} of E = a tail^b over all layers of each kind of map."""
    sweep = spectra.sweep
    rows = max(1, TOKENS // spectra.tokens.shape[1])
    teacher = sweep.logit_inputs(rows)
    out = {}
    for m in maps:
        points = []
        for share in SHARES:
            rank = max(1, round(share * m.max_rank))
            expected = sum(
                tails(spectra.spectrum(m.name, layer), [rank])[0] for layer in range(m.layers)
            )
            if m.name in TABLES:

                def outer(top, m=m, rank=rank):
                    return {**top, m.name: cut(spectra, m, 0, rank, top[m.name])}

                changes_input = m.name == "embed"
                student = sweep.logit_inputs(rows, outer=outer) if changes_input else teacher
                points.append((expected, sweep.kl(teacher, student, outer)))
            else:

                def layer(index, params, m=m, rank=rank):
                    leaf = cut(spectra, m, index, rank, at(params, m.name))
                    return _put(params, m.name, leaf)

                points.append((expected, sweep.kl(teacher, sweep.logit_inputs(rows, layer))))
            progress()
        out[m.name] = through(*points)
    return out


def through(mild: tuple[float, float], hard: tuple[float, float]) -> tuple[float, float]:
    """(a, b) of the power law through two (tail, nats) points; (1, 1) where nothing is lost."""
    (t1, e1), (t2, e2) = mild, hard
    if min(t2, e2) < NOTHING:
        return 1.0, 1.0
    if min(t1, e1) < NOTHING or t2 <= t1 * (1 + 1e-9):
        return e2 / t2, 1.0
    b = min(max(math.log(e2 / e1) / math.log(t2 / t1), STEEP[0]), STEEP[1])
    # where the exponent was bounded the curve passes between the points
    a = math.exp((math.log(e1) - b * math.log(t1) + math.log(e2) - b * math.log(t2)) / 2)
    return a, b


def kinds(spectra: Spectra, maps: list[Map], curves: dict) -> list[Kind]:
    """The allocator's question: every map dense or factored, at which rank, at which loss."""
    out = []
    for m in maps:
        a, b = curves.get(m.name, (1.0, 1.0))
        step = None if min(m.n_in, m.n_out) >= 512 else 1
        grid = rank_grid(m.n_in, m.n_out, step)
        if m.name in TABLES:
            grid = [r for r in grid if r]  # a model without a table is none
        factored, dense = [], []
        for layer in range(m.layers):
            tail = tails(spectra.spectrum(m.name, layer), grid)
            # a layer's share of E = a (sum over layers)^b, were all layers alike
            nats = a * tail * (m.layers * tail) ** (b - 1) if b != 1 else a * tail
            nats = np.where(tail > 0, nats, 0.0)
            options = [Option(r, r * m.step, float(e)) for r, e in zip(grid, nats, strict=True)]
            factored.append(Item(m.name, layer, tuple(options)))
            dense.append(Item(m.name, layer, (Option(-1, m.dense, 0.0),)))
        out.append(Kind(m.name, {"dense": tuple(dense), "factored": tuple(factored)}))
    return out
