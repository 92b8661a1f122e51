"""Compression of a dense parent into low-rank factors: factors of every rank, ranks, assembly.

`compress` needs tokens, not text; it returns the same family with `ranks` set, so the compressed
parent runs through the same modules. Three stages: `spectra` (factors of every map at every rank,
on disk, resumable), ranks (`curves` and `knapsack`, or the uniform rule of `allocate`), assembly.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from .. import VerbModule
from ..config import DelveError, ParentConfig
from . import curves, knapsack, moments
from .allocate import Map, Plan, allocate, budget_of, parent_maps
from .spectra import TABLES, InMemory, Spectra, at, recipe

# "+allocation": the method's own factors at the ranks that our allocator gives them
METHODS = ("delve", "svd", "asvd", "svd-llm", "svd-llm+allocation")


@dataclass(frozen=True)
class Report:
    """What was done: ranks and relative RMS error per map and layer, totals, full spectra."""

    method: str
    plan: Plan
    shapes: dict[str, tuple[int, int]]  # kernel [I, O] of every factored map
    errors: dict[str, list[float]] = field(default_factory=dict)  # in the metric of the method
    spectra: dict[str, np.ndarray] = field(default_factory=dict)  # sigma^2 [L, min(I, O)], float64
    expected: float | None = None  # KL(parent || compressed), nats a token, by the allocator
    bound: float | None = None  # and the least that any allocation in these modes could have
    curves: dict[str, tuple[float, float]] = field(default_factory=dict)  # nats = a tail^b

    def to_json(self) -> dict:
        """Everything but the spectra (`np.savez(path, **report.spectra)` saves those)."""
        plan = self.plan
        return {
            "method": self.method,
            "parameters_before": plan.total,
            "parameters_after": plan.parameters,
            "ratio": plan.parameters / plan.total,
            "budget": plan.budget,
            "rho": plan.rho,
            "tables": plan.tables,
            "expected_kl": self.expected,
            "bound_kl": self.bound,
            "curves": {name: list(ab) for name, ab in self.curves.items()},
            "maps": {
                name: {
                    "shape": list(self.shapes[name]),
                    "ranks": list(ranks),
                    "error": self.errors[name],
                }
                for name, ranks in plan.ranks.items()
            },
        }


def plan_for(
    cfg: ParentConfig, *, keep: float | None = None, budget: int | None = None
) -> tuple[Plan, dict[str, Map]]:
    """The ranks of the uniform rule and the maps by name, from shapes alone."""
    body, tables, total = parent_maps(cfg)
    plan = allocate(body, tables, total, budget_of(total, keep, budget))
    return plan, {m.name: m for m in [*tables, *body]}


def compress(
    cfg: ParentConfig,
    params: dict,
    tokens_NT: np.ndarray | None,
    *,
    keep: float | None = None,
    budget: int | None = None,
    method: str = "delve",
    metric: bool = True,
    bias: bool = True,
    allocation: bool | None = None,
    seed: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
) -> tuple[ParentConfig, dict, Report]:
    """Factorise a dense parent -> (config with ranks, parameters, Report).

    tokens_NT: int calibration windows [N, T] (method "svd" takes None). keep: kept share of ALL
    parameters, counted at the valid vocabulary rows; or budget: their absolute number. keep 1.0
    returns the parameters unchanged but for the padding rows of the vocabulary, which are always
    cut. metric, bias, allocation: parts of method "delve" (all on; the ablation turns them off).
    seed: of the labels that the metric samples. work: folder of the factors at every rank, which
    another keep ratio takes up again (None: a temporary one). Factors keep the kernel's dtype and
    come back on the default device: a caller with a mesh lays them out again. DelveError: unknown
    method, family or ratio, ids out of range, weights or activations that are not finite.
    """
    if method not in METHODS:
        raise DelveError(f"--method {method}: unknown; available are {', '.join(METHODS)}")
    if getattr(cfg, "ranks", ()) or getattr(cfg, "neurons", ()):
        raise DelveError("the checkpoint is compressed already: compress its dense source instead")
    plan, maps = plan_for(cfg, keep=keep, budget=budget)
    params = _cut_padding(cfg, params)
    dense = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size)
    if plan.budget >= plan.total:
        return dense, params, Report(method, plan, {})
    if tokens_NT is not None:
        tokens_NT = moments.check_tokens(tokens_NT, cfg.vocab_size)
    elif method != "svd":
        raise DelveError(f"--method {method} needs calibration tokens; --method svd does not")
    ours = method == "delve"
    how = recipe(method.removesuffix("+allocation"), metric=metric, centred=bias)
    if allocation is None:
        allocation = ours or method.endswith("+allocation")
    if allocation and not how.activations:
        raise DelveError(f"--method {method}: ranks are allocated by activations; it reads none")
    body, tables, _ = parent_maps(cfg)
    body, tables = ([m for m in some if m.max_rank] for some in (body, tables))
    key = {"method": method.removesuffix("+allocation"), "metric": metric, "bias": bias}
    with tempfile.TemporaryDirectory(prefix="delve-") as place:
        spectra = Spectra(InMemory(dense, params), body, tables, tokens_NT, Path(work or place),
                          how, key, seed, progress)  # fmt: skip
        report = Report(method, plan, {})
        if allocation:
            report = _allocated(spectra, [*tables, *body], plan, report)
        return _assembled(dense, params, spectra, maps, report)


def _allocated(spectra: Spectra, maps: list[Map], plan: Plan, report: Report) -> Report:
    """The report with the ranks of least expected loss in the place of the uniform ones."""
    fits = spectra.curves(lambda: curves.measure(spectra, maps))
    fixed = plan.total - sum(m.layers * m.dense for m in maps)
    choice = knapsack.choose(
        curves.kinds(spectra, maps, fits), fixed, plan.budget, total=plan.total
    )
    ranks = {
        m.name: tuple(choice.sizes[m.name, layer] for layer in range(m.layers))
        for m in maps
        if choice.modes[m.name] == "factored"
    }
    factored = any(name in ranks for name in TABLES)
    new = dataclasses.replace(
        plan, ranks=ranks, parameters=choice.parameters,
        rho=plan.budget / plan.total, tables="factored" if factored else "dense",
    )  # fmt: skip
    return dataclasses.replace(
        report, plan=new, expected=choice.error, bound=choice.bound, curves=fits
    )


def _assembled(dense: ParentConfig, params: dict, spectra: Spectra, maps: dict, report: Report):
    """The factored parent at the plan's ranks, slices of the factors on disk."""
    out, errors, whole = {}, {}, {}
    for name, ranks in report.plan.ranks.items():
        leaf = at(params if name in TABLES else params["layers"], name)
        dtype, width = leaf["kernel"].dtype, max(1, *ranks)  # no program runs on empty arrays
        m, table = maps[name], name in TABLES
        v = np.zeros((m.layers, m.n_in, width), dtype)
        u = np.zeros((m.layers, width, m.n_out), dtype)
        shifts = []
        errors[name], whole[name] = [], []
        for layer, rank in enumerate(ranks):
            fit = spectra.factors(name, layer, rank, leaf["kernel"] if table else
                                  np.asarray(leaf["kernel"][layer]))  # fmt: skip
            v[layer, :, :rank], u[layer, :rank] = fit.v_IK, fit.u_KO
            shifts.append(fit.bias_O)
            errors[name].append(fit.error)
            whole[name].append(fit.spectrum)
        out[name] = {"v": v[0], "u": u[0]} if table else {"v": v, "u": u}
        if "bias" in leaf:
            old = np.asarray(leaf["bias"], np.float64)
            shifted = old if shifts[0] is None else old + np.stack(shifts)
            out[name]["bias"] = shifted.astype(leaf["bias"].dtype)
    shapes = {name: (maps[name].n_in, maps[name].n_out) for name in report.plan.ranks}
    report = dataclasses.replace(
        report, shapes=shapes, errors=errors,
        spectra={name: np.stack(rows) for name, rows in whole.items()},
    )  # fmt: skip
    new = dataclasses.replace(dense, ranks=tuple(report.plan.ranks.items()))
    return new, _rebuild(params, out), report


def _cut_padding(cfg: ParentConfig, params: dict) -> dict:
    """The tree with the vocabulary cut to its valid ids."""
    if cfg.vocab_rows == cfg.vocab_size:
        return params
    V = cfg.vocab_size
    params = {**params, "embed": {"kernel": params["embed"]["kernel"][:V]}}
    if "head" in params:
        params["head"] = {**params["head"], "kernel": params["head"]["kernel"][:, :V]}
    return params


def _rebuild(params: dict, out: dict) -> dict:
    """The parameter tree with the factored maps in the place of the dense ones."""

    def walk(tree: dict, path: str) -> dict:
        if path in out:
            return {key: jnp.asarray(a) for key, a in out[path].items()}
        return {
            name: walk(sub, f"{path}/{name}" if path else name) if isinstance(sub, dict) else sub
            for name, sub in tree.items()
        }

    top = {name: walk(sub, name) for name, sub in params.items() if name != "layers"}
    return {**top, "layers": walk(params["layers"], "")}


sys.modules[__name__].__class__ = VerbModule
