"""Compressed parents -> one DELVE that equals their pool: static weights, hub scales, config.

The weights are fitted on calibration tokens and the problem is convex: J = 1 (log-linear pool) by
Newton steps over a >= 0, J = K (mixture) by EM. One-hot weights are feasible, so on the fitted text
the pool is never worse than its best parent (hybrid.md §8).
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import nnls

from . import VerbModule, models
from .compress.codes import common
from .config import DelveConfig, DelveError, ParentConfig
from .metrics import progress
from .models import delve

ROWS = 4096  # tokens whose logits exist at a time


def joint_config(
    parents: list[tuple[str, ParentConfig]],
    latents: int = 1,
    hub_rank: int | None = None,
    teachers: tuple[str, ...] = (),
    codes: tuple[str, ...] = (),
) -> DelveConfig:
    """The DELVE of these parents: superblocks by their depths, hub rank d/16 unless given."""
    if len({cfg.vocab_size for _, cfg in parents}) > 1:
        sizes = ", ".join(f"{n} {cfg.vocab_size}" for n, cfg in parents)
        raise DelveError(f"parents have different vocabularies ({sizes}); they must share one")
    if len({n for n, _ in parents}) < len(parents):
        raise DelveError("two parents have the same name; rename one directory")
    if latents not in (1, len(parents)):
        raise DelveError(f"latents {latents}: 1 (log-linear) or {len(parents)} (mixture)")
    width = max(cfg.d_model for _, cfg in parents)
    return DelveConfig(
        streams=tuple(parents),
        n_superblocks=delve.choose_superblocks([cfg.n_layers for _, cfg in parents]),
        latents=latents,
        hub_rank=hub_rank or max(1, width // 16),
        codes=codes,
        teachers=tuple(teachers),
    )


def joints_count(cfg: DelveConfig) -> int:
    """Parameters that fusion adds to its parents: pool, hub, gate."""
    return models.count(cfg) - sum(models.count(sub) for _, sub in cfg.streams)


def fuse(
    parents: list[tuple[str, ParentConfig, dict]],
    tokens_NT: np.ndarray | None = None,
    *,
    latents: int = 1,
    hub_rank: int | None = None,
    teachers: tuple[str, ...] = (),
    codes: int | None = None,
    shared: bool = False,
    seed: int = 0,
) -> tuple[DelveConfig, dict, dict]:
    """-> (config, parameters, report). tokens_NT: calibration windows [N, T]; None: equal weights.

    The hub's frozen scales are the streams' RMS at each sync point on the same tokens (1 without).
    codes: rank of vocabulary tables that all streams share, fitted on the same tokens (None: each
    keeps its own). shared: the parents come with such tables (`joint.compress`). DelveError: codes
    without tokens.
    """
    if codes is not None:
        if tokens_NT is None:
            raise DelveError(
                "--codes: name text with --calibrate; the common tables are fitted on it"
            )
        parents = common(parents, tokens_NT, codes, seed)
    tables = tuple(delve.LONG) if shared or codes is not None else ()
    cfg = joint_config([(n, c) for n, c, _ in parents], latents, hub_rank, teachers, tables)
    params = {
        **delve.apart(cfg, {n: p for n, _, p in parents}),
        **delve.init_joints(cfg, jax.random.key(seed)),
    }
    if tokens_NT is None:
        return cfg, params, {"fitted": False}
    weights, report = fit_weights(
        [c for _, c, _ in parents], [p for _, _, p in parents], tokens_NT, mixture=latents > 1
    )
    weights = weights.astype(np.float32)
    if latents == 1:
        params["pool"] = {"a": jnp.asarray(weights)}
    else:  # a weight of exactly 0 would have no gradient and no finite logarithm
        params["pool"] = {"log_pi": jnp.log(jnp.maximum(weights, 1e-6))}
    if cfg.n_superblocks > 1:
        for name, sub, whole in parents:
            rms = boundary_rms(sub, whole, tokens_NT[:8], cfg.n_superblocks)
            params["hub"][name]["sigma"] = jnp.asarray(rms, jnp.float32)
    return cfg, params, {"fitted": True, "weights": weights.tolist(), **report}


def boundary_rms(cfg: ParentConfig, params: dict, tokens_NT, n_superblocks: int) -> np.ndarray:
    """RMS of one stream before superblocks 1..S-1, on a few windows -> [S-1]."""
    bounds = delve.boundaries(cfg.n_layers, n_superblocks)

    @jax.jit
    def run(params, tokens):
        x, out = models.embed_tokens(cfg, params, tokens), []
        ctx, _ = models.FAMILY[cfg.family].context(cfg, x)
        for s in range(n_superblocks - 1):
            layers = jax.tree.map(lambda a, s=s: a[bounds[s] : bounds[s + 1]], params["layers"])
            x, _ = models.run_layers(cfg, layers, x, None, ctx)
            out.append(jnp.sqrt(jnp.mean(x * x)))
        return jnp.stack(out)

    return np.asarray(run(params, jnp.asarray(tokens_NT)))


def fit_weights(
    configs: list[ParentConfig], params: list[dict], tokens_NT: np.ndarray, mixture: bool = False
) -> tuple[np.ndarray, dict]:
    """Static pool weights [K] minimising the pooled nll of tokens_NT (windows [N, T]).

    Log-linear: a >= 0, their sum free (an inverse temperature). Mixture: w >= 0 summing to 1.
    Also returns {"nll": fitted, "nll_parents": [K], "tokens"}, nats per token.
    """
    features = [_features(c, p, tokens_NT[:, :-1]) for c, p in zip(configs, params, strict=True)]
    targets_N = tokens_NT[:, 1:].reshape(-1)
    heads = [models.head_params(c, p) for c, p in zip(configs, params, strict=True)]

    def logits(heads, f):
        parts = [models.head(c, h, x) for c, h, x in zip(configs, heads, f, strict=True)]
        return jnp.stack(parts)  # [K, n, V]

    @jax.jit
    def own(heads, f, y_n):
        log_p_KnV = jax.nn.log_softmax(logits(heads, f))
        return jnp.take_along_axis(log_p_KnV, y_n[None, :, None], axis=-1)[..., 0]

    chunks = [
        ([f[i : i + ROWS] for f in features], jnp.asarray(targets_N[i : i + ROWS]))
        for i in range(0, len(targets_N), ROWS)
    ]
    log_p_KN = np.concatenate([np.asarray(own(heads, f, y), np.float64) for f, y in chunks], axis=1)
    alone = -log_p_KN.mean(axis=1)
    if mixture:
        weights, value = _em(log_p_KN)
    else:

        @jax.jit
        def pass_over(heads, f, y_n, a_K):
            """Sums of nll, gradient and Hessian of the log-linear pool over one chunk."""
            ell = logits(heads, f)
            picked = jnp.take_along_axis(ell, y_n[None, :, None], axis=-1)[..., 0]
            pooled = jnp.einsum("k,knv->nv", a_K, ell)
            p_nV = jax.nn.softmax(pooled)
            mean_Kn = jnp.einsum("nv,knv->kn", p_nV, ell)
            centred = ell - mean_Kn[..., None]
            hess = jnp.einsum("nv,jnv,knv->jk", p_nV, centred, centred)
            nll = jax.nn.logsumexp(pooled, axis=-1) - a_K @ picked
            return nll.sum(), (mean_Kn - picked).sum(1), hess

        def value_grad_hess(a):
            sums = None
            for f, y in chunks:
                part = [np.asarray(x, np.float64) for x in pass_over(heads, f, y, jnp.float32(a))]
                sums = part if sums is None else [s + x for s, x in zip(sums, part, strict=True)]
            return [s / len(targets_N) for s in sums]

        weights, value = _newton(value_grad_hess, np.full(len(configs), 1 / len(configs)))
        best = int(np.argmin(alone))
        if value > alone[best]:  # float32 round-off around a one-hot optimum
            weights, value = np.eye(len(configs))[best], float(alone[best])
    return weights, {
        "nll": float(value),
        "nll_parents": alone.tolist(),
        "tokens": int(len(targets_N)),
    }


def _features(cfg: ParentConfig, params: dict, tokens_NT) -> np.ndarray:
    """Head inputs of all positions, [N*T, D] float32 on the host: logits would not fit."""
    run = jax.jit(lambda p, t: models.features(cfg, p, t)[0])
    rows = max(1, ROWS // tokens_NT.shape[1])
    out = []
    with progress(len(tokens_NT), "fuse", "window", hide=tokens_NT.size < 10 * ROWS) as bar:
        for i in range(0, len(tokens_NT), rows):
            part = tokens_NT[i : i + rows]
            fill = np.pad(part, ((0, rows - len(part)), (0, 0)))  # one shape, one compilation
            out.append(np.asarray(run(params, jnp.asarray(fill)))[: len(part)])
            bar.update(len(part))
    return np.concatenate(out).reshape(-1, cfg.d_model)


def _newton(value_grad_hess, a: np.ndarray, tolerance: float = 1e-7):
    """Projected Newton for a smooth convex function over a >= 0 -> (a, value)."""
    value, grad, hess = value_grad_hess(a)
    for _ in range(30):
        ridge = 1e-9 * np.trace(hess) / len(a) + 1e-12
        root = np.linalg.cholesky(hess + ridge * np.eye(len(a))).T
        # argmin over b >= 0 of the quadratic model: || root b - (root a - root^-T grad) ||
        target, _ = nnls(root, root @ a - np.linalg.solve(root.T, grad))
        step, gain = 1.0, grad @ (target - a)
        while step > 1e-4:
            trial = a + step * (target - a)
            new = value_grad_hess(trial)
            if new[0] <= value + 1e-4 * step * gain:
                break
            step /= 2
        else:
            break
        done = value - new[0] < tolerance
        a, (value, grad, hess) = trial, new
        if done:
            break
    return a, float(value)


def _em(log_p_KN: np.ndarray, tolerance: float = 1e-9):
    """Mixture weights by EM (convex in the weights) -> (w, nll)."""
    w, last = np.full(len(log_p_KN), 1 / len(log_p_KN)), np.inf
    for _ in range(2000):
        joint = log_p_KN + np.log(np.maximum(w, 1e-300))[:, None]
        total = np.logaddexp.reduce(joint, axis=0)
        nll = float(-total.mean())
        if last - nll < tolerance:
            break
        w, last = np.exp(joint - total).mean(axis=1), nll
    return w, nll


sys.modules[__name__].__class__ = VerbModule
