"""Benchmark scores ahead of a run, in two steps: compute -> soft metric -> hard metric.

1. A soft metric (bits per byte, log-probability of the answer, log-perplexity) follows a power law
   E + A C^-alpha; 2. accuracy is a sigmoid of it, b + a / (1 + exp(-k (x - x0))), fitted on a pool
   of models; 3. both are composed, draws of the one through draws of the other (design notes,
   delphi.md section 8). Hard metrics stay near chance where the soft one already moves.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..config import DelveError
from . import fit, points

NAMES = {
    "flops": ("flops", "flops_budget", "training flop"),
    "soft": ("soft",),
    "hard": ("hard", "acc", "accuracy"),
}
DELTA = 0.02  # Huber of accuracies: about the sampling error of a task with 500 items
SAMPLES = 500
Z = 1.96
AS_GOOD = 1.25  # times the scatter of the chosen form, up to which another one stays a rival
FEWEST = 4  # rows of either step


# ---- soft -> hard --------------------------------------------------------------------------------


def _expit(t):
    return 0.5 * (1 + np.tanh(t / 2))


def sigmoids(x_N, y_N, floor=None, ceiling=None, weight_SN=None, first=None) -> np.ndarray:
    """(a, k, x0, b)_S4 of y = b + a / (1 + exp(-k (x - x0))), a + b at most 1.

    floor: b, where chance is known; ceiling: a + b; else they are fitted too. Huber on accuracy,
    twelve starts or one law `first`.
    """
    x, y = np.asarray(x_N, float), np.asarray(y_N, float)
    mean, std = x.mean(), x.std()
    if not std > 0:
        raise DelveError("the soft metric is the same in every row of the pool")
    z = (x - mean) / std
    if first is None:
        sign = 1.0 if np.sum(z * (y - y.mean())) >= 0 else -1.0
        shapes = itertools.product((0.0, 2.0), (-0.7, 0.7), (-1.0, 0.0, 1.0), (-2.0,))
        starts = np.array(list(shapes))
    else:
        a, k, x0, b = first
        sign = np.sign(k)
        share = np.clip([a / (1 - b), b], 1e-4, 1 - 1e-4)
        top, bottom = np.log(share / (1 - share))
        starts = np.array([[top, np.log(abs(k) * std), (x0 - mean) / std, bottom]])
    weight = np.ones((1, len(x))) if weight_SN is None else weight_SN
    S, n = len(weight), len(starts)

    def parts(top, bottom):
        b = _expit(bottom) if floor is None else np.full_like(bottom, floor)
        return (_expit(top) if ceiling is None else (ceiling - b) / (1 - b)), b

    def fun(p, rows):
        top, slope, centre, bottom = (p[:, i, None] for i in range(4))
        t, b = parts(top, bottom)
        k, a = sign * np.exp(slope), (1 - b) * t
        s = _expit(k * (z - centre))
        ds, zero = a * s * (1 - s), np.zeros_like(s)
        lift = s * t if ceiling is None else s  # what b takes from the sigmoid's height
        J = [
            a * (1 - t) * s if ceiling is None else zero,
            ds * k * (z - centre),
            -ds * k,
            (1 - lift) * b * (1 - b) if floor is None else zero,
        ]
        return b + a * s - y, np.stack(J, axis=2)

    p, cost = fit.descend(fun, np.tile(starts, (S, 1)), np.repeat(weight, n, axis=0), DELTA, 100)
    best = np.argmin(cost.reshape(S, n), axis=1) + n * np.arange(S)
    top, slope, centre, bottom = p[best].T
    t, b = parts(top, bottom)
    k = sign * np.exp(slope) / std
    return np.stack([(1 - b) * t, k, mean + std * centre, b], axis=1)


def sigmoid_at(law, x):
    """Hard metric at x by (a, k, x0, b), or by rows of them at rows of x."""
    a, k, x0, b = np.moveaxis(np.asarray(law, float), -1, 0)
    grow = (...,) + (None,) * (np.ndim(x) - np.ndim(a)) if np.ndim(a) else ...
    return b[grow] + a[grow] * _expit(k[grow] * (np.asarray(x) - x0[grow]))


@dataclass(frozen=True)
class Form:
    """One way to draw the sigmoid."""

    log: bool  # over log |soft| instead of soft
    ceiling: float | None  # height that it ends at; None: fitted

    def x(self, soft):
        return np.log(np.abs(soft)) if self.log else np.asarray(soft, float)


FORMS = tuple(Form(log, ceiling) for log in (False, True) for ceiling in (None, 1.0))


def choose_form(soft_N, hard_N, floor=None) -> Form:
    """The form that best forecasts the furthest quarter of the pool from the rest of it."""
    soft, hard = np.asarray(soft_N, float), np.asarray(hard_N, float)
    if len(soft) < 3 * FEWEST:
        return FORMS[0]
    rising = np.corrcoef(soft, hard)[0, 1] >= 0
    far = soft >= np.quantile(soft, 0.75) if rising else soft <= np.quantile(soft, 0.25)
    if len(np.unique(soft[~far])) < FEWEST:
        return FORMS[0]

    def error(form):
        law = sigmoids(form.x(soft[~far]), hard[~far], floor, form.ceiling)[0]
        return np.mean(np.abs(sigmoid_at(law, form.x(soft[far])) - hard[far]))

    return min(FORMS, key=error)


# ---- compute -> soft -----------------------------------------------------------------------------


def soft_draws(C_N, soft_N, C, samples: int = SAMPLES, seed: int = 0):
    """(soft, draws_SC, law): the power law of compute at C, refitted on redrawn rows.

    Metrics below 0 (log-probabilities) are fitted with their sign turned. A draw adds the scatter
    of a single run.
    """
    sign, size = _sign(soft_N), np.abs(soft_N)
    law = fit.loss_laws(C_N, size)[0]
    rng = np.random.default_rng(seed)
    weight = redrawn(rng, samples, C_N)
    laws = fit.loss_laws(C_N, np.tile(size, (samples, 1)), weight, first=fit.STARTS[3:6])
    rest = np.log(size) - np.log(fit.loss_at(law, C_N))
    draws = fit.loss_at(laws, C) * np.exp(rng.choice(rest, (samples, len(C))))
    return sign * fit.loss_at(law, C), sign * draws, law


def redrawn(rng, samples: int, groups) -> np.ndarray:
    """Weights_SN of rows drawn with replacement; at least three different groups in each draw."""
    n = len(groups)
    member = np.unique(groups)[:, None] == np.asarray(groups)
    weight, redo = np.zeros((samples, n)), np.ones(samples, bool)
    while redo.any():
        weight[redo] = rng.multinomial(n, np.ones(n) / n, redo.sum())
        redo = np.count_nonzero(weight @ member.T, axis=1) < min(fit.FEWEST, len(member))
    return weight


def _sign(soft) -> float:
    soft = np.asarray(soft)
    if (soft > 0).all():
        return 1.0
    if (soft < 0).all():
        return -1.0
    raise DelveError("column soft: must be positive in all rows (bits per byte, nats) or negative "
                     "in all (log-probabilities)")  # fmt: skip


# ---- both ----------------------------------------------------------------------------------------


def compose(soft_C, draws_SC, soft_N, hard_N, floor=None, seed: int = 1) -> dict:
    """hard, low, high at forecast soft metrics: 95 % intervals through both steps.

    The pool's rows are redrawn, and a draw adds the scatter of a single model; 1.96 x the rms
    difference of the other FORMS that fit the pool about as well is added in squares. law, form:
    the sigmoid of the whole pool.
    """
    rng = np.random.default_rng(seed)
    form = choose_form(soft_N, hard_N, floor)
    x, y = form.x(soft_N), np.asarray(hard_N, float)
    law = sigmoids(x, y, floor, form.ceiling)[0]
    hard = sigmoid_at(law, form.x(soft_C))
    weight = redrawn(rng, len(draws_SC), x)
    laws = sigmoids(x, y, floor, form.ceiling, weight, law)
    scatter = rng.choice(y - sigmoid_at(law, x), draws_SC.shape)
    draws = sigmoid_at(laws, form.x(draws_SC)) + scatter - hard
    spread = np.zeros_like(hard)
    others = [(f, sigmoids(f.x(soft_N), y, floor, f.ceiling)[0]) for f in FORMS if f != form]
    misses = [np.std(y - sigmoid_at(p, f.x(soft_N))) for f, p in [(form, law), *others]]
    rivals = [
        sigmoid_at(p, f.x(soft_C)) - hard
        for (f, p), miss in zip(others, misses[1:], strict=True) if miss <= AS_GOOD * misses[0]
    ]  # fmt: skip
    if rivals:
        spread = Z * np.sqrt(np.mean(np.square(rivals), axis=0))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    low, high = np.hypot(np.minimum(low, 0), spread), np.hypot(np.maximum(high, 0), spread)
    return {
        "hard": hard, "low": np.maximum(hard - low, 0), "high": np.minimum(hard + high, 1),
        "law": law, "form": form,
    }  # fmt: skip


def _rows(path, needed: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """(rows with all `needed` numbers, what was left out)."""
    rows, headings = points.table(path, NAMES, needed)
    found, excluded = [], []
    for line, values in rows:
        bad = [k for k in needed if not math.isfinite(values[k])]
        if not bad and "flops" in needed and not values["flops"] > 0:
            bad = ["flops"]
        if not bad and "hard" in needed and not 0 <= values["hard"] <= 1:
            raise DelveError(f"{path}: line {line}, column {headings['hard']}: "
                             f"{values['hard']:g} is no share between 0 and 1")  # fmt: skip
        if bad:
            reason = f"column {headings[bad[0]]}: not a usable number"
            excluded.append({"file": str(path), "line": line, "reason": reason})
        else:
            found.append(values)
    if len(found) < FEWEST:
        raise DelveError(f"{path}: {len(found)} usable rows; at least {FEWEST} are needed")
    return found, excluded


def forecast(
    path: str | Path,
    flops: list[float],
    *,
    pool: str | Path | None = None,
    floor: float | None = None,
    samples: int = SAMPLES,
) -> dict:
    """{"fit", "forecasts"} from a CSV of winners (flops, soft) and a pool (soft, hard).

    pool: by default the rows of `path` itself, which then needs the column hard.
    """
    for C in flops:
        if not 0 < C < math.inf:
            raise DelveError(f"--flops {C:g}: must be a positive, finite number of FLOPs")
    if floor is not None and not 0 <= floor < 1:
        raise DelveError(f"--floor {floor}: must lie in [0, 1)")
    runs, excluded = _rows(path, ("flops", "soft"))
    models, more = _rows(pool or path, ("soft", "hard"))
    excluded += more
    C, soft = (np.array([r[k] for r in runs]) for k in ("flops", "soft"))
    x, y = (np.array([r[k] for r in models]) for k in ("soft", "hard"))
    try:
        if len(np.unique(C)) < fit.FEWEST:
            raise DelveError(f"{len(np.unique(C))} budgets; a power law needs {fit.FEWEST}")
        if _sign(soft) != _sign(x):
            raise DelveError(f"column soft: its sign differs from that in {pool}")
        at, draws, law = soft_draws(C, soft, np.array(flops, float), samples)
        out = compose(at, draws, x, y, floor)
    except DelveError as err:
        raise DelveError(f"{path}: {err}") from None
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return {
        "fit": {
            "soft": dict(zip(("E", "A", "alpha"), map(float, law), strict=True))
            | {"sign": _sign(soft), "unit_flops": fit.UNIT, "rows": len(C)},
            "hard": dict(zip(("a", "k", "x0", "b"), map(float, out["law"]), strict=True))
            | asdict(out["form"])
            | {"rows": len(x), "pool": str(pool or path),
               "soft_range": [float(x.min()), float(x.max())]},
            "excluded": excluded,
        },
        "forecasts": [
            {
                "flops": float(c), "soft": float(at[i]),
                "soft_interval": [float(low[i]), float(high[i])],
                "hard": float(out["hard"][i]),
                "interval": [float(out["low"][i]), float(out["high"][i])],
                "inside_pool": bool(x.min() <= at[i] <= x.max()),
            }
            for i, c in enumerate(flops)
        ],
    }  # fmt: skip
