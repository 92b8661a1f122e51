"""Neuron pruning of an MLP: keep k of its F hidden neurons h, refit the map y = h W that reads h.

min over W' of tr G (h W - h_S W')^T (h W - h_S W') (MoDeGPT, arXiv 2408.09632, MLP part; Nystrom):
W' = C_SS^+ C_S: W, whatever the output metric G is; C = E[h h^T], centred where the map has a bias.
Neurons are ordered once, greedily by how much more the output would lose without them, so that any
k is a prefix. Letters here: P neurons picked at once, J candidates for them, M those picked so far.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from .. import models
from ..config import ParentConfig
from .factorize import DAMPING, TINY, Array, damped, root

# Picked at once: F / BLOCKS out of 4 times as many candidates. Measured on the MLPs of
# three proxies (F = 384, 512) at k = F/2 and F/4: as good as one at a time, within 1 %.
BLOCKS = 64
# MLPs with more neurons are not offered for pruning. At 4096 the Gram is 128 MiB in float64, what a
# layer's file keeps half that, and the order, O(F^3), takes some 10 s on one core (measured at
# 2048: 1.9 s); at 16384 these would be 2 GiB, 1 GiB and 64 times as long.
WIDEST = 4096


class Pruning(NamedTuple):
    """The order of an MLP's neurons, what each prefix of it loses, and what refits the others."""

    order_F: Array  # the first k are kept
    losses: Array  # [F+1]: with each number of neurons kept, never increasing, 0 at F
    lower_FM: Array  # L of the pivoted Cholesky factorisation L L^T ~ gram, columns in that order
    mean_F: Array | None = None  # E[h], where the bias takes up what is lost on it

    def packed(self) -> dict[str, Array]:
        """Its arrays for a file. float32 holds what a Gram summed up in float32 can say."""
        out = {**self._asdict(), "lower_FM": self.lower_FM.astype(np.float32)}
        return {name: a for name, a in out.items() if a is not None}

    def errors(self, ks) -> Array:
        """Lost E|dy|^2 (tr(G Cov dy) in the metric) with each number of neurons in `ks` kept."""
        return self.losses[np.asarray(ks)]

    def repaired(self, k: int, down_FO: Array) -> tuple[Array, Array, Array]:
        """-> (kept_K, W' [K, O] float64, what to add to the bias [O]) for k neurons.

        In the order of their worth, so that a smaller model has the first of them.
        """
        down_FO = np.asarray(down_FO, np.float64)
        n_in, n_out = down_FO.shape
        kept_K = self.order_F[:k]
        if k == n_in:
            return kept_K, down_FO[kept_K], np.zeros(n_out)
        used = min(k, self.lower_FM.shape[1])  # beyond: neurons that add nothing, with zero rows
        lower_FM = np.asarray(self.lower_FM[:, :used], np.float64)
        down_KO = np.zeros((k, n_out))
        down_KO[:used] = scipy.linalg.solve_triangular(
            lower_FM[kept_K[:used]], lower_FM.T @ down_FO, lower=True, trans="T"
        )
        if self.mean_F is None:
            return kept_K, down_KO, np.zeros(n_out)
        return kept_K, down_KO, self.mean_F @ down_FO - self.mean_F[kept_K] @ down_KO


def ordered(
    inputs_FF: Array,
    down_FO: Array,
    *,
    mean_F: Array | None = None,
    grad_OO: Array | None = None,
    damping: float = DAMPING,
    floor: float = 1e-9,
) -> Pruning:
    """The neurons of an MLP in the order in which they are worth keeping.

    inputs_FF: E[h h^T], uncentred; down_FO: the kernel that reads h. mean_F = E[h], only where that
    map has a bias: moments are then centred and the bias takes up what is lost on the mean.
    grad_OO = E[g g^T], drawn towards the identity by `damping`, weighs the outputs (None: equally;
    where it is nothing, nothing is lost). A neuron that the ones before it predict up to `floor` of
    its energy adds nothing but noise: such neurons come last and are lost free.
    """
    felt_FO = np.asarray(down_FO, np.float64)  # distances between its rows are in the metric
    gram_FF = np.asarray(inputs_FF, np.float64)
    gram_FF = (gram_FF + gram_FF.T) / 2
    if mean_F is not None:
        mean_F = np.asarray(mean_F, np.float64)
        gram_FF = gram_FF - np.outer(mean_F, mean_F)
    unit = 1.0
    if grad_OO is not None:
        unit = float(np.trace(grad_OO)) / len(grad_OO)
        unit = unit if unit > TINY else 0.0
        if unit:
            grad_OO = np.asarray(grad_OO, np.float64) / unit
            felt_FO = felt_FO @ root(damped(grad_OO, np.eye(len(grad_OO)), damping))
    order_F, lower_FM, gains_M = _order(gram_FF, felt_FO, floor)
    # summed from the far end: never increasing, exactly 0 at F, no cancellation near it
    losses = np.zeros(len(order_F) + 1)
    losses[: len(gains_M)] = unit * np.cumsum(gains_M[::-1])[::-1]
    return Pruning(order_F, losses, lower_FM, mean_F)


def _order(gram_FF: Array, felt_FO: Array, floor: float) -> tuple[Array, Array, Array]:
    """Greedy pivoted Cholesky -> (order_F, L [F, M] with L L^T ~ gram, gains of the M pivots).

    gain_j = |R_j: W|^2 / R_jj: what the loss falls by when j joins the ones picked, R the residual
    of the Gram given those. M is the numerical rank. Compared on the MLPs of three proxies at
    k = F/4, held-out loss beside this rule: energy of R_jj W_j, +17 % in the mean; ridge leverage,
    +32 %; magnitude without residuals, +24 %; backward elimination, -1 % for an inverse of C.
    """
    F = len(gram_FF)
    size = max(1, F // BLOCKS)
    left_FO = gram_FF @ felt_FO  # R W
    rest_F = np.maximum(np.diag(gram_FF), 0.0)  # diagonal of R
    least_F = floor * rest_F
    lower_FM, order, gains, free = np.zeros((F, F)), [], [], np.ones(F, bool)
    while (live_F := free & (rest_F > least_F)).any():
        energy_F = np.einsum("fo,fo->f", left_FO, left_FO)
        gain_F = np.divide(energy_F, rest_F, out=np.full(F, -1.0), where=live_F)
        at_J = np.argsort(-gain_F, kind="stable")[: min(4 * size, int(live_F.sum()))]
        done = lower_FM[:, : len(order)]
        picked, small_JP = _pick(
            gram_FF[np.ix_(at_J, at_J)] - done[at_J] @ done[at_J].T,
            left_FO[at_J],
            least_F[at_J],
            size,
        )
        at_P = at_J[picked]
        small_PP = small_JP[picked]
        columns_FP = gram_FF[:, at_P] - done @ done[at_P].T
        new_FP = scipy.linalg.solve_triangular(small_PP, columns_FP.T, lower=True).T
        heard_PO = scipy.linalg.solve_triangular(small_PP, left_FO[at_P], lower=True)
        left_FO -= new_FP @ heard_PO
        rest_F = np.maximum(rest_F - np.einsum("fp,fp->f", new_FP, new_FP), 0.0)
        lower_FM[:, len(order) : len(order) + len(at_P)] = new_FP
        free[at_P] = False
        order.extend(at_P)
        gains.extend(np.einsum("po,po->p", heard_PO, heard_PO))
    order_F = np.concatenate([np.array(order, int), np.flatnonzero(free)])
    return order_F, lower_FM[:, : len(order)], np.array(gains)


def _pick(rest_JJ: Array, left_JO: Array, least_J: Array, size: int) -> tuple[list[int], Array]:
    """Up to `size` candidates, one at a time by gain, and their columns [J, P] of the factor."""
    picked, columns, free = [], [], np.ones(len(rest_JJ), bool)
    while len(picked) < size:
        rest_J = np.diag(rest_JJ)
        live_J = free & (rest_J > least_J)
        if not live_J.any():
            break
        energy_J = np.einsum("jo,jo->j", left_JO, left_JO)
        best = int(np.argmax(np.where(live_J, energy_J / np.where(live_J, rest_J, 1.0), -1.0)))
        column_J = rest_JJ[:, best] / np.sqrt(rest_J[best])
        left_JO = left_JO - np.outer(column_J, left_JO[best] / column_J[best])
        rest_JJ = rest_JJ - np.outer(column_J, column_J)
        free[best] = False
        picked.append(best)
        columns.append(column_J)
    return picked, np.stack(columns, axis=1)


def candidate(cfg: ParentConfig) -> tuple[str, ...]:
    """The maps of the MLP whose neurons pruning may take, the one that reads them last; or ()."""
    maps = models.FAMILY[cfg.family].MLP
    return maps if maps and 2 < cfg.d_model <= cfg.d_ffn <= WIDEST else ()


def per_neuron(cfg: ParentConfig) -> int:
    """Parameters that one neuron of an MLP has: its columns, its bias, its row."""
    tree = models.abstract_params(cfg)
    *makers, reader = (models.leaf_of(tree, n) for n in models.FAMILY[cfg.family].MLP)
    made = sum(leaf["kernel"].shape[-2] + ("bias" in leaf) for leaf in makers)
    return made + reader["kernel"].shape[-1]


def refitted(leaf: dict, pruning: Pruning, k: int) -> dict:
    """The map that reads the neurons of one layer, refitted to k of them: in its shape, the rows
    of the others zero."""
    kept_K, down_KO, shift_O = pruning.repaired(k, leaf["kernel"])
    kernel_FO = np.zeros(leaf["kernel"].shape)
    kernel_FO[kept_K] = down_KO
    new = {**leaf, "kernel": jnp.asarray(kernel_FO, leaf["kernel"].dtype)}
    if "bias" in leaf:
        new["bias"] = jnp.asarray(leaf["bias"] + shift_O, leaf["bias"].dtype)
    return new
