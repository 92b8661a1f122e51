"""Which form and size each map gets, so that the expected loss is least within a budget.

A multiple-choice knapsack that knows nothing of models: every map of every layer offers options
(size, parameters, expected loss), and all layers of a kind share one mode (a scanned stack cannot
mix forms). Per mode choice: lower convex hulls, their segments in the order of slope (the
Lagrangian optimum, which is also the certificate's lower bound), a fill, and an exact polish among
the few options that the bound leaves possible. compression.md section 5. Deterministic.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import NamedTuple

import numpy as np

from ..config import DelveError
from .factorize import Array

MODES = 4096  # mode choices that are looked at
STATES = 2048  # partial solutions that the polish keeps; where these suffice it is exact


class Option(NamedTuple):
    """One way to store a map: `size` is its rank or its neurons kept, -1: dense as it is."""

    size: int
    cost: int  # parameters
    error: float  # expected loss increase, nats per token, >= 0


class Item(NamedTuple):
    """A map of one layer (or a table) and the options of one mode."""

    name: str
    layer: int
    options: tuple[Option, ...]


class Kind(NamedTuple):
    """What must share a mode: {"dense" | "factored" | "pruned" | ...: items of that mode}."""

    name: str
    modes: dict[str, tuple[Item, ...]]


class Allocation(NamedTuple):
    """The choice: a mode for each kind, a size for each (map, layer) of it, and what that gives."""

    modes: dict[str, str]
    sizes: dict[tuple[str, int], int]
    parameters: int  # with `fixed`
    error: float
    bound: float  # no choice of sizes in these modes within the budget has a smaller error


def choose(kinds: list[Kind], fixed: int, budget: int, total: int | None = None) -> Allocation:
    """The allocation of least error with at most `budget` parameters, `fixed` of them always there.

    total: parameters of the dense source, for the error's wording. DelveError names the smallest
    possible ratio where nothing fits.
    """
    hulls = [{mode: _Mode(items) for mode, items in kind.modes.items()} for kind in kinds]
    least = fixed + sum(min(m.cost for m in by_mode.values()) for by_mode in hulls)
    if budget < least:
        total = total or fixed + sum(max(m.most for m in by.values()) for by in hulls)
        smallest = math.ceil(least / total * 1e4) / 1e4
        raise DelveError(
            f"--keep {budget / total:.4g} cannot be met: the smallest sizes everywhere leave "
            f"{least:,} of {total:,} parameters; the smallest possible --keep is {smallest:.4f}"
        )
    picks = _search(hulls, budget - fixed)
    out = Allocation(
        {kind.name: mode for kind, mode in zip(kinds, picks.modes, strict=True)},
        {},
        fixed + picks.cost,
        picks.error,
        picks.bound,
    )
    items = [i for by, mode in zip(hulls, picks.modes, strict=True) for i in by[mode].items]
    for item, option in zip(items, picks.at, strict=True):
        out.sizes[item.name, item.layer] = item.options[option].size
    return out


def within(kinds: list[Kind], whole: Allocation, fixed: int, budget: int) -> Allocation:
    """The best smaller allocation inside another: its modes, no size above its own.

    Where the budget is less than the smallest sizes need, those.
    """
    inside, least = [], fixed
    for kind in kinds:
        items = []
        for item in kind.modes[whole.modes[kind.name]]:
            most = whole.sizes[item.name, item.layer]
            options = tuple(o for o in item.options if o.size <= most)
            items.append(item._replace(options=options))
            least += min(o.cost for o in options)
        inside.append(Kind(kind.name, {whole.modes[kind.name]: tuple(items)}))
    return choose(inside, fixed, max(budget, least))


class _Mode:
    """The items of one mode with their hulls: segments in the order of slope."""

    def __init__(self, items: tuple[Item, ...]):
        self.items = items
        self.at, rows = [], []  # cheapest option of each item; (slope, item, option, cost, gain)
        for index, item in enumerate(items):
            if not all(math.isfinite(o.error) and o.error >= 0 for o in item.options):
                raise DelveError(
                    f"map {item.name}, layer {item.layer}: the expected loss of a size is not a "
                    "finite number; check the weights and the calibration text"
                )
            hull = _hull(item.options)
            self.at.append(hull[0])
            slope = math.inf
            for now, then in itertools.pairwise(hull):
                cost = item.options[then].cost - item.options[now].cost
                gain = item.options[now].error - item.options[then].error
                slope = min(slope, gain / cost)  # rounding must not swap two of one item
                rows.append((slope, index, then, cost, gain))
        rows.sort(key=lambda row: -row[0])
        columns = list(zip(*rows, strict=True)) or [()] * 5
        self.slopes, self.gains = np.array(columns[0], float), np.array(columns[4], float)
        self.item, self.to, self.costs = (np.array(columns[i], np.int64) for i in (1, 2, 3))
        self.cost = sum(i.options[o].cost for i, o in zip(items, self.at, strict=True))
        self.error = sum(i.options[o].error for i, o in zip(items, self.at, strict=True))
        self.most = sum(max(o.cost for o in i.options) for i in items)

    def dual(self, price: float) -> tuple[float, int]:
        """min of error + price * cost, and the cost where it is taken."""
        n = int(np.searchsorted(-self.slopes, -price, side="right"))
        cost = self.cost + int(self.costs[:n].sum())
        return self.error - float(self.gains[:n].sum()) + price * cost, cost


def _hull(options: tuple[Option, ...]) -> list[int]:
    """Indices on the lower convex hull of (cost, error): cost rises, error falls strictly."""
    hull: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].error, i)):
        o = options[i]
        if hull and o.error >= options[hull[-1]].error:
            continue
        while len(hull) > 1:
            a, b = options[hull[-2]], options[hull[-1]]
            if (a.error - b.error) * (o.cost - b.cost) >= (b.error - o.error) * (b.cost - a.cost):
                break  # points on a straight line stay: a finer choice
            hull.pop()
        hull.append(i)
    return hull


class _Picks(NamedTuple):
    modes: tuple[str, ...]
    at: list[int]  # option of each item, all kinds in order
    cost: int
    error: float
    bound: float
    price: float  # slope of the segment that did not fit; 0: all of them did

    @property
    def rank(self) -> tuple[float, int]:
        return self.error, self.cost


def _search(hulls: list[dict[str, _Mode]], budget: int) -> _Picks:
    """The best modes and options: mode choices in the order of their bound, while it lets them win.

    Exact in the modes unless MODES run out first. The first choice always fits.
    """
    best = None
    for bound, modes in itertools.islice(_by_bound(hulls, budget), MODES):
        if best is not None and bound > best.error:  # nothing later can be better
            break
        if sum(by[m].cost for by, m in zip(hulls, modes, strict=True)) > budget:
            continue
        picks = _greedy(hulls, modes, budget)
        if best is not None and picks.bound > best.error:
            continue
        items = [i for by, m in zip(hulls, modes, strict=True) for i in by[m].items]
        if not picks.price:
            picks = _priced(items, picks)
        else:
            picks = _polish(items, _fill(items, picks, budget), budget)
        if best is None or picks.rank < best.rank:
            best = picks
    return best


def _by_bound(hulls: list[dict[str, _Mode]], budget: int):
    """Yields (bound, modes): all products of modes, the lowest bound first.

    At one price the Lagrangian is a sum over kinds: its value with each kind at its best mode, and
    what every other mode has more. Any price gives a bound; the one where the budget is spent, the
    best.
    """

    def duals(price):
        return [{m: hull.dual(price) for m, hull in by.items()} for by in hulls]

    def spent(price):
        return sum(min(by.values())[1] for by in duals(price))

    low, high = 0.0, 1.0
    while spent(high) > budget:  # the smallest sizes fit: some price is high enough
        high *= 2
    for _ in range(100):
        price = (low + high) / 2
        low, high = (low, price) if spent(price) <= budget else (price, high)
    at = [sorted((*dual, m) for m, dual in by.items()) for by in duals(high)]
    start = sum(by[0][0] for by in at) - high * budget
    heap = [(start, (0,) * len(at), 0)]  # what is pushed changes kinds from the last changed on
    while heap:
        bound, choice, last = heapq.heappop(heap)
        yield bound, tuple(by[c][-1] for by, c in zip(at, choice, strict=True))
        for k in range(last, len(at)):
            if choice[k] + 1 < len(at[k]):
                more = at[k][choice[k] + 1][0] - at[k][choice[k]][0]
                then = (*choice[:k], choice[k] + 1, *choice[k + 1 :])
                heapq.heappush(heap, (bound + more, then, k))


def _greedy(hulls: list[dict[str, _Mode]], modes: tuple[str, ...], budget: int) -> _Picks:
    """Segments in the order of slope up to the first that does not fit, and the dual bound."""
    parts = [by[mode] for by, mode in zip(hulls, modes, strict=True)]
    shift = np.cumsum([0, *(len(p.items) for p in parts)])
    join = lambda name: np.concatenate([getattr(p, name) for p in parts])  # noqa: E731
    order = np.argsort(-join("slopes"), kind="stable")
    costs, gains = join("costs")[order], join("gains")[order]
    item = np.concatenate([p.item + s for p, s in zip(parts, shift, strict=False)])[order]
    cost, error = sum(p.cost for p in parts), sum(p.error for p in parts)
    n = int(np.searchsorted(np.cumsum(costs), budget - cost, side="right"))
    at = np.array([o for p in parts for o in p.at])
    at[item[:n]] = join("to")[order][:n]  # of several steps of one item the last one stays
    cost, error = cost + int(costs[:n].sum()), max(0.0, error - float(gains[:n].sum()))
    price = float(gains[n] / costs[n]) if n < len(costs) else 0.0
    return _Picks(modes, at.tolist(), cost, error, max(0.0, error - price * (budget - cost)), price)


def _fill(items: list[Item], picks: _Picks, budget: int) -> _Picks:
    """Spend what is left: the step of the best slope among all that still fit, again and again."""
    at, cost = list(picks.at), picks.cost
    while True:
        best = None
        for index, item in enumerate(items):
            now = item.options[at[index]]
            for option, then in enumerate(item.options):
                more, gain = then.cost - now.cost, now.error - then.error
                if gain > 0 and more <= budget - cost:
                    slope = gain / more if more > 0 else math.inf
                    if best is None or slope > best[0]:
                        best = (slope, index, option, more)
        if best is None:
            break
        at[best[1]] = best[2]
        cost += best[3]
    return _priced(items, picks._replace(at=at))


def _priced(items: list[Item], picks: _Picks) -> _Picks:
    """The same choice, its totals summed up from the options themselves."""
    chosen = [i.options[o] for i, o in zip(items, picks.at, strict=True)]
    error = math.fsum(o.error for o in chosen)
    bound = min(picks.bound, error)  # no rounding above it
    return picks._replace(cost=sum(o.cost for o in chosen), error=error, bound=bound)


def _polish(items: list[Item], picks: _Picks, budget: int) -> _Picks:
    """The exact optimum among the options that the bound allows (Dyer, Riha and Walker's bounding).

    With r = error + price * cost - its minimum over the item, a solution better than `picks` has
    sum r < error - bound: almost every option is out at once, and partial sums prune the rest.
    Partial solutions are kept where no other is as cheap and as good, at most STATES of them.
    """
    gap = picks.error - picks.bound
    if gap <= 0:
        return picks
    base, core = 0, []  # core: (item, option indices, costs, r) where more than one is possible
    at = list(picks.at)
    for index, item in enumerate(items):
        cost = np.array([o.cost for o in item.options], np.int64)
        r = np.array([o.error for o in item.options]) + picks.price * cost
        r -= r.min()
        keep = np.flatnonzero(r < gap)
        if len(keep) == 1:
            at[index] = int(keep[0])
            base += int(cost[keep[0]])
        else:
            core.append((index, keep, cost[keep], r[keep]))
    room = np.cumsum([0, *(int(c.min()) for _, _, c, _ in reversed(core))])[::-1]
    costs, sums, trail = np.array([base], np.int64), np.zeros(1), []
    for (_, _, cost, r), later in zip(core, room[1:], strict=True):
        all_costs, all_sums = (costs[:, None] + cost).ravel(), (sums[:, None] + r).ravel()
        keep = np.flatnonzero((all_costs + later <= budget) & (all_sums < gap))
        keep = keep[_undominated(all_costs[keep], all_sums[keep] - picks.price * all_costs[keep])]
        keep = keep[np.argsort(all_sums[keep], kind="stable")[:STATES]]
        if not len(keep):
            return picks
        costs, sums = all_costs[keep], all_sums[keep]
        trail.append((keep // len(r), keep % len(r)))
    state = int(np.lexsort((costs, sums - picks.price * costs))[0])
    for (index, keep, _, _), (before, option) in zip(reversed(core), reversed(trail), strict=True):
        at[index] = int(keep[option[state]])
        state = int(before[state])
    found = _priced(items, picks._replace(at=at))
    return found if found.rank < picks.rank and found.cost <= budget else picks


def _undominated(costs: Array, errors: Array) -> Array:
    """Indices of the points that no other is at most as costly and at most as bad as."""
    order = np.lexsort((errors, costs))
    best = np.minimum.accumulate(errors[order])
    first = np.concatenate([[True], best[1:] < best[:-1]]) if len(order) else order.astype(bool)
    return order[first]
