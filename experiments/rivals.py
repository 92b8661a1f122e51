"""Two published methods that only the compression study needs: ASVD's rank search, and MoDeGPT.

Both get what the others get: the same calibration windows, every parameter counted, a total that is
never exceeded. They are no `--method` of the package: the search leaves single layers dense, which
a stack cannot hold (here it is multiplied out and counted by hand), and of MoDeGPT only the part
for MLPs is here (arXiv 2408.09632, type I); everything else of the parent is SVD-LLM's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from delve_jax import models
from delve_jax.compress import baselines, curves, plan_for, prune
from delve_jax.compress.allocate import allocate, parent_maps
from delve_jax.compress.assembly import assemble, replaced
from delve_jax.compress.moments import Student, Sweep, check_tokens
from delve_jax.compress.spectra import TABLES, InMemory, Spectra, at, recipe
from delve_jax.config import DelveError

SHARES = baselines.STRS_RATIOS


def spectra_of(method, cfg, params, tokens_NT, folder):
    """The method's factors of every map at every rank, and its maps by name."""
    body, tables, _ = parent_maps(cfg)
    body, tables = ([m for m in some if m.max_rank] for some in (body, tables))
    tokens_NT = check_tokens(tokens_NT, cfg.vocab_size)
    spectra = Spectra(InMemory(cfg, params), body, tables, tokens_NT, Path(folder),
                      recipe(method), {"rival": method}, progress=False)  # fmt: skip
    return spectra, {m.name: m for m in [*tables, *body]}


# ---- ASVD with its sensitivity-based truncation rank search --------------------------------------


def searched(cfg, params, tokens_NT, budget, folder):
    """ASVD at the ranks of its own search -> (dense config, parameters multiplied out, count).

    Every map of every layer takes part, the head as in the authors' code (it is a linear layer
    there) and the input table too: all parameters are counted here, and a search that could not
    touch a third of them would meet no small budget. Losses of single maps: mean nll of as many
    calibration tokens as our own curves are measured on. The search knows shares in tenths; what
    it leaves of the budget buys single ranks for the cut maps, lowest share first, as it does for
    every other method. Kept in the folder: losses, which serve every budget.
    """
    spectra, maps = spectra_of("asvd", cfg, params, tokens_NT, folder)
    places = [(name, layer) for name, m in maps.items() for layer in range(m.layers)]
    shapes = {place: (maps[place[0]].n_in, maps[place[0]].n_out) for place in places}
    file = Path(folder) / "losses.npz"
    if not file.exists():
        np.savez(file, nll=_sensitivity(spectra, maps, places))
    losses = {
        place: dict(zip(SHARES, row, strict=True))
        for place, row in zip(places, np.load(file)["nll"], strict=True)
    }
    fixed = models.count(cfg) - sum(m.layers * m.dense for m in maps.values())
    shares = baselines.strs(losses, shapes, budget - fixed)
    ranks = {p: baselines.rank_at(*shapes[p], s) for p, s in shares.items() if s < 1}
    spent = fixed + sum(
        sum(shapes[p]) * ranks[p] if p in ranks else int(np.prod(shapes[p])) for p in places
    )
    if spent > budget:
        least = spent / models.count(cfg)
        raise DelveError(f"the search cannot meet the budget: a tenth of every map is {least:.4f}")
    while fits := [p for p in ranks if sum(shapes[p]) <= budget - spent
                   and ranks[p] < maps[p[0]].max_rank]:  # fmt: skip
        place = min(fits, key=lambda p: (ranks[p] + 1) * sum(shapes[p]) / np.prod(shapes[p]))
        ranks[place] += 1
        spent += sum(shapes[place])
    for (name, layer), rank in ranks.items():
        leaf = models.leaf_of(params, name)
        if name in TABLES:
            params = {**params, name: curves.cut(spectra, name, 0, rank, leaf)}
            continue
        one = jax.tree.map(lambda a, i=layer: a[i], leaf)
        kernel = curves.cut(spectra, name, layer, rank, one)["kernel"]
        leaf = {**leaf, "kernel": leaf["kernel"].at[layer].set(kernel)}
        params = {**params, "layers": replaced(params["layers"], name, leaf)}
    return cfg, params, spent


def _sensitivity(spectra, maps, places):
    """Mean nll with one map of one layer at each share, all else dense: [places, SHARES]."""
    rows, out = max(1, curves.TOKENS // spectra.tokens.shape[1]), []
    for name, layer in places:
        m = maps[name]
        students = [
            _alone(spectra, name, layer, baselines.rank_at(m.n_in, m.n_out, s)) for s in SHARES
        ]
        out.append([nll for _, nll in spectra.sweep.divergences(rows, students, "strs")])
    return np.array(out)


def _alone(spectra, name, layer, rank):
    """The parent with one map of one layer at a rank."""
    if name in TABLES:
        return curves.student(spectra, {name: [rank]})

    def change(index, params):
        if index != layer:
            return params
        return replaced(params, name, curves.cut(spectra, name, layer, rank, at(params, name)))

    return Student(layer=change)


# ---- MoDeGPT -------------------------------------------------------------------------------------


def modegpt(cfg, params, tokens_NT, budget, folder):
    """MLPs at MoDeGPT's neurons, the rest SVD-LLM's -> (config, parameters, their count).

    Every MLP keeps the share of its neurons that the uniform rule keeps of every map; the other
    maps share what is then left of the budget by that rule. Not the paper's sparsity per layer: the
    value of its smoothing was not at hand. The Gram is summed over a window, for which the ridge is
    meant.
    """
    mlp = models.FAMILY[cfg.family].MLP
    if not mlp:
        raise DelveError(f"{cfg.family} has no MLP to prune")
    spectra, _ = spectra_of("svd-llm", cfg, params, tokens_NT, folder)
    uniform, _ = plan_for(cfg, budget=budget)
    body, tables, total = parent_maps(cfg)
    keep = int(uniform.rho * cfg.d_ffn)
    total -= cfg.n_layers * (cfg.d_ffn - keep) * prune.per_neuron(cfg)
    plan = allocate([m for m in body if m.name not in mlp], tables, total, budget)
    file = Path(folder) / "hidden.npz"
    if not file.exists():
        np.savez(file, *_hidden(cfg, params, spectra.tokens, mlp[-1]))
    fits = []
    with np.load(file) as grams:
        for layer in range(cfg.n_layers):
            down = np.asarray(models.leaf_of(params, mlp[-1])["kernel"][layer])
            gram = grams[f"arr_{layer}"] * spectra.tokens.shape[1]
            fit = baselines.modegpt(gram, down, keep, floor=float(np.finfo(np.float32).eps))
            fits.append(_Fitted((fit.kept_k, fit.down_kO, np.zeros(cfg.d_model))))
    spectra.mlp, spectra.pruning = mlp, fits.__getitem__
    plan = dataclasses.replace(plan, neurons=(keep,) * cfg.n_layers)
    new, small, *_ = assemble(spectra.source, spectra, plan)
    return new, small, models.count(new)


class _Fitted(NamedTuple):
    """One layer's `prune.Pruning` at the one number of neurons that it was fitted for."""

    fit: tuple

    def repaired(self, k, down_FO):
        return self.fit


def _hidden(cfg, params, tokens_NT, reader):
    """E[h h^T] [F, F] of every layer's MLP."""
    sweep = Sweep(InMemory(cfg, params), tokens_NT, inputs=(reader,))
    return [sown[reader].inputs for layer, sown in sweep.forward() if layer != "head"]


RIVALS = {"asvd+strs": searched, "modegpt": modegpt}


def counted(rival, cfg, params, tokens_NT, keep, folder):
    """(config, parameters, facts of the row) of a rival at a keep ratio; never over its budget."""
    budget = plan_for(cfg, keep=keep)[0].budget
    cfg = dataclasses.replace(cfg, vocab_rows=cfg.vocab_size)
    new, small, count = RIVALS[rival](cfg, params, tokens_NT, budget, folder)
    size = jnp.dtype(cfg.dtype).itemsize
    return new, small, {"parameters": count, "bytes": count * size}
