"""Forecasts: the loss at larger budgets, its interval, and the configuration to run there.

Method (`METHOD`): optima by `fit.vertices`, then L(C) = E + A C^-alpha by Huber on log loss. It was
fixed on runs up to 3e20 FLOPs by leaving the largest budgets out, without the losses of any larger
run; experiments/delphi.py has the methods that it was chosen from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import DelveError
from . import fit, points
from .points import Points
from .recipe import DELPHI, Recipe

METHOD = (
    "optima of all budgets from one fit (a parabola each, a shared skew, a shared slope of log2 "
    "steps, runs within 0.8 decades of the optimum); E + A C^-alpha by Huber on log loss"
)
# Ten leave-largest-out forecasts on Delphi's grid: rms error 0.16 %, against 0.32 % with vertices
# of plain parabolas, 1.1 % with E = 0, 2.8 % with L(N, D), 1.3 % with the average of L(C) and
# L(N, D). L(N, D) ties the curvature of a valley to its depth, which these runs contradict. Plain
# parabolas miss skew and batch by up to 0.13 % at an optimum, the joint fit's optima follow the law
# to 0.015 %; and what is extrapolated 300-fold is the error of the optima.
SAMPLES = 1000
FEW_SAMPLES = 300  # of each fit of the validation and of L(N, D)
SEED = 0
Z = 1.96
RUN_SCATTER = 1e-3  # share of the loss by which single runs scatter, where it is not known
LEAST_SPARE = 4  # degrees of freedom from which it is
PREFIXES = 8  # of the validation, the longest ones
# other readings of the same runs; how far they differ is part of the interval
VARIANTS = {
    "parabolas through all runs": {"window": None, "cubic": False, "steps": False},
    "parabolas": {"cubic": False, "steps": False},
    "without steps": {"steps": False},
    "without skew": {"cubic": False},
    "all runs": {"window": None},
}
SURFACE = ("E", "A", "B", "alpha", "beta")  # of L(N, D)
SCALES = (0.2, 0.5, 2.0, 5.0, 10.0)  # tokens over T* of the penalty's table


def bootstrap(found: fit.Vertices, samples: int, seed: int = SEED) -> np.ndarray:
    """Laws_S3 refitted after drawing residuals of runs and, with more than three, budgets.

    Residuals are scaled to the variance they would have without the fit; where the fit leaves too
    few degrees of freedom to know them, they are normal of RUN_SCATTER. Draws of fewer than three
    different budgets are repeated, draws without an optimum somewhere are dropped.
    """
    rng = np.random.default_rng(seed)
    K, N = len(found.C), len(found.fitted_N)
    if found.spare < LEAST_SPARE:
        noise = RUN_SCATTER * found.fitted_N * rng.standard_normal((samples, N))
    else:
        # a run that the fit passes through has no residual to draw
        free = found.leverage_N < 1 - 1e-6
        pool = found.residual_N[free] / np.sqrt(1 - found.leverage_N[free])
        noise = rng.choice(pool - pool.mean(), (samples, N))
    _, loss = found.at(found.fitted_N + noise)
    weight = np.ones((samples, K))
    if K > fit.FEWEST:
        redo = np.ones(samples, bool)
        while redo.any():
            weight[redo] = rng.multinomial(K, np.ones(K) / K, redo.sum())
            redo = np.count_nonzero(weight, axis=1) < fit.FEWEST
    good = np.isfinite(loss).all(axis=1) & (loss > 0).all(axis=1)
    if not good.any():
        raise DelveError("the optima of these runs are lost in their scatter; more runs are needed")
    return fit.loss_laws(found.C, loss[good], weight[good], first=fit.STARTS[3:6])


def interval(runs: Points, C: np.ndarray, samples: int = SAMPLES) -> dict[str, np.ndarray]:
    """loss, low, high: forecasts at C and 95 % intervals of a run near the optimum there.

    Also the fit behind them: vertices, law (E, A, alpha) and the bootstrap's laws.

    Three independent parts, added in squares on each side: percentiles of the bootstrap, 1.96 x
    the rms difference of the VARIANTS (what runs do not decide), 1.96 x the scatter of single runs.
    Nothing in it was scaled to fit: on the leave-outs it covers more than its 95 % (`validate`).
    """
    found = fit.vertices(runs)
    others = [fit.vertices(runs, **how).loss for how in VARIANTS.values()]
    law, *other_laws = fit.loss_laws(found.C, np.stack([found.loss, *others]))
    loss = fit.loss_at(law, C)
    laws = bootstrap(found, samples)
    low, high = np.percentile(fit.loss_at(laws, C) / loss - 1, [2.5, 97.5], axis=0)
    differences = fit.loss_at(np.array(other_laws), C) / loss - 1
    spread = Z * np.sqrt(np.mean(differences**2, axis=0))
    scatter = Z * _scatter(found)
    below = np.sqrt(np.minimum(low, 0) ** 2 + spread**2 + scatter**2)
    above = np.sqrt(np.maximum(high, 0) ** 2 + spread**2 + scatter**2)
    return {
        "loss": loss, "low": loss * (1 - below), "high": loss * (1 + above),
        "law": law, "laws": laws, "vertices": found,
    }  # fmt: skip


def _scatter(found: fit.Vertices) -> float:
    """Standard deviation of single runs about the fit, as a share of the loss."""
    if found.spare < LEAST_SPARE:
        return RUN_SCATTER
    return float(np.sqrt(np.sum((found.residual_N / found.fitted_N) ** 2) / found.spare))


def validate(runs: Points, samples: int = FEW_SAMPLES) -> list[dict]:
    """Leave-largest-out: prefixes of at least three budgets each forecast all larger ones.

    error: forecast / loss - 1, the loss being the budget's optimum found with all runs.
    """
    found = fit.vertices(runs)
    rows = []
    K = len(found.C)
    for k in range(max(fit.FEWEST, K - PREFIXES), K):
        part = runs.where(runs.C <= found.C[k - 1])
        out = interval(part, found.C[k:], samples)
        for i, C in enumerate(found.C[k:]):
            loss = found.loss[k + i]
            rows.append({
                "budgets": k, "largest": float(found.C[k - 1]), "flops": float(C),
                "loss": float(loss), "forecast": float(out["loss"][i]),
                "interval": [float(out["low"][i]), float(out["high"][i])],
                "error": float(out["loss"][i] / loss - 1),
                "covered": bool(out["low"][i] <= loss <= out["high"][i]),
            })  # fmt: skip
    return rows


def usable(runs: Points) -> Points:
    """`fit.checked`, and DelveError where more compute does not give less loss."""
    runs = fit.checked(runs)
    loss = fit.vertices(runs).loss
    if not loss[-1] < loss[0]:
        raise DelveError(
            f"{runs.source}: the best loss at {runs.budgets[-1]:g} FLOPs, {loss[-1]:.4f}, is not "
            f"below that at {runs.budgets[0]:g}, {loss[0]:.4f}; no law of compute can be fitted"
        )
    return runs


def report(runs: Points, band: dict, whole: Points, ahead: Sequence[float] = ()) -> dict:
    """All laws of `usable` runs as JSON values; band: their `interval` at any budgets.

    whole: the runs of all budgets; L(N, D) needs no optima. ahead: budgets that are forecast, for
    the penalty's table.
    """
    found, law, laws = band["vertices"], band["law"], band["laws"]
    rows = fit.optima(runs)
    for row, x, loss in zip(rows, found.x, found.loss, strict=True):
        row |= {"joint_tokens": float(10**x), "joint_loss": float(loss)}
    C = [r["flops"] for r in rows]
    published = fit.loss_laws(C, [r["loss"] for r in rows])[0]
    tokens, params = (fit.power_law(C, [r[k] for r in rows]) for k in ("tokens", "params"))
    checks = validate(runs)
    errors = np.array([r["error"] for r in checks])
    return {
        "source": runs.source, "runs": len(runs.C), "excluded": list(runs.excluded),
        "budgets": rows,
        "tokens_law": {"coefficient": tokens[0], "exponent": tokens[1]},
        "params_law": {"coefficient": params[0], "exponent": params[1]},
        "shared": found.shared,
        "loss_law": _named(law, laws) | {
            "unit_flops": fit.UNIT,
            "largest_residual": float(np.max(np.abs(fit.loss_at(law, found.C) / found.loss - 1))),
        },
        "parabola_law": _named(published) | {"unit_flops": fit.UNIT},
        "parametric": _parametric(whole),
        "penalty": _penalties(rows, published, runs, ahead),
        "validation": {
            "rows": checks,
            "rms_error": float(np.sqrt(np.mean(errors**2))) if len(checks) else None,
            "largest_error": float(np.max(np.abs(errors))) if len(checks) else None,
            "covered": sum(r["covered"] for r in checks), "of": len(checks),
        },
        "method": METHOD, "samples": len(laws), "seed": SEED,
    }  # fmt: skip


def _named(law, laws=None) -> dict:
    """E, A, alpha by name, with 95 % intervals."""
    out = dict(zip(("E", "A", "alpha"), map(float, law), strict=True))
    if laws is not None:
        low, high = np.percentile(laws, [2.5, 97.5], axis=0)
        for i, name in enumerate(("E", "A", "alpha")):
            out[f"{name}_interval"] = [float(low[i]), float(high[i])]
    return out


def _parametric(runs: Points) -> dict | None:
    """L(N, D) twice, with bootstrap intervals over runs (Huber); None below seven runs.

    {"failed": why} for a fit whose exponents the runs do not determine; intervals are None where
    redrawn runs do not.
    """
    n = len(runs.C)
    if n < 7:
        return None
    law = fit.parametric(runs)[0]
    out = {"huber": _surface(law)}
    if "E" in out["huber"]:
        rng = np.random.default_rng(SEED)
        weight = rng.multinomial(n, np.ones(n) / n, FEW_SAMPLES).astype(float)
        with np.errstate(invalid="ignore"):  # between two draws that are inf
            ends = np.percentile(fit.parametric(runs, weight, law), [2.5, 97.5], axis=0)
        known = np.isfinite(ends).all() and all(map(fit.determined, ends))
        for name, pair in zip(SURFACE, ends.T, strict=True):
            out["huber"][f"{name}_interval"] = pair.tolist() if known else None
    try:
        out["projection"] = _surface(fit.variable_projection(runs))
    except DelveError as err:
        out["projection"] = {"failed": str(err)}
    return out


def _surface(law) -> dict:
    """E, A, B, alpha, beta by name, or why not."""
    if not fit.determined(law):
        low, high = fit.EXPONENTS
        return {"failed": f"the runs determine no exponents between {low:g} and {high:g}"}
    return dict(zip(SURFACE, map(float, law), strict=True))


def _penalties(rows: list[dict], law, runs: Points, ahead: Sequence[float]) -> dict:
    """Compute lost by training on more or fewer tokens than T*, at the top budget and at those
    `ahead` that are larger; extra_compute None: no compute makes up for it."""
    top = float(rows[-1]["flops"])
    x = runs.T[runs.C == top] / rows[-1]["tokens"]
    out = []
    for scale in SCALES:
        gap = fit.penalty_law(rows, scale)
        for C in (top, *sorted({float(C) for C in ahead if C > top})):
            k = fit.extra_compute(law, gap, C)
            out.append({
                "flops": C, "scale": scale, "gap": gap[0] * C ** gap[1],
                "gap_exponent": gap[1], "extra_compute": k if math.isfinite(k) else None,
            })  # fmt: skip
    return {
        "rows": out, "fitted_scales": [float(x.min()), float(x.max())],
        "note": "beyond the largest budget this is an extrapolation without a held-out check",
    }  # fmt: skip


def forecast(
    path: str | Path | Points, flops: list[float], *, recipe: Recipe = DELPHI, samples=SAMPLES
) -> dict:
    """{"fit", "forecasts"}: `report` of a point file and what it forecasts at each budget.

    loss is that of the compute-optimal run, config the recipe's with the T* law of these points
    (where the recipe has no width at a budget: T* and N* alone).
    """
    for C in flops:
        if not 0 < C < math.inf:  # nan fails too
            raise DelveError(f"--flops {C:g}: must be a positive, finite number of FLOPs")
    whole = path if isinstance(path, Points) else points.read(path)
    runs = usable(whole)
    out = interval(runs, np.array(flops, float), samples)
    found = report(runs, out, whole, flops)

    def law(kind: str, C: float) -> float:
        return found[kind]["coefficient"] * C ** found[kind]["exponent"]

    rows = []
    for i, C in enumerate(flops):
        try:
            config = recipe.config(C, law=lambda c: law("tokens_law", c))
        except DelveError:
            config = {"params": law("params_law", C), "tokens": law("tokens_law", C)}
        rows.append({
            "flops": float(C), "loss": float(out["loss"][i]),
            "interval": [float(out["low"][i]), float(out["high"][i])], "config": config,
        })  # fmt: skip
    return {"fit": found, "forecasts": rows}
