"""Several parents within ONE budget: bodies of their own, vocabulary tables in common.

For all parents that will be fused: factors of every body map at every rank (`spectra`), common
codes at every rank (`codes`), their curves in nats, and one knapsack in which parents, kinds of
maps and codes compete for the same parameters. Its answer is taken as it is, where
`__init__.compress` measures it beside uniform ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..config import DelveError, ParentConfig
from ..metrics import progress
from . import codes, curves, knapsack, prune
from .allocate import Plan, parent_maps, rank_grid
from .anchor import best
from .assembly import assemble
from .knapsack import Item, Kind, Option
from .moments import Student, check_tokens
from .spectra import Spectra, recipe

CODES = "codes"
SHARES = (0.5, 0.25)  # of the largest useful rank of the codes: where their divergence is measured


class Part(NamedTuple):
    """One parent to be compressed: a source of layers (`spectra`), its windows [N, T]."""

    name: str
    source: object
    tokens_NT: np.ndarray


class Together(NamedTuple):
    """What `compress` gives: parents whose tables are the codes, and how the budget was spent."""

    parents: list[tuple[str, ParentConfig, dict]]  # long factors are the same arrays
    rank: int  # of the codes
    plans: dict[str, Plan]
    report: dict


def compress(parts: list[Part], budget: int, work: Path, *, seed: int = 0, bars=True) -> Together:
    """Factorise parents to `budget` parameters in all, their tables in common (counted once).

    work: folder of everything that a killed call goes on from. DelveError: parents of different
    vocabularies, a budget that cannot be met (says which keep ratio can).
    """
    vocabularies = {part.source.cfg.vocab_size for part in parts}
    if len(vocabularies) > 1:
        raise DelveError(f"parents have different vocabularies: {sorted(vocabularies)}")
    how, held, kinds, fixed, total = recipe("delve"), {}, [], 0, 0
    for part in parts:
        cfg, tokens_NT = part.source.cfg, check_tokens(part.tokens_NT, part.source.cfg.vocab_size)
        body, tables, parameters = parent_maps(cfg)
        body, mlp = [m for m in body if m.max_rank], prune.candidate(cfg)
        key = {"method": "delve", "tables": "common", "neurons": bool(mlp)}
        spectra = Spectra(part.source, body, [], tokens_NT, work / part.name, how, key, seed, bars,
                          mlp)  # fmt: skip
        fits = spectra.curves(lambda s=spectra, b=body: curves.measure(s, b))
        own = curves.kinds(spectra, body, fits)
        held[part.name] = spectra, body
        fixed += parameters - sum(m.dense for m in tables)
        fixed -= sum(item.options[0].cost for kind in own for item in curves.dense(kind))
        total += parameters
        kinds += [_named(part.name, kind) for kind in own]
    known = []
    for spectra, _ in held.values():
        head = spectra.head()
        tables = codes.TableMoments(head.gram, head.embed_grad, head.mean_p_V)
        known.append((spectra.source, tables, spectra.tokens))
    shared = codes.of(known)
    kinds.append(_kind(shared, _curve(shared, [s for s, _ in held.values()], work / "codes.json")))
    choice = knapsack.choose(kinds, fixed, budget, total=total)
    small = knapsack.within(kinds, choice, fixed, budget // 2)
    rank, nested_rank = choice.sizes[CODES, 0], small.sizes[CODES, 0]
    parents, plans = [], {}
    measured = {}
    for k, (part, own) in enumerate(zip(parts, shared.at(rank), strict=True)):
        spectra, body = held[part.name]
        plan = _plan(part.name, body, choice, total, budget)
        inner = _plan(part.name, body, small, total, budget)
        plan = plans[part.name] = dataclasses.replace(plan, nested=inner.sizes)
        (cfg, params, _, _), facts, blend = best(
            spectra, plan, True,
            lambda anchor, p=part, s=spectra, a=plan: assemble(p.source, s, a, anchor=anchor),
            read=lambda top, own=own: {**top, "embed": own["embed"]},  # through the codes
            outer=_student(shared, k, rank).outer,
        )  # fmt: skip
        measured[part.name] = {**facts, "blend": blend}
        parents.append((part.name, codes.shared(cfg, rank, nested_rank), {**params, **own}))
    report = {"budget": budget, "parameters": choice.parameters, "codes": rank,
              "expected_kl_sum": choice.error, "bound_kl_sum": choice.bound,
              "measured": measured}  # fmt: skip
    return Together(parents, rank, plans, report)


def _named(parent: str, kind: Kind) -> Kind:
    """The kind under a name that no other parent has."""
    name = lambda old: f"{parent}:{old}"  # noqa: E731
    modes = {
        mode: tuple(item._replace(name=name(item.name)) for item in items)
        for mode, items in kind.modes.items()
    }
    return Kind(name(kind.name), modes)


def _kind(shared: codes.Codes, curve: tuple[float, float]) -> Kind:
    """The codes as the allocator sees them: one item, any rank of the grid."""
    a, b = curve
    grid = [r for r in rank_grid(shared.vocab_size, shared.width) if 0 < r <= shared.most]
    nats = a * shared.tails(grid) ** b
    options = (Option(r, r * shared.step, float(e)) for r, e in zip(grid, nats, strict=True))
    return Kind(CODES, {"common": (Item(CODES, 0, tuple(options)),)})


def _curve(shared: codes.Codes, spectra: list[Spectra], file: Path) -> tuple[float, float]:
    """(a, b) of E = a tail^b, E the sum of the parents' divergences with the codes for tables.

    DelveError: the file holds that of other parents.
    """
    key = [s.key for s in spectra]
    if file.exists():
        known = json.loads(file.read_text())
        if not isinstance(known, dict) or known["parents"] != key:  # versions before had no key
            raise DelveError(f"{file}: was measured on other parents or by another version; remove "
                             "it or name another folder")  # fmt: skip
        return tuple(known["curve"])
    ranks = [max(1, round(share * shared.most)) for share in SHARES]
    nats = np.zeros(len(ranks))
    with progress(len(spectra), "codes", "parent") as bar:
        for k, s in enumerate(spectra):
            students = [_student(shared, k, rank) for rank in ranks]
            rows = max(1, curves.TOKENS // s.tokens.shape[1])
            nats += [kl for kl, _ in s.sweep.divergences(rows, students, "codes")]
            bar.update()
    points = zip(shared.tails(ranks).tolist(), nats.tolist(), strict=True)
    curve = curves.through(*points, of="common codes")
    half = file.with_suffix(".writing")
    half.write_text(json.dumps({"curve": curve, "parents": key}))
    half.replace(file)
    return curve


def _student(shared: codes.Codes, index: int, rank: int) -> Student:
    """A dense parent that reads and writes through the codes."""

    def outer(top):
        own = shared.at(rank)[index]
        kernel = lambda leaf: {"kernel": jnp.matmul(leaf["v"], leaf["u"])}  # noqa: E731
        return {**top, **{table: kernel(leaf) for table, leaf in own.items() if table in top}}

    return Student(None, outer)


def _plan(parent: str, body: list, choice: knapsack.Allocation, total: int, budget: int) -> Plan:
    """The sizes of one parent's body."""
    sizes = curves.chosen(body, choice, f"{parent}:")
    return Plan(**sizes, parameters=choice.parameters, total=total, budget=budget,
                rho=budget / total, tables="common")  # fmt: skip


def smallest(configs: list[ParentConfig]) -> float:
    """The least share of all parameters that parents with common tables can be compressed to."""
    least = total = width = 0
    for cfg in configs:
        body, tables, parameters = parent_maps(cfg)
        total += parameters
        width += cfg.d_model
        least += parameters - sum(m.dense for m in tables)
        least -= sum(m.layers * m.dense for m in body if m.max_rank)
    V = configs[0].vocab_size
    step = min(r for r in rank_grid(V, width) if r)
    return math.ceil((least + 2 * step * (V + width)) / total * 1e4) / 1e4
