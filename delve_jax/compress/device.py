"""What a GPU does of the closed forms, in float64 there too: the large matrices.

The host's way (`factorize`) is what counts and what a CPU always takes. Here the same optima are
found with fewer decompositions: of a metric or a Gram any factor will do, so Cholesky's takes the
place of an eigh where it exists (an eigh of 2048 takes some 100 times as long there). Results agree
with the host's to rounding. None stands for "not here": the caller goes the host's way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

LARGE = 1024  # from here on an accelerator is worth the way there and back
HIGHEST = jax.lax.Precision.HIGHEST
SMALLEST = 1e-30  # of the largest sigma^2: columns below are cut off later, and must stay finite


def on() -> bool:
    """Whether there is a GPU: the one place that decides, with `takes`. (A TPU has no float64.)"""
    return jax.default_backend() == "gpu"


def takes(n: int) -> bool:
    """Whether matrices of this size go to the accelerator."""
    return n >= LARGE and on()


def room() -> int:
    """Bytes that may stay on the accelerator between steps, a third of what it gives us."""
    stats = jax.local_devices()[0].memory_stats() if on() else None
    return (stats or {}).get("bytes_limit", 0) // 3


# ---- programs ------------------------------------------------------------------------------------
# One compiles for seconds there, and `jax.jit` compiles anew for every dtype of the arguments, for
# every pattern of those that are committed to a device and those that are not, and for every
# default precision, though none of these change what is computed here.

_compilers = ThreadPoolExecutor(8, "compile")
_compiling: dict[Callable, list[Future]] = {}


def _there(function: Callable) -> Callable:
    """The function in full precision, once what `ahead` started for it is done."""

    @functools.wraps(function)
    def now(*args, **named):
        with jax.default_matmul_precision("highest"):
            return function(*args, **named)

    @functools.wraps(function)
    def call(*args, **named):
        wait(_compiling.pop(call, ()))  # what failed there fails here again, or does not matter
        return now(*args, **named)

    call.now = now
    return call


def ahead(function: Callable | str, *args) -> None:
    """Call a program, or a function of this file by name, on a thread: it is compiled when needed.

    Programs compile side by side there, while the caller reads files.
    """
    function = _BY_NAME.get(function, function)

    def compiles():  # and keeps nothing of what comes out
        function.now(*args)

    _compiling.setdefault(function, []).append(_compilers.submit(compiles))


def put(tree):
    """The arrays of a tree on the accelerator, all of them committed to it."""
    if not on():
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, jax.local_devices()[0])


def program(function):
    """`jax.jit`, compiled once for all arguments of the same shapes and dtypes, wherever they are.

    On a CPU it is `jax.jit` itself.
    """
    compiled = jax.jit(function)
    there = _there(lambda *args: compiled(*put(args)))

    @functools.wraps(function)
    def run(*args):
        return there(*args) if on() else compiled(*args)

    run.ahead = functools.partial(ahead, there)
    return run


# ---- sums and products ---------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, part):
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


@jax.jit
def _float64(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


@jax.jit
def _per(total, count):
    return jax.tree.map(lambda a: a / count, total)


@jax.jit
def _finite(tree):
    return jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]).all()


def add(total, part):
    """The sum of a tree of float64 sums (None: nothing yet), which is used up, and float32 ones."""
    with jax.enable_x64(True):
        if total is None:
            return _float64(put(part))
        return _add(total, part)


def per(total, count) -> dict:
    """A tree of float64 sums divided by a count, on the device."""
    with jax.enable_x64(True):
        return _per(total, np.float64(count))


def finite(tree) -> bool:
    """Whether nothing in a tree of arrays, wherever they are, is NaN or Inf."""
    leaves = jax.tree.leaves(tree)
    there = [a for a in leaves if isinstance(a, jax.Array)]
    here = (np.isfinite(a).all() for a in leaves if not isinstance(a, jax.Array))
    return all(here) and (not there or bool(_finite(there)))


@jax.jit
def _product(v_IK, u_KO):
    return jnp.matmul(v_IK, u_KO, precision=HIGHEST)


def product(v_IK, u_KO):
    """v u in their own dtype: of factors that are multiplied out to be run."""
    v_IK, u_KO = np.asarray(v_IK), np.asarray(u_KO)
    if not on():
        return v_IK @ u_KO
    # one program for all ranks that pay: zeros up to the largest of them add nothing
    (n_in, rank), n_out = v_IK.shape, u_KO.shape[1]
    most = max(rank, n_in * n_out // (n_in + n_out))
    v, u = np.zeros((n_in, most), v_IK.dtype), np.zeros((most, n_out), u_KO.dtype)
    v[:, :rank], u[:rank] = v_IK, u_KO
    with jax.default_matmul_precision("highest"):
        return _product(*put((v, u)))


@jax.jit
def _row_gram(table_VD, weight_V):
    rows_VD = table_VD.astype(jnp.float64)
    return (rows_VD * weight_V[:, None]).T @ rows_VD


def row_gram(table_VD, weight_V) -> np.ndarray:
    """sum_v weight_v e_v e_v^T [D,D]."""
    with jax.enable_x64(True):
        return np.array(_row_gram(table_VD, weight_V))


# ---- decompositions ------------------------------------------------------------------------------


@jax.jit
def _eigh(a):
    values, vectors = jnp.linalg.eigh((a + a.T) / 2, symmetrize_input=False)
    return jnp.maximum(values[::-1], 0.0), vectors[:, ::-1]


def eigh(a) -> tuple[np.ndarray, np.ndarray] | None:
    """As `factorize.eigh`; None where the accelerator found nothing finite."""
    with jax.enable_x64(True):
        values, vectors = map(np.array, _eigh(np.asarray(a, np.float64)))
    return (values, vectors) if np.isfinite(values).all() and np.isfinite(vectors).all() else None


def _damped(grad, plain, damping):
    scale = jnp.trace(grad) / jnp.maximum(jnp.trace(plain), 1e-300)
    return (1 - damping) * grad + damping * jnp.where(scale == 0, 1.0, scale) * plain


def _root(gram, cholesky: bool):
    """F with F F^T = gram; channels without energy have a row of zeros."""
    scale = jnp.sqrt(jnp.maximum(jnp.diag(gram), 0.0))
    inv = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1.0), 0.0)
    unit = gram * inv * inv[:, None]
    if cholesky:
        return scale[:, None] * jnp.linalg.cholesky(unit + jnp.diag((scale == 0) * 1.0))
    values, vectors = _eigh(unit)
    return scale[:, None] * vectors * jnp.sqrt(values)


@functools.partial(jax.jit, static_argnames=("over", "cholesky"))
def _two_sided(w_IO, gram, grad, mean_I, damping, over: str, cholesky: bool):
    gram, grad = (gram + gram.T) / 2, (grad + grad.T) / 2
    if mean_I is not None:
        mean = mean_I if over == "inputs" else mean_I @ w_IO
        gram = gram - jnp.outer(mean, mean)
    units = jnp.stack([jnp.trace(a) / len(a) for a in (gram, grad)])
    gram, grad = gram / units[0], grad / units[1]
    if over == "outputs":
        metric = _damped(grad, jnp.eye(len(grad)), damping)
        if cholesky:
            s_OO = jnp.linalg.cholesky(metric)
        else:
            values, vectors = _eigh(metric)
            values = jnp.maximum(values, np.finfo(np.float32).eps * values[0])
            s_OO = (vectors * jnp.sqrt(values)) @ vectors.T
        spectrum, q_OO = _eigh(s_OO.T @ gram @ s_OO)
        spectrum = spectrum[: min(w_IO.shape)]
        v_IK = w_IO @ (s_OO @ q_OO)
        if cholesky:
            u_KO = solve_triangular(s_OO, q_OO, trans=1, lower=True).T
        else:
            u_KO = q_OO.T @ ((vectors / jnp.sqrt(values)) @ vectors.T)
    else:
        f_II = _root(gram, cholesky)
        h_II = _damped(grad, w_IO @ w_IO.T, damping)
        spectrum, p_II = _eigh(f_II.T @ h_II @ f_II)
        fp_IK = f_II @ (p_II / jnp.sqrt(jnp.maximum(spectrum, SMALLEST * spectrum[0])))
        v_IK, u_KO = h_II @ fp_IK, fp_IK.T @ w_IO
    # the gauge of `factorize.balance`
    v_K, u_K = jnp.linalg.norm(v_IK, axis=0), jnp.linalg.norm(u_KO, axis=1)
    ok_K = (v_K > 0) & (u_K > 0)
    s_K = jnp.where(ok_K, jnp.sqrt(v_K / jnp.where(ok_K, u_K, 1.0)), 1.0)
    spectrum = units[0] * units[1] * spectrum
    return v_IK / s_K, u_KO * s_K[:, None], spectrum, units


def _widened(*args):
    """Arguments of a program in float64: a map is asked for with several dtypes, and one counts."""
    return _float64(put(args))


@_there
def two_sided(w_IO, rank: int, gram, over: str, grad, damping: float, mean_I=None, least=1e-30):
    """(v_IK, u_KO, spectrum) of `factorize.factor` with a metric, balanced, read-only; or None.

    All ranks are made and then cut, so that maps of one shape share a program. least: mean energy
    below which there is nothing to find.
    """
    with jax.enable_x64(True):
        w_IO, gram, grad, mean_I = _widened(w_IO, gram, grad, mean_I)
        for cholesky in (True, False) if damping else (False,):
            v, u, spectrum, units = _two_sided(w_IO, gram, grad, mean_I, damping, over, cholesky)
            if not (np.asarray(units) > least).all():
                return None
            spectrum = np.asarray(spectrum)
            if np.isfinite(spectrum).all():
                return np.asarray(v)[:, :rank], np.asarray(u)[:rank], spectrum
    return None


@jax.jit
def _anchored(w_IO, gram_II, drift, mean_I, shift, bias_O, grad, ridge, blend):
    wide = drift.shape[1] != w_IO.shape[1]
    c_II = gram_II
    if bias_O is not None:
        c_II, drift = gram_II - jnp.outer(mean_I, mean_I), drift - jnp.outer(mean_I, shift)
    c_II = (c_II + c_II.T) / 2
    eye_II = jnp.eye(len(c_II))
    least = ridge * jnp.trace(c_II) / len(c_II)
    lower_II = jnp.linalg.cholesky(c_II + least * eye_II)
    moved = blend * cho_solve((lower_II, True), drift)
    t_II = eye_II + moved if wide else None
    target_IO = t_II @ w_IO if wide else w_IO + moved
    if bias_O is not None:
        bias_O = bias_O + (shift @ w_IO if wide else shift) + mean_I @ (w_IO - target_IO)
    ok = (least > 0) & jnp.isfinite(target_IO).all()
    if not wide:
        return target_IO, target_IO.T @ gram_II @ target_IO, bias_O, grad, ok
    grad = None if grad is None else t_II @ grad @ t_II.T
    return target_IO, gram_II, bias_O, grad, ok


@_there
def anchored(w_IO, gram_II, drift, mean_I, shift, bias_O, grad, ridge: float, blend: float):
    """(kernel_IO, gram, bias_O, grad) of `factorize.anchored`, left on the device; or None."""
    means = (None, None, None) if bias_O is None else (mean_I, shift, bias_O)
    with jax.enable_x64(True):
        args = _widened(w_IO, gram_II, drift, *means, grad)
        *found, ok = _anchored(*args, ridge, blend)
        if not bool(ok):
            return None
    kernel_IO, gram, bias_O, grad = found
    return kernel_IO, gram, None if bias_O is None else np.asarray(bias_O), grad


_BY_NAME = {"two_sided": two_sided, "anchored": anchored}
