"""DELVE: K parents side by side in one widened residual stream, joined by a hub, a gate, one head.

S superblocks; superblock s runs layers b_p(s) .. b_p(s+1)-1 of every parent p, and before each but
the first the low-rank hub is the only thing that crosses streams. Pooled head: J = 1 log-linear
(ordinary logits), J = K probability mixture (log p). Hub (b = 0) and gate (w2 = 0) are exactly
absent at step 0, so the model starts as the pool of its parents. Where the streams share a
vocabulary table (`codes`), its long factor stands once beside them, and each keeps its short one.
"""

import operator

import jax
import jax.numpy as jnp
from jax import lax

from .. import models
from ..config import DelveConfig
from .linear import at_least_f32, linear, rms_norm, wide

HUB_EPS = 1e-6
LONG = {"embed": "v", "head": "u"}  # the factor of a table that is as long as the vocabulary


def boundaries(n_layers: int, n_superblocks: int) -> list[int]:
    """First layer of each superblock and the end: evenly spaced in integers (Bresenham)."""
    S = n_superblocks
    return [(2 * s * n_layers + S) // (2 * S) for s in range(S + 1)]


def choose_superblocks(depths: list[int]) -> int:
    """8 where it divides every depth (all real tiers), else the depths' common divisor, at most 8.

    Depths with no common divisor take the smallest depth, at most 8, with uneven superblocks.
    """
    for S in range(min(8, *depths), 1, -1):
        if all(depth % S == 0 for depth in depths):
            return S
    return min(8, *depths)


def whole(cfg: DelveConfig, params: dict) -> dict:
    """The streams with the tables that they share back where each would have its own."""
    if not cfg.codes:
        return params["streams"]
    shared = params["codes"]  # of what `models.head_params` gives, the head alone
    return {
        name: {**p, **{table: {**p[table], **code} for table, code in shared.items()}}
        for name, p in params["streams"].items()
    }


def apart(cfg: DelveConfig, streams: dict) -> dict:
    """The way back: {"streams", "codes"} of whole streams, the first one's long factors for all."""
    if not cfg.codes:
        return {"streams": streams}
    first = streams[cfg.names[0]]
    codes = {table: {LONG[table]: first[table][LONG[table]]} for table in cfg.codes}
    short = lambda p, table: {k: a for k, a in p[table].items() if k != LONG[table]}  # noqa: E731
    own = {n: {**p, **{table: short(p, table) for table in cfg.codes}} for n, p in streams.items()}
    return {"streams": own, "codes": codes}


def hub(cfg: DelveConfig, p: dict, h: dict) -> dict:
    """z = sum_q rms(h_q) A_q;  h_p += sigma_p ((g_p z) B_p), all streams at once (hybrid.md §5)."""
    p = {n: jax.tree.map(lambda a, n=n: a.astype(h[n].dtype), p[n]) for n in cfg.names}
    z_BTr = sum(rms_norm(h[n], HUB_EPS) @ p[n]["a"] for n in cfg.names)
    return {
        n: h[n] + lax.stop_gradient(p[n]["sigma"]) * ((p[n]["g"] * z_BTr) @ p[n]["b"])
        for n in cfg.names
    }


def features(
    cfg: DelveConfig, params: dict, tokens_BT, state=None, mask_BT=None, segments_BT=None,
    how: models.Compute = models.F32,
):  # fmt: skip
    """Run all streams -> ({name: f_BTD after the stream's final norm}, state)."""
    S, streams = cfg.n_superblocks, whole(cfg, params)
    h, ctx, book, layers, caches, bounds = {}, {}, {}, {}, {}, {}
    for n, sub in cfg.streams:
        old = None if state is None else state[n]
        h[n] = models.embed_tokens(sub, streams[n], tokens_BT, how)
        family = models.FAMILY[sub.family]
        ctx[n], book[n] = family.context(sub, h[n], mask_BT, old, segments_BT)
        layers[n] = streams[n]["layers"]
        caches[n] = None if state is None else old["layers"]
        bounds[n] = boundaries(sub.n_layers, S)

    def superblock(h, slot):
        """One superblock; slot = (hub parameters or None, layers and states of every stream)."""
        hub_p, layers_s, caches_s = slot
        if hub_p is not None:
            h = hub(cfg, hub_p, h)
        out = {
            n: models.run_layers(sub, layers_s[n], h[n], caches_s[n], ctx[n], how)
            for n, sub in cfg.streams
        }
        return {n: x for n, (x, _) in out.items()}, {n: c for n, (_, c) in out.items()}

    if S > 1 and all(sub.n_layers % S == 0 for _, sub in cfg.streams):
        split = lambda a: a.reshape(S, a.shape[0] // S, *a.shape[1:])  # noqa: E731
        # a zero hub before superblock 0 adds exactly nothing and keeps one body for the scan
        hubs = jax.tree.map(lambda a: jnp.concatenate([jnp.zeros_like(a[:1]), a]), params["hub"])
        slots = (hubs, jax.tree.map(split, layers), jax.tree.map(split, caches))
        h, caches = lax.scan(superblock, h, slots)
        caches = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), caches)
    else:
        parts = []
        for s in range(S):
            hub_p = jax.tree.map(operator.itemgetter(s - 1), params["hub"]) if s else None
            layers_s, caches_s = (
                {n: _rows(tree[n], *bounds[n][s : s + 2]) for n in cfg.names}
                for tree in (layers, caches)
            )
            h, part = superblock(h, (hub_p, layers_s, caches_s))
            parts.append(part)
        caches = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    f = {n: models.final_features(sub, streams[n], h[n]) for n, sub in cfg.streams}
    if state is None:
        return f, None
    return f, {n: {"layers": caches[n], **book[n]} for n in cfg.names}


def _rows(tree, start: int, stop: int):
    """Layers start..stop-1 of a stacked tree."""
    return jax.tree.map(lambda a: a[start:stop], tree)


def gate(cfg: DelveConfig, p: dict, f: dict) -> jax.Array:
    """delta_BTK of the token gate; zero while w2 is zero (hybrid.md §9)."""
    parts = [rms_norm(wide(f[n]), HUB_EPS) @ wide(p["p"][n]) for n in cfg.names]
    return jax.nn.silu(jnp.concatenate(parts, axis=-1) @ wide(p["w1"])) @ wide(p["w2"])


def loglinear_weights(pool: dict, delta_BTK) -> jax.Array:
    """Weights of the log-linear pool under the gate: at most e^2 times the static ones."""
    return pool["a"] * jnp.exp(2 * jnp.tanh(delta_BTK / 2))


def pool_logits(cfg: DelveConfig, pool: dict, delta_BTK, logits: list[jax.Array]) -> jax.Array:
    """Per-stream logits [.., V] -> pooled logits (J = 1) or log-probabilities (J = K)."""
    if cfg.latents == 1:
        a_BTK = loglinear_weights(pool, delta_BTK)
        return sum(a_BTK[..., k, None] * ell for k, ell in enumerate(logits))
    log_w = jax.nn.log_softmax(pool["log_pi"] + delta_BTK)
    terms = [log_w[..., k, None] + jax.nn.log_softmax(ell) for k, ell in enumerate(logits)]
    return jax.nn.logsumexp(jnp.stack(terms), axis=0)


def stream_logits(cfg: DelveConfig, params: dict, f: dict) -> list[jax.Array]:
    """Each stream's own logits, in the order of the streams."""
    streams = whole(cfg, params)
    return [models.head_logits(sub, streams[n], f[n]) for n, sub in cfg.streams]


def head(cfg: DelveConfig, params: dict, f: dict) -> jax.Array:
    """Features of all streams -> pooled logits; see `models.head`."""
    delta_BTK = jnp.zeros(len(f), at_least_f32(f[cfg.names[0]].dtype))
    if cfg.gate_proj:
        delta_BTK = gate(cfg, params["gate"], f)
    if cfg.latents == 1 and "head" in cfg.codes:  # pooled as codes: one product with the long side
        a_BTK = loglinear_weights(params["pool"], delta_BTK)
        z_BTr = sum(
            a_BTK[..., k, None] * wide(linear({"kernel": params["streams"][n]["head"]["v"]}, f[n]))
            for k, n in enumerate(cfg.names)
        )
        u_rV = params["codes"]["head"]["u"]
        dtype = f[cfg.names[0]].dtype
        return jnp.matmul(
            z_BTr.astype(dtype), u_rV.astype(dtype), preferred_element_type=z_BTr.dtype
        )
    return pool_logits(cfg, params["pool"], delta_BTK, stream_logits(cfg, params, f))


def init_joints(cfg: DelveConfig, key: jax.Array) -> dict:
    """Pool, hub and gate at step 0: equal weights, hub and gate present and exactly without effect.

    Only one factor of each pair is zero (hub b, gate w2), so both get gradients once one moves.
    """
    k = len(cfg.streams)
    pool = {"a": jnp.full((k,), 1 / k)} if cfg.latents == 1 else {"log_pi": jnp.zeros((k,))}
    keys = iter(jax.random.split(key, 2 * k + 1))
    normal = lambda shape, fan: jax.random.normal(next(keys), shape) / fan**0.5  # noqa: E731
    out = {"pool": pool}
    if cfg.gate_proj:
        out["gate"] = {
            "p": {n: normal((s.d_model, cfg.gate_proj), s.d_model) for n, s in cfg.streams},
            "w1": normal((k * cfg.gate_proj, cfg.gate_hidden), k * cfg.gate_proj),
            "w2": jnp.zeros((cfg.gate_hidden, k)),
        }
    S, r = cfg.n_superblocks, cfg.hub_rank
    if S > 1:
        out["hub"] = {
            n: {
                "a": normal((S - 1, sub.d_model, r), sub.d_model),
                "b": jnp.zeros((S - 1, r, sub.d_model)),
                "g": jnp.ones((S - 1, r)),
                "sigma": jnp.ones((S - 1,)),
            }
            for n, sub in cfg.streams
        }
    return out


def init_params(cfg: DelveConfig, key: jax.Array) -> dict:
    """Random parents and neutral joints."""
    k_joint, *keys = jax.random.split(key, len(cfg.streams) + 1)
    streams = {n: models.init_params(sub, k) for (n, sub), k in zip(cfg.streams, keys, strict=True)}
    return {**apart(cfg, streams), **init_joints(cfg, k_joint)}
