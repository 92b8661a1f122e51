"""Published baselines as they were published, on one map y = x W: ASVD, SVD-LLM (W), MoDeGPT.

Pure float64 numpy functions; what they share with the closed form of `factorize` is only the layout
(kernel_IO, Factors). Plain SVD is `factorize.svd`. Nothing here is improved: no centring, no bias
compensation, Cholesky and absolute shifts where the authors use them. Biases pass through.
Published W is [O,I]; ours is its transpose, so their W S is S^T kernel_IO here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.linalg

from .factorize import Array, Factors, eigh

SHIFT = 1e-6  # SVD-LLM's and ASVD's guard against zeros, absolute in both repositories
STRS_RATIOS = tuple(i / 10 for i in range(1, 10))  # kept shares of one map that ASVD measures


# ---- one map -------------------------------------------------------------------------------------


def asvd(
    kernel_IO: Array, rank: int, abs_I: Array, alpha: float = 0.5, bias_O: Array | None = None
) -> Factors:
    """ASVD (arXiv 2312.05821): truncated SVD of the kernel with rows scaled by (E|x|)^alpha.

    abs_I: E|x_i| of every input channel over the calibration tokens. The scale is divided out of v
    again; SHIFT keeps dead channels from a division by zero, as in the authors' code. The spectrum
    is that of the scaled kernel. A vocabulary table read by one-hot inputs has abs_I = frequencies.
    """
    s_I = np.asarray(abs_I, np.float64) ** alpha + SHIFT
    fit = _truncated(s_I[:, None] * np.asarray(kernel_IO, np.float64), rank, bias_O)
    return fit._replace(v_IK=fit.v_IK / s_I[:, None])


def svd_llm(
    kernel_IO: Array,
    rank: int,
    inputs_II: Array,
    bias_O: Array | None = None,
    count: float = 1.0,
) -> Factors:
    """SVD-LLM (W) (arXiv 2403.07378): truncated SVD of L^T kernel, C = L L^T by Cholesky.

    inputs_II: C = E[x x^T], uncentred; a vector is a diagonal C (one-hot inputs: frequencies).
    count: tokens behind C. The authors decompose the sum over tokens, C * count; without a shift
    this changes nothing, but where Cholesky fails their shift to a smallest eigenvalue of SHIFT is
    absolute. The spectrum is that of the whitened kernel: the lost E||dy||^2 is its tail.
    """
    w_IO, gram = np.asarray(kernel_IO, np.float64), np.asarray(inputs_II, np.float64) * count
    if gram.ndim == 1:
        low = gram.min()
        s_I = np.sqrt(gram if low > 0 else gram - low + SHIFT)
        fit = _truncated(s_I[:, None] * w_IO, rank, bias_O)
        v_IK = fit.v_IK / s_I[:, None]
    else:
        l_II = cholesky((gram + gram.T) / 2)
        fit = _truncated(l_II.T @ w_IO, rank, bias_O)
        v_IK = scipy.linalg.solve_triangular(l_II, fit.v_IK, trans="T", lower=True)
    return fit._replace(v_IK=v_IK, spectrum=fit.spectrum / count)


def cholesky(gram: Array) -> Array:
    """Lower L with L L^T = gram, shifted by SHIFT - lambda_min where gram is not positive definite.

    Where rounding defeats this second try too, the authors' code stops; their advice is a larger
    shift (SVD-LLM issues 6, 7, 24), so it grows by tens until the factorisation exists.
    """
    shift = SHIFT
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        low = np.linalg.eigvalsh(gram)[0]
    while True:
        try:
            return np.linalg.cholesky(gram + (shift - low) * np.eye(len(gram)))
        except np.linalg.LinAlgError:
            shift *= 10


def _truncated(m_IO: Array, rank: int, bias_O: Array | None) -> Factors:
    """Truncated SVD, sqrt(sigma) to either factor as both repositories split it."""
    try:
        p_IM, sigma_M, q_MO = scipy.linalg.svd(m_IO, full_matrices=False)
    except np.linalg.LinAlgError:  # divide and conquer can fail on real activations
        p_IM, sigma_M, q_MO = scipy.linalg.svd(m_IO, full_matrices=False, lapack_driver="gesvd")
    half_K = np.sqrt(sigma_M[:rank])
    bias_O = None if bias_O is None else np.asarray(bias_O, np.float64)
    return Factors(p_IM[:, :rank] * half_K, half_K[:, None] * q_MO[:rank], bias_O, sigma_M**2)


# ---- ASVD's rank search --------------------------------------------------------------------------


def rank_at(n_in: int, n_out: int, ratio: float) -> int:
    """Rank of a map at a kept share of its own parameters, as ASVD and SVD-LLM round it."""
    return int(n_in * n_out * ratio) // (n_in + n_out)


def strs(
    losses: Mapping[str, Mapping[float, float]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
) -> dict[str, float]:
    """ASVD's sensitivity-based truncation rank search: kept share of every map, 1.0 = dense.

    losses: loss of the model with map alone cut to each share (STRS_RATIOS), measured on
    calibration text; shapes: (I, O) of every map; budget: parameters that all maps together may
    have, ranks rounded by `rank_at`. All pairs (map, share) are sorted by loss; a final part of the
    list, the least harmful pairs, is applied, every map at the smallest share that it holds there,
    and the shortest part that meets the budget is found by bisection. Where the list ends before
    the budget is met, every map is at its smallest share. Pairs of equal loss keep their order.
    """
    pairs = [(name, share) for name, row in losses.items() for share in row if share < 1]
    pairs.sort(key=lambda pair: -losses[pair[0]][pair[1]])

    def shares(start: int) -> dict[str, float]:
        out = dict.fromkeys(losses, 1.0)
        for name, share in pairs[start:]:
            out[name] = min(out[name], share)
        return out

    def parameters(out: dict[str, float]) -> int:
        return sum(
            i * o if share >= 1 else rank_at(i, o, share) * (i + o)
            for name, share in out.items()
            for i, o in (shapes[name],)
        )

    # The authors' bisection returns its last midpoint, which may be one pair over the budget.
    low, high = 0, len(pairs)  # pairs[low:] fits or low is 0
    while low < high:
        mid = (low + high + 1) // 2
        low, high = (mid, high) if parameters(shares(mid)) <= budget else (low, mid - 1)
    return shares(low)


# ---- MoDeGPT's MLPs ------------------------------------------------------------------------------


class Nystrom(NamedTuple):
    """The hidden neurons that stay, ascending, and their rows of the repaired down map."""

    kept_k: Array  # int64
    down_kO: Array  # float64


def modegpt(
    inputs_FF: Array, down_FO: Array, keep: int, ridge: float = 1e-2, floor: float = 1e-14
) -> Nystrom:
    """MoDeGPT's type I (arXiv 2408.09632, algorithm 1) for an MLP: `keep` of F hidden neurons.

    inputs_FF: C = E[h h^T] of the hidden activations, uncentred. Kept are the neurons of highest
    ridge leverage diag(C (C + ridge I)^-1); the down map becomes (S^T C S)^+ S^T C W, S the columns
    kept; up (and gate) lose the others' columns. Biases stay. ridge is in the units of C: code that
    follows the paper has 1e-4 to 1e-2 with C summed over each sequence, so multiply C by the window
    to compare. floor: eigenvalues of S^T C S below floor * the largest are zero to the
    pseudo-inverse (Grams summed in float32 need eps of float32).
    """
    gram, w_FO = np.asarray(inputs_FF, np.float64), np.asarray(down_FO, np.float64)
    values, vectors = eigh(gram)
    shrunk = np.divide(values, values + ridge, out=np.zeros_like(values), where=values > 0)
    leverage_F = (vectors**2) @ shrunk
    kept_k = np.sort(np.argsort(-leverage_F, kind="stable")[:keep])
    values, vectors = eigh(gram[np.ix_(kept_k, kept_k)])
    ok = values > floor * values[:1]
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=ok)
    down_kO = (vectors * inverse) @ (vectors.T @ (gram[kept_k] @ w_FO))
    return Nystrom(kept_k, down_kO)
