"""The closed form: the rank-K factors of a map y = x W + b that lose least on given activations.

min over rank(A) <= K of E||(x W - x A) S||^2 with S S = G, the metric of the outputs: the identity
(SVD-LLM, Swift-SVD) or the second moment of the loss's gradient at y, which makes half the loss an
estimate of the rise of KL(parent || compressed) in nats a token (compression.md sections 2 and 4).
Every optimum is W followed by a projection of its outputs (orthogonal in G), so the work is to find
K directions: (6a) from the output Gram, (6b) from the input Gram, whichever is smaller. float64
numpy; eigh only: no Gram of activations is inverted, so singular ones are no special case. Where
there is an accelerator it does the large ones (`device`).
`anchored` states the problem of a map behind others that are compressed already, for `factor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg

from . import device

Array = np.ndarray
TINY = 1e-30  # mean energies below are the rounding of sums that were made in float32
ROWS = 8192  # held in float64 at a time where only products are needed: a table is 50,000 long
DAMPING = 0.1  # of the output metric; 0.01 to 0.3 differ by under 2 % of what is lost (NeoX proxy)


class Factors(NamedTuple):
    """y = (x v) u + b, columns of v in order of sigma: any lower rank is a slice."""

    v_IK: Array
    u_KO: Array
    bias_O: Array | None
    spectrum: Array  # all min(I, O) values sigma^2, descending; the loss is the sum beyond K

    @property
    def error(self) -> float:
        """Relative RMS error of the outputs: sqrt(lost energy / energy)."""
        total = self.spectrum.sum()
        return float(np.sqrt(self.spectrum[self.v_IK.shape[1] :].sum() / total)) if total else 0.0


def factor(
    kernel_IO: Array,
    rank: int,
    gram: Array | None = None,
    *,
    over: str = "inputs",
    mean_I: Array | None = None,
    bias_O: Array | None = None,
    grad: Array | None = None,
    damping: float = DAMPING,
    floor: float = 1e-14,
) -> Factors:
    """Optimal rank-`rank` factors in the metric of the activations (plain SVD where gram is None).

    gram: E[x x^T] [I,I] (over="inputs") or E[y y^T] [O,O] of y = x W without bias ("outputs").
    grad: the metric G = E[g g^T] [O,O], or E[(W g)(W g)^T] [I,I] with "inputs" (None: identity),
    drawn towards the identity by `damping`; the spectrum is then in units of the metric.
    With a bias and a mean, centred moments are used and the bias takes up the mean of what is
    lost; a map without one keeps uncentred moments, so that no parameter is added. Directions
    whose energy is below floor * the largest are chosen by plain SVD instead: on them the
    activations say nothing.
    """
    centred = gram is not None and bias_O is not None and mean_I is not None
    mean_I = np.asarray(mean_I, np.float64) if centred else None
    found = None
    if grad is not None and device.takes(len(grad)):
        found = device.two_sided(kernel_IO, rank, gram, over, grad, damping, mean_I, TINY)
    if found is not None and not centred and (found[2][:rank] > floor * found[2][0]).all():
        bias_O = None if bias_O is None else np.asarray(bias_O, np.float64)
        return Factors(*found[:2], bias_O, found[2])
    one_sided = found is None and grad is None
    by_outputs = gram is not None and over == "outputs"
    pieces = by_outputs or (one_sided and kernel_IO.shape[0] < kernel_IO.shape[1])
    w_IO = np.asarray(kernel_IO, None if pieces else np.float64)
    if gram is not None:
        gram = np.asarray(gram, np.float64)
        gram = (gram + gram.T) / 2
    if centred:
        mean = mean_I if over == "inputs" else mean_I @ w_IO
        gram = gram - np.outer(mean, mean)
    if found is not None:
        v_IK, u_KO, spectrum = found
    elif not one_sided:
        v_IK, u_KO, spectrum = _two_sided(w_IO, rank, gram, over, np.asarray(grad), damping)
        if not spectrum[0]:  # the loss does not feel this map: keep what the activations say
            v_IK, u_KO, _ = _one_sided(w_IO, rank, gram, over, floor)
    else:
        v_IK, u_KO, spectrum = _one_sided(w_IO, rank, gram, over, floor)
    known = _known(spectrum, rank, gram, floor)
    if known < rank and not one_sided:
        v_IK = v_IK if v_IK.flags.writeable else v_IK.copy()
        left = w_IO, v_IK[:, :known], u_KO[:known]
        rest_OK = _rest(*left, rank - known)
        for part, rows in _blocks(*left):  # in place: the factor of a table is gigabytes
            v_IK[part, known:] = rows @ rest_OK
        u_KO = np.vstack([u_KO[:known], rest_OK.T])
    v_IK, u_KO = balance(v_IK, u_KO, in_place=found is None)
    bias_O = None if bias_O is None else np.asarray(bias_O, np.float64)
    if centred:
        bias_O = bias_O + mean_I @ w_IO - (mean_I @ v_IK) @ u_KO
    return Factors(v_IK, u_KO, bias_O, spectrum)


class Target(NamedTuple):
    """A map that a compressed prefix feeds, as arguments of `factor`; at full rank it is dense.

    Arrays may lie on an accelerator: they go there again.
    """

    kernel_IO: Array
    gram: Array
    over: str
    bias_O: Array | None  # of the dense target
    grad: Array | None

    def factor(self, rank: int, mean_I: Array | None, floor: float = 1e-14) -> Factors:
        """Its optimal factors; mean_I: E x' (used where there is a bias)."""
        return factor(self.kernel_IO, rank, self.gram, over=self.over, mean_I=mean_I,
                      bias_O=self.bias_O, grad=self.grad, floor=floor)  # fmt: skip


def anchored(
    kernel_IO: Array,
    gram_II: Array,
    drift: Array,
    *,
    mean_I: Array | None = None,
    shift: Array | None = None,
    bias_O: Array | None = None,
    grad: Array | None = None,
    ridge: float,
    blend: float = 1.0,
) -> Target:
    """The dense map W* of the prefix's inputs x' that comes nearest to the parent's outputs.

    W* = W + blend (C + l)^-1 E[x'^T d], d = y - x' W, l = ridge * the mean of C's diagonal: ridge
    regression towards W (compression.md (3), (5); AA-SVD). It is W itself where x' = x or nothing
    is known. Truncating it is optimal for the anchored loss (4), whose constant part is W*'s own.
    gram_II: C = E[x'^T x']. drift: E[x'^T d] [I,O]; or, where O > I, that of d = x - x' [I,I]: then
    W* = T W, and the metric of W's inputs (`grad`, as in `factor`) becomes that of W*'s.
    mean_I, shift: E x' and E d; with a bias both are needed, all moments are centred, and the bias
    takes up the mean.
    """
    if device.takes(len(gram_II)):
        found = device.anchored(
            kernel_IO, gram_II, drift, mean_I, shift, bias_O, grad, ridge, blend
        )
        if found is not None:
            target_IO, gram, bias_O, grad = found
            over = "inputs" if np.shape(drift)[1] != target_IO.shape[1] else "outputs"
            return Target(target_IO, gram, over, bias_O, grad)
    w_IO = np.asarray(kernel_IO, np.float64)
    wide = np.shape(drift)[1] != w_IO.shape[1]
    gram_II, drift = np.asarray(gram_II, np.float64), np.asarray(drift, np.float64)
    c_II = gram_II
    if bias_O is not None:
        mean_I, shift = np.asarray(mean_I, np.float64), np.asarray(shift, np.float64)
        c_II, drift = gram_II - np.outer(mean_I, mean_I), drift - np.outer(mean_I, shift)
    moved = blend * _ridge(c_II, drift, ridge)
    t_II = np.eye(len(w_IO)) + moved if wide else None
    target_IO = t_II @ w_IO if wide else w_IO + moved
    if bias_O is not None:
        bias_O = np.asarray(bias_O, np.float64) + (shift @ w_IO if wide else shift)
        bias_O = bias_O + mean_I @ (w_IO - target_IO)
    if not wide:
        return Target(target_IO, target_IO.T @ gram_II @ target_IO, "outputs", bias_O, grad)
    grad = None if grad is None else t_II @ np.asarray(grad, np.float64) @ t_II.T
    return Target(target_IO, gram_II, "inputs", bias_O, grad)


def _ridge(c_II: Array, rhs_IM: Array, ridge: float) -> Array:
    """(c + l)^-1 rhs, l = ridge * mean of c's diagonal; zero where c has no energy and l is 0."""
    c_II = (c_II + c_II.T) / 2
    least = ridge * np.trace(c_II) / len(c_II)
    if least > 0:
        try:  # at most I / ridge apart from singular: far from what float64 cannot do
            factors = scipy.linalg.cho_factor(c_II + least * np.eye(len(c_II)))
            return scipy.linalg.cho_solve(factors, rhs_IM)
        except np.linalg.LinAlgError:
            pass
    values, vectors = eigh(c_II)
    known = values > 1e-12 * values[0]
    inverse = np.divide(1.0, values + least, out=np.zeros_like(values), where=known)
    return vectors @ (inverse[:, None] * (vectors.T @ rhs_IM))


def svd(kernel_IO: Array, rank: int, bias_O: Array | None = None) -> Factors:
    """Truncated SVD of the kernel alone: the plain baseline."""
    return factor(kernel_IO, rank, bias_O=bias_O)


def balance(v_IK: Array, u_KO: Array, in_place: bool = False) -> tuple[Array, Array]:
    """The gauge (9): column i of v and row i of u get equal norms, the product stays."""
    v_K = np.sqrt(sum(np.square(v_IK[i : i + ROWS]).sum(0) for i in range(0, len(v_IK), ROWS)))
    u_K = np.array([np.linalg.norm(u_O) for u_O in u_KO])
    ok_K = (v_K > 0) & (u_K > 0)
    s_K = np.sqrt(np.divide(v_K, u_K, out=np.ones_like(v_K), where=ok_K))
    v, u = (v_IK, u_KO) if in_place else (None, None)
    return np.divide(v_IK, s_K, out=v), np.multiply(u_KO, s_K[:, None], out=u)


def eigh(a: Array) -> tuple[Array, Array]:
    """Eigenvalues (descending, not below 0) and eigenvectors of a positive semidefinite matrix."""
    if device.takes(len(a)) and (found := device.eigh(a)) is not None:
        return found
    a = (a + a.T) / 2
    try:
        values, vectors = np.linalg.eigh(a)
    except np.linalg.LinAlgError:  # divide and conquer can fail where plain QR iteration does not
        values, vectors = scipy.linalg.eigh(a, driver="ev")
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def root(gram: Array) -> Array:
    """F with F F^T = gram.

    The diagonal is scaled to 1 before eigh: a channel a thousand times larger than the others
    would otherwise drown them in the rounding of its own eigenvalue.
    """
    scale = np.sqrt(np.maximum(np.diag(gram), 0.0))
    inv = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    values, vectors = eigh(gram * inv * inv[:, None])
    return scale[:, None] * vectors * np.sqrt(values)


def damped(grad: Array, plain: Array, damping: float) -> Array:
    """(1 - damping) grad + damping * (the multiple of `plain` that has grad's trace)."""
    grad = (grad + grad.T) / 2
    scale = np.trace(grad) / max(np.trace(plain), 1e-300)
    return (1 - damping) * grad + damping * (scale or 1.0) * plain


def _two_sided(w_IO, rank: int, gram, over: str, grad, damping: float):
    """(v_IK, u_KO, spectrum) of the optimum in both metrics, (6a) or (6b)."""
    n_in, n_out = w_IO.shape
    # next to nothing may depend on a map: units first
    unit_x, unit_g = (np.trace(a) / len(a) for a in (gram, grad))
    if not (unit_x > TINY and unit_g > TINY):
        return None, None, np.zeros(min(n_in, n_out))
    gram, grad, unit = gram / unit_x, grad / unit_g, unit_x * unit_g
    if over == "outputs":
        values, vectors = eigh(damped(grad, np.eye(n_out), damping))
        values = np.maximum(values, np.finfo(np.float32).eps * values[0])
        s_OO = (vectors * np.sqrt(values)) @ vectors.T
        inverse_OO = (vectors / np.sqrt(values)) @ vectors.T
        spectrum, q_OO = eigh(s_OO @ gram @ s_OO)
        q_OK = q_OO[:, :rank]
        v_IK = _times(w_IO, s_OO @ q_OK)
        return v_IK, q_OK.T @ inverse_OO, unit * spectrum[: min(n_in, n_out)]
    f_II = root(gram)
    h_II = damped(grad, w_IO @ w_IO.T, damping)
    spectrum, p_II = eigh(f_II.T @ h_II @ f_II)
    sigma_K = np.sqrt(np.maximum(spectrum[:rank], 1e-300))
    fp_IK = f_II @ (p_II[:, :rank] / sigma_K)
    return h_II @ fp_IK, fp_IK.T @ w_IO, unit * spectrum


def _one_sided(w_IO: Array, rank: int, gram: Array | None, over: str, floor: float):
    """(v_IK, u_KO, spectrum) of the optimum in the identity: orthonormal output directions."""
    n_in, n_out = w_IO.shape
    by_outputs = over == "outputs" and gram is not None
    if n_out > n_in and not by_outputs:
        columns = lambda part: np.asarray(w_IO[:, part], np.float64)  # noqa: E731
        return long(columns, w_IO.shape, rank, gram, floor)
    if by_outputs:
        spectrum, q_OO = eigh(gram)
        spectrum = spectrum[: min(n_in, n_out)]
    else:
        m_IO = w_IO if gram is None else root(gram).T @ w_IO
        spectrum, q_OO = eigh(m_IO.T @ m_IO)
        del m_IO
    q_OK = q_OO[:, :rank]
    known = _known(spectrum, rank, gram, floor)
    if known < rank:
        u_KO = q_OK[:, :known].T
        rest_OK = _rest(w_IO, _times(w_IO, u_KO.T), u_KO, rank - known)
        q_OK = _orthonormal(np.asfortranarray(np.hstack([u_KO.T, rest_OK])))
    return _times(w_IO, q_OK), q_OK.T, spectrum


def _known(spectrum: Array, rank: int, gram: Array | None, floor: float) -> int:
    """How many of the first `rank` directions the activations tell apart from nothing."""
    if gram is None or not spectrum[0]:
        return rank
    return int(np.sum(spectrum[:rank] > floor * spectrum[0]))


def long(
    columns: Callable[[slice], Array],
    shape: tuple[int, int],
    rank: int,
    gram: Array | None = None,
    floor: float = 1e-14,
) -> tuple[Array, Array, Array]:
    """(v_IK, u_KO, spectrum) in the identity of a map with O > I; u's rows are orthonormal.

    columns(part): those columns of the map in float64. ROWS of them are held at a time, and of all
    that is as long as the outputs only u as a whole: of a head of 50,000 words each is gigabytes.
    """
    q_OK, spectrum = _directions(columns, shape, rank, gram, floor)
    v_IK = np.zeros((shape[0], q_OK.shape[1]))
    for part in _parts(shape[1]):
        v_IK += columns(part) @ q_OK[part]
    return v_IK, q_OK.T, spectrum


def _directions(columns, shape, rank: int, gram=None, floor=0.0) -> tuple[Array, Array]:
    """(Q_OK, spectrum) of `long`; Q in Fortran's order."""
    n_in, n_out = shape
    rank, parts = min(rank, n_in), _parts(n_out)
    square = lambda of: _square(map(of, parts), n_in)  # noqa: E731
    f_II = None if gram is None else root(gram)
    w_II = square(columns)
    spectrum, p_II = eigh(w_II if gram is None else f_II.T @ w_II @ f_II)
    known = _known(spectrum, rank, gram, floor)
    p_IK = p_II[:, :known] if gram is None else f_II @ p_II[:, :known]
    del f_II, p_II, w_II
    q_OK = np.empty((n_out, rank), order="F")  # LAPACK's own order: what follows is in place
    # (6b) divides by sigma here; QR spans the same space in the same order without dividing, and
    # removes from the small directions what rounding leaked into them from the large ones.
    for part in parts:
        np.matmul(p_IK.T, columns(part), out=q_OK.T[:known, part])
    if known < rank:  # the rest by plain SVD of what is left, behind the directions before it
        first_OK = q_OK[:, :known]
        first_OK[...] = _orthonormal(first_OK)
        v_IK = sum(columns(part) @ first_OK[part] for part in parts)

        def left(part):
            rows = v_IK @ first_OK[part].T
            return np.subtract(columns(part), rows, out=rows)

        p_IK = eigh(square(left))[1][:, : rank - known]
        for part in parts:
            np.matmul(p_IK.T, left(part), out=q_OK.T[known:, part])
    return _orthonormal(q_OK), spectrum


def _parts(n: int) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, n, ROWS)]


def _square(pieces: Iterable[Array], n: int) -> Array:
    """Sum of a a^T over pieces [n, ..]."""
    total = np.zeros((n, n))
    for a in pieces:
        total += a @ a.T
    return total


def _orthonormal(a_OK: Array) -> Array:
    """Q of QR, in the place of `a_OK` where that is in Fortran's order."""
    return scipy.linalg.qr(a_OK, mode="economic", overwrite_a=True, check_finite=False)[0]


def _rest(w_IO: Array, v_IK: Array, u_KO: Array, rank: int) -> Array:
    """Orthonormal output directions Q_OK of w - v u in order of energy, ROWS at a time."""
    n_in, n_out = w_IO.shape
    if n_in >= n_out:
        return eigh(_square((b.T for _, b in _blocks(w_IO, v_IK, u_KO)), n_out))[1][:, :rank]

    def left(part):
        return w_IO[:, part] - v_IK @ u_KO[:, part]

    return _directions(left, w_IO.shape, rank)[0]


def _blocks(w_IO: Array, v_IK: Array | None = None, u_KO: Array | None = None):
    """(which rows, those of w - v u in float64), ROWS at a time."""
    for part in _parts(len(w_IO)):
        rows = np.asarray(w_IO[part], np.float64)
        yield part, rows if v_IK is None else rows - v_IK[part] @ u_KO


def _times(w_IO: Array, p_OK: Array) -> Array:
    """w p in float64, without a float64 copy of w."""
    out_IK = np.empty((len(w_IO), p_OK.shape[1]))
    for part, rows in _blocks(w_IO):
        np.matmul(rows, p_OK, out=out_IK[part])
    return out_IK
