"""Factors of the vocabulary tables (compression.md section 7), by D x D eigenproblems only.

Input table: lookups weighted by token frequency p. Head: diag(p) - p p^T on the logits (the Fisher
metric of a unigram model) and the moments of the head's inputs. Tied table: both at once. Parents
with one tokenizer can share the factor that is as long as the vocabulary.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import block_diag

from . import device
from .factorize import DAMPING, ROWS, Array, Factors, balance, damped, factor, long

SMOOTH = 1e-6  # added to every frequency: about what an unseen word of a 50k vocabulary has
# Weights are p^0.75: a rare word's error costs more than its frequency says. On the RWKV proxy at
# 1.6M tokens, table rank 61 of 128, nll for exponents 0.25, 0.5, 0.75, 1: input table 4.814, 4.798,
# 4.795, 4.804 (plain SVD 4.830), head 4.816, 4.815, 4.819, 4.823 (4.839).
TEMPER = 0.75


def frequencies(tokens: Array, vocab_size: int) -> Array:
    """Unigram frequencies p_V (sum 1) of the ids in `tokens`."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocab_size).astype(np.float64)
    return counts / max(counts.sum(), 1.0)


def weights(p_V: Array) -> Array:
    """Smoothed and tempered row weights (sum 1, all positive) from frequencies."""
    w_V = (p_V + SMOOTH) ** TEMPER
    return w_V / w_V.sum()


def row_gram(table_VD: Array, weight_V: Array) -> Array:
    """sum_v weight_v e_v e_v^T [D,D] in float64, streamed over the rows."""
    if device.takes(table_VD.shape[1]):
        return device.row_gram(table_VD, weight_V)
    gram = np.zeros((table_VD.shape[1],) * 2)
    for i in range(0, len(table_VD), ROWS):
        rows = np.asarray(table_VD[i : i + ROWS], np.float64)
        gram += (rows * weight_V[i : i + ROWS, None]).T @ rows
    return gram


def factor_embed(table_VD: Array, w_V: Array, rank: int, grad_DD: Array | None = None) -> Factors:
    """Factors v [V,K], u [K,D] of an input table, least lookup error weighted by w_V.

    grad_DD: E[g g^T] at the looked-up rows, the metric of their errors (None: the identity).
    """
    return factor(table_VD, rank, row_gram(table_VD, w_V), over="outputs", grad=grad_DD)


def factor_head(kernel_DV: Array, gram_DD: Array, w_V: Array, rank: int) -> Factors:
    """Factors v [D,K], u [K,V] of a head; gram_DD = E[f f^T] of its inputs.

    The weighted mean column is removed first: logits move by one constant per position, which no
    softmax sees, and a large useless direction goes. What is left is the optimum for the metric
    diag(w) - w w^T; w_V are weights of the words, best from the mean prediction.
    """
    s_V = np.sqrt(w_V)
    mean_D = np.zeros(len(kernel_DV))
    for i in range(0, len(w_V), ROWS):
        mean_D += np.asarray(kernel_DV[:, i : i + ROWS], np.float64) @ w_V[i : i + ROWS]

    def columns(part):  # the map as a whole would be gigabytes in float64
        rows_DV = np.array(kernel_DV[:, part], np.float64)
        rows_DV -= mean_D[:, None]
        rows_DV *= s_V[part]
        return rows_DV

    if kernel_DV.shape[0] < len(w_V):
        v_DK, u_KV, spectrum = long(columns, kernel_DV.shape, rank, gram_DD)
    else:
        v_DK, u_KV, _, spectrum = factor(columns(slice(None)), rank, gram_DD, over="inputs")
    v_DK, u_KV = balance(v_DK, np.divide(u_KV, s_V, out=u_KV), in_place=True)
    return Factors(v_DK, u_KV, None, spectrum)


def factor_tied(
    table_VD: Array, gram_DD: Array, w_V: Array, rank: int, grad_DD: Array | None = None
) -> Factors:
    """One pair of factors for a table that is both input table and head (logits = f E^T).

    Rows weighted by w_V; columns by the sum of what lookups and logits cost, both in nats: the
    metric of the lookups grad_DD and E[f f^T]. Without grad_DD it is alpha I, alpha such that
    lookups and logits have equal energy and neither use is served at the other's cost.
    """
    rows_DD = row_gram(table_VD, w_V)
    gram_DD = (gram_DD + gram_DD.T) / 2
    if grad_DD is not None:
        return factor(table_VD, rank, rows_DD, over="outputs", grad=grad_DD + gram_DD)
    alpha = np.sum(rows_DD * gram_DD) / max(np.trace(rows_DD), 1e-300) or 1.0
    metric_DD = alpha * np.eye(len(gram_DD)) + gram_DD
    return factor(table_VD, rank, rows_DD, over="outputs", grad=metric_DD, damping=0.0)


def shared_embed(
    tables_VD: list[Array], w_V: Array, rank: int, grads_DD: list[Array]
) -> tuple[Array, list[Array], Array]:
    """Common codes of the input tables of parents with one tokenizer: E_p ~ c_VK u_p.

    -> (c_VK, [u_KD of each parent], spectrum). Least sum over the parents of the lookup errors
    weighted by w_V and by each parent's own metric grads_DD, so that all are in nats: the one
    closed form on the tables side by side. V K + K sum D numbers (hybrid.md section 6).
    """
    wide_VO = np.concatenate(tables_VD, axis=1)
    metric = block_diag(*(damped(g, np.eye(len(g)), DAMPING) for g in grads_DD))
    gram = row_gram(wide_VO, w_V)
    fit = factor(wide_VO, rank, gram, over="outputs", grad=metric, damping=0.0)
    return fit.v_IK, _split(fit.u_KO, tables_VD, axis=1), fit.spectrum


def shared_head(
    kernels_DV: list[Array], grams_DD: list[Array], w_V: Array, rank: int
) -> tuple[list[Array], Array, Array]:
    """Common codes of the heads: W_p ~ v_p c_KV -> ([v_DK of each parent], c_KV, spectrum).

    As `factor_head` on the kernels on top of each other; grams_DD are E[f f^T] of each parent's
    own head inputs (hybrid.md section 7). Exact at rank sum D up to a constant per position.
    """
    fit = factor_head(np.concatenate(kernels_DV), block_diag(*grams_DD), w_V, rank)
    return _split(fit.v_IK, kernels_DV, axis=0), fit.u_KO, fit.spectrum


def _split(joint: Array, parts: list[Array], axis: int) -> list[Array]:
    """The parents' pieces of a factor, in the order of `parts`."""
    return np.split(joint, np.cumsum([p.shape[axis] for p in parts])[:-1], axis=axis)
