"""Compression of a dense parent into low-rank factors: plan ranks, stream moments, factorise.

`compress` needs tokens, not text; it returns the same family with `ranks` set, so the compressed
parent runs through the same modules. Teacher activations feed every layer.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .. import VerbModule
from ..config import DelveError, ParentConfig
from . import factorize, moments, vocab
from .allocate import Map, Plan, allocate, budget_of, parent_maps

METHODS = ("delve", "svd")


@dataclass(frozen=True)
class Report:
    """What was done: ranks and relative RMS error per map and layer, totals, full spectra."""

    method: str
    plan: Plan
    shapes: dict[str, tuple[int, int]]  # kernel [I, O] of every factored map
    errors: dict[str, list[float]] = field(default_factory=dict)  # in the metric of the method
    spectra: dict[str, np.ndarray] = field(default_factory=dict)  # sigma^2 [L, min(I, O)], float64

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
    """The ranks that `compress` would use and the maps by name, from shapes alone."""
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
    progress: bool = True,
) -> tuple[ParentConfig, dict, Report]:
    """Factorise a dense parent -> (config with ranks, parameters, Report).

    tokens_NT: int calibration windows [N, T] (method "svd" takes None). keep: kept share of ALL
    parameters, counted at the valid vocabulary rows; or budget: their absolute number. keep 1.0
    returns the parameters unchanged but for the padding rows of the vocabulary, which are always
    cut. Factors keep the kernel's dtype and come back on the default device: a caller with a mesh
    lays them out again. DelveError: unknown method, family or ratio, ids out of range, weights or
    activations that are not finite.
    """
    if method not in METHODS:
        raise DelveError(f"--method {method}: unknown; available are {', '.join(METHODS)}")
    if getattr(cfg, "ranks", ()):
        raise DelveError("the checkpoint is compressed already: compress its dense source instead")
    plan, maps = plan_for(cfg, keep=keep, budget=budget)
    params = _cut_padding(cfg, params)
    shapes = {name: (maps[name].n_in, maps[name].n_out) for name in plan.ranks}
    report = Report(method, plan, shapes)
    new = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size, ranks=tuple(plan.ranks.items()))
    if not plan.ranks:
        return new, params, report
    if method == "delve":
        if tokens_NT is None:
            raise DelveError("--method delve needs calibration tokens; --method svd does not")
        tokens_NT = moments.check_tokens(tokens_NT, cfg.vocab_size)
        dense = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size)
        steps = moments.stream(dense, params, tokens_NT)
    else:
        steps = [*((layer, None) for layer in range(cfg.n_layers)), ("head", None)]
    out: dict[str, dict] = {}
    errors: dict[str, list[float]] = {name: [] for name in plan.ranks}
    spectra: dict[str, list[np.ndarray]] = {name: [] for name in plan.ranks}
    bar = tqdm(
        steps,
        total=cfg.n_layers + 1,
        desc="compress",
        unit="layer",
        file=sys.stderr,
        disable=not progress,
    )
    for layer, sown in bar:
        if layer == "head":
            p_V = None if sown is None else vocab.frequencies(tokens_NT, cfg.vocab_size)
            gram = None if sown is None else sown["head"].gram
            fits = _tables(cfg, params, plan, gram, p_V)
        else:
            fits = _layer(params["layers"], layer, plan, sown)
        for name, fit in fits.items():
            if not (np.isfinite(fit.v_IK).all() and np.isfinite(fit.u_KO).all()):
                raise DelveError(f"map {name}, layer {layer}: NaN or Inf in the weights")
            errors[name].append(fit.error)
            spectra[name].append(fit.spectrum)
            _store(out, params, name, layer, plan.ranks[name], fit)
    report.errors.update(errors)
    report.spectra.update({name: np.stack(rows) for name, rows in spectra.items()})
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


def _at(tree: dict, name: str) -> dict:
    for part in name.split("/"):
        tree = tree[part]
    return tree


def _host(a) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def _layer(layers: dict, layer: int, plan: Plan, sown: dict | None) -> dict:
    """{map: Factors} of one layer."""
    fits = {}
    for name, ranks in plan.ranks.items():
        if name in ("embed", "head"):
            continue
        leaf = _at(layers, name)
        kernel = _host(leaf["kernel"][layer])
        bias = _host(leaf["bias"][layer]) if "bias" in leaf else None
        _finite(kernel, f"layer {layer}, map {name}")
        if sown is None:
            fits[name] = factorize.svd(kernel, ranks[layer], bias)
            continue
        m = sown[name]
        fits[name] = factorize.factor(
            kernel,
            ranks[layer],
            m.gram,
            over=m.over,
            mean_I=m.mean_I,
            bias_O=bias,
            floor=float(np.finfo(np.float32).eps),  # the Grams were summed in float32
        )
    return fits


def _finite(kernel: np.ndarray, where: str) -> None:
    if not np.isfinite(kernel).all():
        raise DelveError(f"{where}: NaN or Inf in the weights; the source checkpoint is damaged")


def _tables(cfg: ParentConfig, params: dict, plan: Plan, gram, p_V) -> dict:
    """{table: Factors} of the vocabulary tables that the plan factors."""
    fits = {}
    for name in ("embed", "head"):
        if name not in plan.ranks:
            continue
        rank, kernel = plan.ranks[name][0], np.asarray(params[name]["kernel"])
        _finite(kernel, f"table {name}")
        if gram is None:
            fits[name] = factorize.svd(kernel, rank)
        elif name == "head":
            fits[name] = vocab.factor_head(kernel, gram, p_V, rank)
        elif cfg.tie_embeddings:
            fits[name] = vocab.factor_tied(kernel, gram, p_V, rank)
        else:
            fits[name] = vocab.factor_embed(kernel, p_V, rank)
    return fits


def _store(out: dict, params: dict, name: str, layer, ranks: tuple[int, ...], fit) -> None:
    """Write one layer's factors into the stacked ones, zero beyond the true rank."""
    table = layer == "head"
    leaf = _at(params if table else params["layers"], name)
    dtype = leaf["kernel"].dtype
    if table:
        out[name] = {"v": fit.v_IK.astype(dtype), "u": fit.u_KO.astype(dtype)}
        return
    if name not in out:
        L, n_in, n_out = leaf["kernel"].shape
        out[name] = {
            "v": np.zeros((L, n_in, max(ranks)), dtype),
            "u": np.zeros((L, max(ranks), n_out), dtype),
        }
        if "bias" in leaf:
            out[name]["bias"] = np.zeros((L, n_out), leaf["bias"].dtype)
    rank = fit.v_IK.shape[1]
    out[name]["v"][layer, :, :rank] = fit.v_IK
    out[name]["u"][layer, :rank] = fit.u_KO
    if "bias" in leaf:
        out[name]["bias"][layer] = fit.bias_O


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
