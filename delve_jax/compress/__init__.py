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

import numpy as np

from .. import VerbModule, metrics
from ..config import DelveError, ParentConfig
from . import anchor as pass2
from . import assembly, behind, curves, knapsack, moments, prune
from .allocate import Map, Plan, allocate, budget_of, parent_maps
from .held import held
from .spectra import TABLES, InMemory, Spectra, recipe

# "+allocation": the method's own factors at the ranks that our allocator gives them
METHODS = ("delve", "svd", "asvd", "svd-llm", "svd-llm+allocation")


@dataclass(frozen=True)
class Report:
    """What was done: ranks and relative RMS error per map and layer, totals, full spectra.

    Errors and spectra are those of pass 1; what was measured is the result.
    """

    method: str
    plan: Plan
    shapes: dict[str, tuple[int, int]]  # kernel [I, O] of every factored map
    errors: dict[str, list[float]] = field(default_factory=dict)  # in the metric of the method
    spectra: dict[str, np.ndarray] = field(default_factory=dict)  # sigma^2 [L, min(I, O)], float64
    expected: float | None = None  # KL(parent || compressed), nats a token, by the allocator
    bound: float | None = None  # and the least that any allocation in these modes could have
    curves: dict[str, tuple[float, float]] = field(default_factory=dict)  # nats = a tail^b
    dense: dict[str, tuple[int, int]] = field(default_factory=dict)  # maps that stay so, shapes
    measured: dict | None = None  # KL as it is, nll of both, nats a token; the tokens it is from
    blend: float = 0.0  # of pass 2 (`anchor.BLENDS`), 0: there was none, or it did not help

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
            "measured": self.measured,
            "blend": self.blend,
            "neurons": list(plan.neurons),
            "dense": {name: list(shape) for name, shape in self.dense.items()},
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
    params,
    tokens_NT: np.ndarray | None,
    *,
    keep: float | None = None,
    budget: int | None = None,
    method: str = "delve",
    metric: bool = True,
    bias: bool = True,
    allocation: bool | None = None,
    pruning: bool = True,
    anchor: bool = True,
    seed: int = 0,
    work: str | Path | None = None,
    check: bool = False,
    progress: bool = True,
) -> tuple[ParentConfig, dict, Report]:
    """Factorise a dense parent -> (config with ranks, parameters, Report).

    params: the parameter tree, or a source that gives it layer by layer (`parents.open_layers`):
    only a layer and what belongs to it is held, and the result stands in files under `work`.
    tokens_NT: int calibration windows [N, T] (method "svd" takes None). keep: kept share of ALL
    parameters, counted at the valid vocabulary rows; or budget: their absolute number. keep 1.0
    returns the parameters unchanged but for the padding rows of the vocabulary, which are always
    cut. metric, bias, allocation, pruning, anchor: parts of method "delve" (all on; the ablation
    turns them off). seed: of the labels that the metric samples. work: folder of the factors at
    every rank, which another keep ratio takes up again (None: a temporary one). check: measure the
    divergence of the result. Factors keep the kernel's dtype and come back on the default device: a
    caller with a mesh lays them out again. DelveError: unknown method, family or ratio, ids out of
    range, weights or activations that are not finite.
    """
    if method not in METHODS:
        raise DelveError(f"--method {method}: unknown; available are {', '.join(METHODS)}")
    if getattr(cfg, "ranks", ()) or getattr(cfg, "neurons", ()):
        raise DelveError("the checkpoint is compressed already: compress its dense source instead")
    plan, _ = plan_for(cfg, keep=keep, budget=budget)
    dense, streamed = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size), params
    if isinstance(params, dict):
        params, streamed = _cut_padding(cfg, params), None
    if plan.budget >= plan.total:
        report = Report(method, plan, {})
        if streamed is None:
            return dense, params, report
        return (
            *assembly.assemble(streamed, None, plan, work and Path(work) / "stacks")[:2],
            report,
        )
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
    mlp = prune.candidate(cfg) if pruning and ours and allocation else ()
    key = {"method": method.removesuffix("+allocation"), "metric": metric, "bias": bias,
           "neurons": bool(mlp)}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="delve-") as place, behind.done():
        source = InMemory(dense, params) if streamed is None else held(streamed)
        spectra = Spectra(source, body, tables, tokens_NT, Path(work or place),
                          how, key, seed, progress, mlp)  # fmt: skip
        report = Report(method, plan, {})
        if allocation:
            report = _allocated(spectra, [*tables, *body], plan, report)
        stacks = None if streamed is None else Path(work or place) / "stacks"

        def assembled(anchor=None):
            with metrics.progress(cfg.n_layers, "assemble", "layer", not progress) as bar:
                plan = report.plan
                return assembly.assemble(source, spectra, plan, stacks, bar.update, anchor)

        if anchor and ours:
            before = report.measured and report.measured["kl"]
            out, facts, blend = pass2.best(spectra, report.plan, bias, assembled, before)
            report = dataclasses.replace(report, measured=facts, blend=blend)
        else:
            out = assembled()
            if check and spectra.sweep and report.measured is None:
                (facts,) = curves.checked(spectra, [assembly.student(out)])
                report = dataclasses.replace(report, measured=facts)
    shapes = {m.name: (m.n_in, m.n_out) for m in [*tables, *body]}
    dense = {name: shape for name, shape in shapes.items() if name not in report.plan.ranks}
    report = dataclasses.replace(
        report, shapes=shapes, dense=dense, errors=out.errors, spectra=out.spectra
    )
    return out.cfg, out.params, report


def _allocated(spectra: Spectra, maps: list[Map], plan: Plan, report: Report) -> Report:
    """The report with the sizes of least loss in the place of the uniform ranks.

    Two points can mislead a curve far from both (one-sided tails at small budgets): what decides
    between the allocator's sizes and the uniform ranks is how far either diverges when measured.
    """
    fits = spectra.curves(lambda: curves.measure(spectra, maps))
    kinds = curves.kinds(spectra, maps, fits)
    fixed = plan.total - sum(i.options[0].cost for k in kinds for i in curves.dense(k))
    candidates = [_planned(maps, plan, kinds, fixed)]
    if candidates[0][0].neurons:
        kinds = [k._replace(modes={m: i for m, i in k.modes.items() if m != "pruned"})
                 for k in kinds]  # fmt: skip
        candidates.append(_planned(maps, plan, kinds, fixed))
    candidates.append((plan, None, None))
    found = curves.measured(spectra, [plan for plan, _, _ in candidates])
    nats = [facts["kl"] for facts in found]
    if np.isnan(nats).all():
        raise DelveError(
            f"--keep {plan.budget / plan.total:.4g}: how far the compressed parent diverges is not "
            "a finite number; keep more, or check the weights and the calibration text"
        )
    best = int(np.nanargmin(nats))
    plan, expected, bound = candidates[best]
    return dataclasses.replace(
        report, plan=plan, expected=expected, bound=bound, curves=fits, measured=found[best]
    )


def _planned(maps: list[Map], plan: Plan, kinds: list, fixed: int):
    """(the plan with the allocator's choice in the place of its ranks, expected loss, bound)."""
    choice = knapsack.choose(kinds, fixed, plan.budget, total=plan.total)
    inner = knapsack.within(kinds, choice, fixed, plan.budget // 2)
    new = dataclasses.replace(
        plan, **curves.chosen(maps, choice), parameters=choice.parameters,
        rho=plan.budget / plan.total,
    )  # fmt: skip
    new = dataclasses.replace(
        new, nested=dataclasses.replace(new, **curves.chosen(maps, inner)).sizes,
        tables="factored" if any(name in new.ranks for name in TABLES) else "dense",
    )  # fmt: skip
    return new, choice.error, choice.bound


def _cut_padding(cfg: ParentConfig, params: dict) -> dict:
    """The tree with the vocabulary cut to its valid ids."""
    if cfg.vocab_rows == cfg.vocab_size:
        return params
    V = cfg.vocab_size
    params = {**params, "embed": {"kernel": params["embed"]["kernel"][:V]}}
    if "head" in params:
        params["head"] = {**params["head"], "kernel": params["head"]["kernel"][:, :V]}
    return params


sys.modules[__name__].__class__ = VerbModule
