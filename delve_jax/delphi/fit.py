"""Laws of finished runs: isoFLOP optima, T*(C), N*(C), L(C) = E + A C^-alpha, L(N, D).

Design notes, delphi.md sections 6 and 7. Losses are fitted in logs with a Huber objective, delta
1e-3 (Chinchilla, arXiv 2203.15556, eq. 10). All descents run in batches, so that a bootstrap costs
little more than a fit. Letters: S problems at once, N runs, P parameters; x = log10 tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from ..config import DelveError
from .points import Points

DELTA = 1e-3  # of log loss
UNIT = 1e20  # FLOPs; C is divided by it in the loss law
WINDOW = 0.8  # decades of tokens around the optimum that `vertices` looks at
OUTSIDE = 0.1  # decades by which an optimum may lie beyond its runs
FEWEST = 3  # token counts of a budget, and budgets of a law
SPARE = 8  # degrees of freedom that a shared term of `vertices` must leave, seeds counted once
BENT = 0.05  # cubes of the spread of log10 tokens that parabolas must leave of a shared cubic
OCTAVES = 0.1  # of steps that the tokens must not explain already
EXPONENTS = 0.02, 2.0  # of L(N, D): what `variable_projection` searches, and `determined` believes
MOST_COMPUTE = 1e6  # times a budget, that `extra_compute` looks at

# ---- descent -------------------------------------------------------------------------------------


def huber(r, delta=DELTA):
    """r^2 / 2 up to delta, a straight line beyond."""
    a = np.abs(r)
    return np.where(a <= delta, 0.5 * r * r, delta * (a - 0.5 * delta))


def descend(fun, start_SP, weight_SN, delta=DELTA, rounds=300):
    """Minimise sum_n weight huber(r_n(p)) for S problems -> (p_SP, cost_S).

    fun(p_SP, rows) gives r_SN and dr/dp_SNP of the problems `rows`. Levenberg-Marquardt on
    reweighted squares; the minimum is that of any other descent (a test compares with L-BFGS).
    """
    p = np.array(start_SP, float)
    S, P = p.shape
    cost, damp = np.full(S, np.inf), np.full(S, 1e-2)
    rows = np.arange(S)
    r, J = fun(p, rows)
    cost = np.sum(weight_SN * huber(r, delta), axis=1)
    for _ in range(rounds):
        w = weight_SN[rows] * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300))
        Jw = J * w[:, :, None]
        H = np.swapaxes(Jw, 1, 2) @ J
        size = np.sqrt(np.einsum("spp->sp", H))  # parameters in units of their own curvature:
        size = np.where(size > 0, size, 1.0)  # with damping the matrix cannot be singular
        slope = np.einsum("snp,sn->sp", Jw, r) / size
        H = H / (size[:, :, None] * size[:, None, :]) + np.eye(P) * damp[rows, None, None]
        step = np.clip(-np.linalg.solve(H, slope[:, :, None])[:, :, 0] / size, -1, 1)
        r_new, J_new = fun(p[rows] + step, rows)
        cost_new = np.sum(weight_SN[rows] * huber(r_new, delta), axis=1)
        gain = cost[rows] - cost_new
        better = gain > 0
        done = better & (gain <= 1e-9 * cost[rows]) & (damp[rows] < 1)
        p[rows[better]] += step[better]
        cost[rows[better]] = cost_new[better]
        r, J = np.where(better[:, None], r_new, r), np.where(better[:, None, None], J_new, J)
        damp[rows] = np.maximum(damp[rows] * np.where(better, 0.3, 6.0), 1e-10)
        keep = ~done & (damp[rows] < 1e9) & (cost[rows] > 1e-28)
        if not keep.any():
            break
        rows, r, J = rows[keep], r[keep], J[keep]
    return p, cost


def _best(p, cost, starts: int):
    """The best of `starts` consecutive descents of each problem."""
    which = np.argmin(cost.reshape(-1, starts), axis=1) + starts * np.arange(len(cost) // starts)
    return p[which], cost[which]


# ---- isoFLOP optima ------------------------------------------------------------------------------


def checked(points: Points) -> Points:
    """The budgets that have an optimum; the others listed in `excluded`, DelveError below three."""
    for C in points.budgets:
        x, L = np.log10(points.T[points.C == C]), points.L[points.C == C]
        if (n := _different(x)) < FEWEST:
            reason = f"{len(x)} runs of {n} token counts; a parabola needs {FEWEST}"
            points = points.without(C, reason)
            continue
        a, b, _ = np.polyfit(x, L, 2)
        if not a > 1e-9:
            points = points.without(C, "its parabola opens downward")
        elif not x.min() - OUTSIDE <= -b / (2 * a) <= x.max() + OUTSIDE:
            points = points.without(C, "its optimum is not between its runs")
    if len(points.budgets) < FEWEST:
        why = [f"{e['flops']:g}: {e['reason']}" for e in points.excluded if "flops" in e]
        raise DelveError(
            f"{points.source}: {len(points.budgets)} budgets have an optimum, a law needs {FEWEST}"
            + (f" ({'; '.join(why[:3])}{'; ...' if len(why) > 3 else ''})" if why else "")
        )
    return points


def optima(points: Points) -> list[dict]:
    """The published procedure: a parabola of loss over log10 tokens for each budget, all its runs.

    tokens, loss: its vertex; params: the line of ln N over ln T there; a_under, a_over: curvature
    about the vertex of the runs below it and of the others (None where there are none).
    """
    out = []
    for C in points.budgets:
        of = points.C == C
        x, L, N = np.log10(points.T[of]), points.L[of], points.N[of]
        a, b, c = np.polyfit(x, L, 2)
        star, loss = -b / (2 * a), c - b * b / (4 * a)
        slope, offset = np.polyfit(x * np.log(10), np.log(N), 1)
        row = {
            "flops": float(C), "runs": int(of.sum()), "tokens": float(10**star),
            "params": float(np.exp(offset + slope * star * np.log(10))), "loss": float(loss),
            "a": float(a), "b": float(b), "c": float(c),
        }  # fmt: skip
        for name, side in (("a_under", x < star), ("a_over", x >= star)):
            d2 = (x[side] - star) ** 2
            bottom = np.sum(d2 * d2)
            top = np.sum((L[side] - loss) * d2)
            row[name] = float(top / bottom) if bottom > 0 else None
        out.append(row)
    return out


@dataclass(frozen=True)
class Vertices:
    """Optima of all budgets found together, and the linear fit that they come from."""

    C: np.ndarray  # K budgets
    x: np.ndarray  # log10 T* of each
    loss: np.ndarray
    shared: dict[str, float]  # cubic: loss a decade^3; steps: loss a doubling of the steps
    design_NQ: np.ndarray
    fitted_N: np.ndarray
    residual_N: np.ndarray
    leverage_N: np.ndarray
    centre_K: np.ndarray  # x is measured from here in the design

    @property
    def spare(self) -> int:
        """Degrees of freedom that the fit leaves."""
        return len(self.design_NQ) - int(np.linalg.matrix_rank(self.design_NQ))

    def at(self, L_SN):
        """(x_SK, loss_SK) of the optima for other losses of the same runs; NaN: no minimum."""
        q_SQ = np.linalg.lstsq(self.design_NQ, L_SN.T, rcond=None)[0].T
        K = len(self.C)
        p0, p1, p2 = (q_SQ[:, i : 3 * K : 3] for i in range(3))
        p3 = q_SQ[:, 3 * K, None] if "cubic" in self.shared else np.zeros((len(q_SQ), 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            # the root of p1 + 2 p2 d + 3 p3 d^2 that is the parabola's where p3 = 0
            d = -p1 / (p2 + np.sqrt(p2 * p2 - 3 * p3 * p1))
            d = np.where(p2 + 3 * p3 * d > 0, d, np.nan)
        return self.centre_K + d, p0 + d * (p1 + d * (p2 + d * p3))


def vertices(points: Points, window: float | None = WINDOW, cubic=True, steps=True) -> Vertices:
    """Optima from one least-squares fit: a parabola for each budget and two shared terms.

    loss = p0 + p1 x + p2 x^2 [budget] + cubic x^3 + steps log2(steps), runs within `window` decades
    of the optimum (None: all). Valleys are skewed alike at every budget, as theory says they are
    (exponents of N and D differ), and a run of fewer, larger batches ends higher. A term is left
    out where the runs do not determine it: other seeds of the same runs do not help it in.
    """
    C, x, L = points.C, np.log10(points.T), points.L
    budgets = points.budgets
    centre = np.empty(len(budgets))
    keep = np.ones(len(C), bool)
    for k, b in enumerate(budgets):
        of = C == b
        centre[k], keep[of] = _window(x[of], L[of], window)
    which = np.searchsorted(budgets, C)[keep]
    d, L = (x - centre[np.searchsorted(budgets, C)])[keep], L[keep]
    columns = [(which == k) * d**i for k in range(len(budgets)) for i in range(3)]
    shared = {}
    enough = _different(which, d) - len(columns) > SPARE
    if cubic and enough and _left(d**3, columns) > BENT * d.std() ** 3:
        shared["cubic"] = d**3
    if steps and points.log2_steps is not None:
        s = points.log2_steps[keep] - points.log2_steps[keep].mean()
        enough = _different(which, d, s) - len(columns) > SPARE * 2
        if enough and _left(s, [*columns, *shared.values()]) > OCTAVES:
            shared["steps"] = s
    design = np.stack([*columns, *shared.values()], axis=1)
    q = np.linalg.lstsq(design, L, rcond=None)[0]
    basis = np.linalg.qr(design)[0]
    out = Vertices(
        budgets, centre, centre, dict(zip(shared, q[3 * len(budgets) :].tolist(), strict=True)),
        design, design @ q, L - design @ q, np.sum(basis**2, axis=1), centre,
    )  # fmt: skip
    x, loss = (row[0] for row in out.at(L[None]))
    if np.isnan(loss).any():  # no minimum: fewer terms; plain parabolas have one, see `checked`
        if cubic or steps:
            return vertices(points, window, cubic=False, steps=steps and not cubic)
        if window is not None:
            return vertices(points, None, cubic=False, steps=False)
        bad = budgets[np.isnan(loss)][0]
        raise DelveError(f"{points.source}: budget {bad:g}: its parabola opens downward")
    return replace(out, x=x, loss=loss)


def _different(*columns) -> int:
    """How many runs there are but for repeats: these say nothing more of a valley's shape."""
    return len(np.unique(np.round(np.stack(columns, axis=1), 2), axis=0))


def _left(column_N, columns) -> float:
    """Standard deviation of what the best sum of `columns` leaves of another one."""
    design = np.stack(columns, axis=1)
    return float(np.std(column_N - design @ np.linalg.lstsq(design, column_N, rcond=None)[0]))


def _window(x, L, window):
    """(centre, mask): runs near the vertex of the parabola through them, at five or more places."""
    a, b, _ = np.polyfit(x, L, 2)
    centre, mask = -b / (2 * a), np.ones(len(x), bool)
    if window is None:
        return centre, mask
    place = np.round(x, 2)  # seeds of a run have one
    for _ in range(10):
        nearest = np.sort(np.abs(np.unique(place) - centre))
        fifth = nearest[min(5, len(nearest)) - 1]
        new = (np.abs(x - centre) <= window) | (np.abs(place - centre) <= fifth)
        if (new == mask).all():
            break
        a, b, _ = np.polyfit(x[new], L[new], 2)
        if not a > 1e-9 or not x.min() - OUTSIDE <= -b / (2 * a) <= x.max() + OUTSIDE:
            break  # the last good one stands
        centre, mask = -b / (2 * a), new
    return centre, mask


# ---- laws of compute -----------------------------------------------------------------------------


def power_law(C, y) -> tuple[float, float]:
    """(coefficient, exponent) of y = coefficient C^exponent: least squares in logs."""
    exponent, offset = np.polyfit(np.log10(C), np.log10(y), 1)
    return float(10**offset), float(exponent)


STARTS = tuple(itertools.product((0.3, 0.6, 0.9), (0.05, 0.15, 0.4)))  # E / lowest loss, alpha


def loss_laws(C_K, L_SK, weight_SK=None, delta=DELTA, first=STARTS):
    """(E, A, alpha)_S3 of L = E + A (C / 1e20)^-alpha, for S sets of losses at the same budgets.

    Huber on log loss, E free (but not negative); `first`: where descents start.
    """
    L_SK = np.atleast_2d(L_SK)
    u, y = np.log(np.asarray(C_K) / UNIT), np.log(L_SK)
    weight = np.ones_like(y) if weight_SK is None else weight_SK
    starts = []
    for share, alpha in first:
        low = L_SK.min(axis=1)
        A = (low - share * low) * np.exp(alpha * u.max())
        starts.append(np.stack([np.log(share * low), np.log(A), np.full_like(A, np.log(alpha))], 1))
    start = np.stack(starts, axis=1).reshape(-1, 3)
    n = len(starts)

    def fun(p, rows):
        e, a, alpha = p[:, 0, None], p[:, 1, None], np.exp(p[:, 2, None])
        log_power = a - alpha * u
        log_loss = np.logaddexp(e, log_power)
        share = np.exp(log_power - log_loss)
        J = np.stack([np.exp(e - log_loss), share, -share * alpha * u], axis=2)
        return log_loss - y[rows // n], J

    p, cost = _best(*descend(fun, start, np.repeat(weight, n, axis=0), delta), n)
    return np.exp(p)


def loss_at(law, C):
    """Loss at C FLOPs by (E, A, alpha) or by rows of them: [...] or [S, ...]."""
    E, A, alpha = np.moveaxis(np.asarray(law, float), -1, 0)
    grow = (...,) + (None,) * np.ndim(C) if np.ndim(E) else ...
    return E[grow] + A[grow] * (np.asarray(C) / UNIT) ** -alpha[grow]


# ---- L(N, D) -------------------------------------------------------------------------------------


def parametric(points: Points, weight_SN=None, start=None) -> np.ndarray:
    """(E, A, B, alpha, beta)_S5 of L = E + A N^-alpha + B D^-beta.

    Log-sum-exp with Huber on log loss, Chinchilla's grid of 4,500 starts (arXiv 2203.15556, D.2;
    2404.10102), of which the best 24 descend. `start` ([5], as returned) replaces the grid. A and B
    are inf where the runs let an exponent slide so far (see `determined`).
    """
    n, d, y = np.log(points.N), np.log(points.T), np.log(points.L)
    weight = np.ones((1, len(y))) if weight_SN is None else weight_SN
    n0, d0 = n.mean(), d.mean()

    def fun(p, rows):  # p: log A, log B at the centre, log E, alpha, beta
        terms = (p[:, 0, None] - p[:, 3, None] * (n - n0), p[:, 1, None] - p[:, 4, None] * (d - d0))
        log_loss = np.logaddexp(np.logaddexp(*terms), p[:, 2, None])
        a, b = (np.exp(t - log_loss) for t in terms)
        e = np.exp(p[:, 2, None] - log_loss)
        return log_loss - y, np.stack([a, b, e, -a * (n - n0), -b * (d - d0)], axis=2)

    if start is None:
        steps = np.arange(6) * 5.0, np.arange(6) * 5.0, np.linspace(-1, 1, 5)
        grid = np.array([*itertools.product(*steps, np.arange(5) / 2, np.arange(5) / 2)])
        grid[:, 0] -= grid[:, 3] * n0
        grid[:, 1] -= grid[:, 4] * d0
        cost = np.concatenate(
            [huber(fun(g, None)[0]).sum(axis=1) for g in np.array_split(grid, 20)]
        )
        first = grid[np.argsort(cost)[:24]]
    else:
        E, A, B, alpha, beta = start
        first = np.array([[np.log(A) - alpha * n0, np.log(B) - beta * d0, np.log(E), alpha, beta]])
    S, k = len(weight), len(first)
    p, _ = _best(*descend(fun, np.tile(first, (S, 1)), np.repeat(weight, k, axis=0)), k)
    with np.errstate(over="ignore"):
        A, B = np.exp(p[:, 0] + p[:, 3] * n0), np.exp(p[:, 1] + p[:, 4] * d0)
    return np.stack([np.exp(p[:, 2]), A, B, p[:, 3], p[:, 4]], axis=1)


def variable_projection(points: Points) -> np.ndarray:
    """The same law by least squares of loss: for each (alpha, beta), E, A and B are linear.

    A grid over EXPONENTS, zoomed seven times; E, A, B must not be negative.
    """
    n, d = np.log(points.N), np.log(points.T)
    n, d, n0, d0 = n - n.mean(), d - d.mean(), n.mean(), d.mean()
    centre, half = np.log([0.2, 0.2]), np.log(10)
    for _ in range(8):
        alpha, beta = (
            np.exp(np.clip(c + np.linspace(-half, half, 21), *np.log(EXPONENTS))) for c in centre
        )
        a, b = (v.ravel() for v in np.meshgrid(alpha, beta, indexing="ij"))
        X = np.stack([np.ones((len(a), len(n))), np.exp(-a[:, None] * n), np.exp(-b[:, None] * d)])
        X = np.moveaxis(X, 0, 2)
        q = (np.linalg.pinv(X) @ points.L[:, None])[:, :, 0]
        error = np.sum((np.einsum("gnq,gq->gn", X, q) - points.L) ** 2, axis=1)
        error = np.where((q >= 0).all(axis=1), error, np.inf)
        best = int(np.argmin(error))
        centre, half = np.log([a[best], b[best]]), half / 4
    if not np.isfinite(error[best]):
        raise DelveError(f"{points.source}: no L(N, D) with positive terms fits these runs")
    E, A, B = q[best]
    return np.array([E, A * np.exp(a[best] * n0), B * np.exp(b[best] * d0), a[best], b[best]])


def determined(law) -> bool:
    """Whether the exponents of an (E, A, B, alpha, beta) stop short of the ends of EXPONENTS.

    Those of runs that are parallel valleys, or few, slide to an end or past it.
    """
    low, high = EXPONENTS
    return bool(all(1.01 * low < x < 0.99 * high for x in law[3:]))


def parametric_at(law, N, T):
    """Loss of N parameters after T tokens."""
    E, A, B, alpha, beta = law
    return E + A * np.asarray(N) ** -alpha + B * np.asarray(T) ** -beta


# ---- off the optimum -----------------------------------------------------------------------------


def penalty_law(rows: list[dict], scale: float) -> tuple[float, float]:
    """(coefficient, exponent) of the loss lost at `scale` times the optimal tokens, over C.

    gap = a (log10 scale)^2 on the parabola of each budget (design notes, delphi.md section 7).
    """
    return power_law([r["flops"] for r in rows], [r["a"] * np.log10(scale) ** 2 for r in rows])


def extra_compute(law, gap: tuple[float, float], C: float) -> float:
    """k with L(kC) + gap(kC) = L(C): what the distance from the optimum costs in compute.

    inf where not even MOST_COMPUTE times C makes up for it, as where the gap does not shrink.
    """
    target = loss_at(law, C)

    def above(k):  # log10 k
        return loss_at(law, C * 10**k) + gap[0] * (C * 10**k) ** gap[1] > target

    low, high = 0.0, np.log10(MOST_COMPUTE)
    if above(high):
        return float("inf")
    for _ in range(60):
        k = (low + high) / 2
        low, high = (k, high) if above(k) else (low, k)
    return float(10 ** ((low + high) / 2))
