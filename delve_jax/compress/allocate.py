"""Which map is factored, at which rank, so that ALL parameters together meet a budget exactly.

The uniform rule: one ratio rho for every kind of map, rank = floor(rho I O / (I + O)), at least 1;
the remainder buys single ranks, layer by layer, until not even the cheapest step fits. Parameters
are counted as true ranks, with biases, norms and vocabulary tables, at the valid vocabulary rows
(the padding rows of a checkpoint are cut, and are in neither count). Deterministic.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax

from .. import models
from ..config import DelveError, ParentConfig, Ranks

# Tables stay dense while the body then keeps at least this share of the keep ratio. Measured on the
# proxies, nll with tables dense against factored, by that share: Mamba 4.404: 0.89 4.463/4.458,
# 0.75 4.576/4.514, 0.57 4.842/4.609; RWKV 4.267: 0.80 4.306/4.307, 0.55 4.406/4.353.
TABLE_SHARE = 0.8


class Map(NamedTuple):
    """One kind of linear map: `layers` copies of a kernel [n_in, n_out]."""

    name: str
    layers: int
    n_in: int
    n_out: int

    @property
    def dense(self) -> int:
        """Parameters of one dense kernel."""
        return self.n_in * self.n_out

    @property
    def step(self) -> int:
        """Parameters of one rank in one layer."""
        return self.n_in + self.n_out

    @property
    def max_rank(self) -> int:
        """The largest rank that is cheaper than the dense kernel; 0: factoring never pays."""
        return (self.dense - 1) // self.step


@dataclass(frozen=True)
class Plan:
    """Ranks per map name (a missing name stays dense) and what they add up to."""

    ranks: dict[str, tuple[int, ...]]
    parameters: int  # with these ranks
    total: int  # of the dense source
    budget: int
    rho: float  # the common ratio (1.0: everything dense)
    tables: str  # "dense" or "factored"
    neurons: tuple[int, ...] = ()  # kept in the MLP of each layer (): all of them
    nested: Ranks = ()  # `sizes` of the best model of half the budget that is inside this one

    @property
    def sizes(self) -> Ranks:
        """Ranks by map and, where some went, the neurons, as `ParentConfig.nested` has them."""
        return (*self.ranks.items(), *((("neurons", self.neurons),) if self.neurons else ()))


def parent_maps(cfg: ParentConfig) -> tuple[list[Map], list[Map], int]:
    """(body maps, vocabulary tables, all parameters) of the dense parent at its valid rows.

    From shapes alone; what is in neither list (narrow maps, norms, biases) always stays dense.
    """
    if cfg.family not in models.FAMILY:
        raise DelveError(
            f"family '{cfg.family}' cannot be compressed: compress its parents, then fuse them"
        )
    tree = models.abstract_params(dataclasses.replace(cfg, ranks=(), vocab_rows=cfg.vocab_size))
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    body = []
    for name in models.FAMILY[cfg.family].FACTORABLE:
        leaf = tree["layers"]
        for part in name.split("/"):
            leaf = leaf[part]
        body.append(Map(name, *leaf["kernel"].shape))
    tables = [Map(n, 1, *tree[n]["kernel"].shape) for n in ("embed", "head") if n in tree]
    return body, tables, total


def rank_grid(n_in: int, n_out: int, step: int | None = None) -> tuple[int, ...]:
    """Candidate ranks of a kernel [n_in, n_out] that are cheaper than it; 0: only its bias stays.

    Multiples of `step` (None: of what matrix units like, finer for small maps); a map too thin for
    one multiple offers its largest rank.
    """
    narrow = min(n_in, n_out)
    if step is None:
        step = next((s for least, s in ((2048, 128), (1024, 64), (512, 16)) if narrow >= least), 4)
    most = (n_in * n_out - 1) // (n_in + n_out)
    return tuple(range(0, most + 1, step)) if most >= step else tuple(sorted({0, most}))


def budget_of(total: int, keep: float | None, budget: int | None) -> int:
    """The parameter budget, from a keep ratio of `total` or an absolute number (exactly one)."""
    if (keep is None) == (budget is None):
        raise DelveError("give either a keep ratio (--keep) or a parameter budget, not both")
    if budget is not None:
        return min(int(budget), total)
    if not 0 < keep <= 1:
        raise DelveError(f"--keep {keep}: must lie in (0, 1], the kept share of all parameters")
    return math.floor(keep * total * (1 + 1e-12))  # 0.1 * 10 must not lose a parameter to rounding


def allocate(body: list[Map], tables: list[Map], total: int, budget: int) -> Plan:
    """Ranks for `body` and `tables` inside `budget`, of `total` parameters in the dense source.

    Tables stay dense unless the body's ratio would then fall below TABLE_SHARE * budget / total;
    factored, they share rho with the body. A kind is dense where no rank pays. DelveError names
    the smallest possible ratio where rank 1 everywhere does not fit.
    """
    body = [m for m in body if m.max_rank]
    tables = [m for m in tables if m.max_rank]
    everything = [*tables, *body]
    least = _least(everything, total)
    if budget < least:
        smallest = math.ceil(least / total * 1e4) / 1e4
        raise DelveError(
            f"--keep {budget / total:.4g} cannot be met: rank 1 everywhere leaves {least:,} of "
            f"{total:,} parameters; the smallest possible --keep is {smallest:.4f}"
        )
    if budget >= total:
        return Plan({}, total, total, budget, 1.0, "dense")
    dense_body = sum(m.layers * m.dense for m in body)
    body_rho = (dense_body - (total - budget)) / dense_body if dense_body else 0.0
    dense_tables = body_rho >= TABLE_SHARE * budget / total and (
        budget >= total - sum(m.layers * (m.dense - m.step) for m in body)
    )
    maps = body if dense_tables else everything
    fixed = total - sum(m.layers * m.dense for m in maps)
    rho, ranks = _uniform(maps, budget - fixed)
    _fill(maps, ranks, budget - fixed)
    spent = fixed + sum(_cost(m, ranks[m.name]) for m in maps)
    out = {m.name: tuple(r) for m in maps if (r := ranks[m.name]) is not None}
    return Plan(out, spent, total, budget, rho, "dense" if dense_tables else "factored")


def smallest(cfg: ParentConfig) -> int:
    """Parameters with rank 1 everywhere: the least that a parent can be compressed to."""
    body, tables, total = parent_maps(cfg)
    return _least([*tables, *body], total)


def _least(maps: list[Map], total: int) -> int:
    return total - sum(m.layers * (m.dense - m.step) for m in maps if m.max_rank)


def _cost(m: Map, ranks: list[int] | None) -> int:
    return m.layers * m.dense if ranks is None else m.step * sum(ranks)


def _uniform(maps: list[Map], budget: int) -> tuple[float, dict[str, list[int] | None]]:
    """The largest rho whose ranks fit, by bisection, and those ranks."""

    def at(rho: float) -> dict[str, int]:
        return {m.name: min(max(1, int(rho * m.dense / m.step)), m.max_rank) for m in maps}

    low, high = 0.0, 1.0
    for _ in range(60):
        mid = (low + high) / 2
        ranks = at(mid)
        fits = sum(m.layers * m.step * ranks[m.name] for m in maps) <= budget
        low, high = (mid, high) if fits else (low, mid)
    ranks = at(low)
    return low, {m.name: [ranks[m.name]] * m.layers for m in maps}


def _fill(maps: list[Map], ranks: dict[str, list[int] | None], budget: int) -> None:
    """Spend the remainder in place: one rank in one layer at a time, early layers first.

    The next kind is the one whose rank the uniform rule would raise next; one that does not fit
    is passed over. A kind at its largest rank in every layer can only become dense as a whole.
    """
    left = budget - sum(_cost(m, ranks[m.name]) for m in maps)
    while True:
        steps = []
        for order, m in enumerate(maps):
            now = ranks[m.name]
            if now is None:
                continue
            low = min(now)
            whole = low == m.max_rank
            price = m.layers * m.dense - _cost(m, now) if whole else m.step
            if price <= left:
                steps.append((1.0 if whole else (low + 1) * m.step / m.dense, order, price, whole))
        if not steps:
            return
        _, order, price, whole = min(steps)
        name = maps[order].name
        if whole:
            ranks[name] = None
        else:
            layer = ranks[name].index(min(ranks[name]))
            ranks[name][layer] += 1
        left -= price
