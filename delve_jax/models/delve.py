"""DELVE: K parents side by side in one widened residual stream, joined by a hub, a gate, one head.

S superblocks; superblock s runs layers b_p(s) .. b_p(s+1)-1 of every parent p, and before each but
the first the low-rank hub is the only thing that crosses streams. Pooled head: J = 1 log-linear
(ordinary logits), J = K probability mixture, in between a mixture of J log-linear pools (log p
both). Hub (b = 0) and gate (w2 = 0) are exactly absent at step 0, so the model starts as the pool
of its parents. Where the streams share a vocabulary table (`codes`), its long factor stands once
beside them, and each keeps its short one. Any subset of the streams is a model itself: absent ones
say nothing to hub, gate and pool (`present_BTK`, or `subset`, which cuts them out). Routers at
the hub (`ffn_skip`) may spare a token a superblock's stateless sub-layers.
"""

import dataclasses
import operator

import jax
import jax.numpy as jnp
from jax import lax

from .. import models
from ..config import DelveConfig, DelveError
from .linear import at_least_f32, linear, product, rms_norm, wide

HUB_EPS = 1e-6
SOFT = 0.25  # width of the sigmoid that stands for a router's step in its gradient
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


def plain_pool(names, parents: list, n_superblocks: int = 1) -> DelveConfig:
    """Parents side by side without hub and gate: what dense parents are to their student."""
    streams = tuple(zip(names, parents, strict=True))
    return DelveConfig(streams, n_superblocks, connectors="none", gate_proj=0)


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


def rms(x: jax.Array) -> jax.Array:
    """x over its root mean square along the last axis: what hub and gate read of a stream."""
    return rms_norm(x, HUB_EPS)


def hub(cfg: DelveConfig, p: dict, h: dict, present_BTK=None) -> dict:
    """h_p += sigma_p ((g_p z_p) B_p), all streams at once (hybrid.md §5); z_p: `heard`."""
    return hub_added(cfg, p, h, heard(cfg, p, h, present_BTK))


def heard(cfg: DelveConfig, p: dict, h: dict, present_BTK=None) -> dict:
    """{name: z_BTr} that each stream hears at a sync point, by `connectors`:

    hub: sum_q rms(h_q) A_q; cross: without q = p; self: q = p alone, the control of equal size.
    """
    said = {n: rms(h[n]) @ p[n]["a"].astype(h[n].dtype) for n in cfg.names}
    if present_BTK is not None:
        said = {  # in their own dtype: a float32 mask would widen every stream from here on
            n: z * present_BTK[..., k, None].astype(z.dtype)
            for k, (n, z) in enumerate(said.items())
        }
    total_BTr = sum(said.values())
    of = {
        "hub": lambda n: total_BTr, "cross": lambda n: total_BTr - said[n], "self": said.get,
    }[cfg.connectors]  # fmt: skip
    return {n: of(n) for n in cfg.names}


def hub_added(cfg: DelveConfig, p: dict, h: dict, z: dict) -> dict:
    """The streams and what the hub adds to them for what they heard, z_BTr."""
    p = {n: jax.tree.map(lambda a, n=n: a.astype(h[n].dtype), p[n]) for n in cfg.names}
    return {
        n: h[n] + lax.stop_gradient(p[n]["sigma"]) * ((p[n]["g"] * z[n]) @ p[n]["b"])
        for n in cfg.names
    }


def routes(cfg: DelveConfig, name: str) -> bool:
    """Whether a stream has routers: it has stateless sub-layers that a token may do without."""
    return bool(cfg.ffn_skip and models.FAMILY[dict(cfg.streams)[name].family].MLP)


def router(cfg: DelveConfig, p: dict, z_BTr) -> tuple[jax.Array, jax.Array]:
    """A stream's weights of its FFNs in a superblock -> (weight_BT1, share of the tokens).

    m = 2 sigmoid(z v + c), 1 at step 0 (hybrid.md §10); 0 where m < `ffn_skip`. Both have the
    gradient of something smooth: of m itself, and of a sigmoid around the threshold.
    """
    m = 2 * jax.nn.sigmoid(wide(z_BTr) @ wide(p["skip_v"])[:, None] + wide(p["skip_c"]))
    hard = lambda x, smooth: smooth + lax.stop_gradient(x - smooth)  # noqa: E731
    on = m >= cfg.ffn_skip
    soft = jax.nn.sigmoid((m - cfg.ffn_skip) / SOFT)
    return hard(jnp.where(on, m, 0), m), hard(on.astype(m.dtype), soft).mean()


def features(
    cfg: DelveConfig, params: dict, tokens_BT, state=None, mask_BT=None, segments_BT=None,
    how: models.Compute = models.F32, present_BTK=None,
):  # fmt: skip
    """Run all streams -> ({name: f_BTD after the stream's final norm}, state).

    present_BTK: 1 where a sequence has the stream, 0 where not, T may be 1 (None: all).
    """
    f, state, _ = traced(
        cfg, params, tokens_BT, state, mask_BT, segments_BT, how, present_BTK, False
    )
    return f, state


def traced(
    cfg: DelveConfig, params: dict, tokens_BT, state=None, mask_BT=None, segments_BT=None,
    how: models.Compute = models.F32, present_BTK=None, trace: bool = True,
):  # fmt: skip
    """`features` and what was on the way -> (f, state, {"h": {name: h_SBTD}, "ffn": {name: [S]}}).

    Every stream's layers, and the hub's S - 1 sync points, are stacks or (`lm.layers_apart`)
    tuples. h_SBTD: the stream at the end of each of the S superblocks, as the hub then reads it
    ("h" is None unless `trace`). ffn: share of the tokens whose FFNs run, of streams with routers.
    """
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

    def superblock(carry, slot):
        """One superblock; slot = (hub parameters or None, every stream's layers, first of them)."""
        (h, caches), (hub_p, layers_s, first) = carry, slot
        known, share = dict(ctx), {n: jnp.ones(()) for n in cfg.names if routes(cfg, n)}
        if hub_p is not None:
            z = heard(cfg, hub_p, h, present_BTK)
            h = hub_added(cfg, hub_p, h, z)
            for n in share:
                weight_BT1, share[n] = router(cfg, hub_p[n], z[n])
                known[n] = {**ctx[n], "ffn_BT1": weight_BT1}
        out = {
            n: models.run_layers(sub, layers_s[n], h[n], caches[n], known[n], how, first[n])
            for n, sub in cfg.streams
        }
        h, caches = ({n: pair[i] for n, pair in out.items()} for i in (0, 1))
        return (h, caches), {"h": h if trace else None, "ffn": share}

    hubs = params.get("hub")
    tuples = isinstance(layers[cfg.names[0]], tuple)
    if S > 1 and not tuples and all(sub.n_layers % S == 0 for _, sub in cfg.streams):
        # one layer a superblock: XLA would copy a whole stack to give it an axis of length 1
        lone = {n for n, sub in cfg.streams if sub.n_layers == S}
        split = lambda a: a if len(a) == S else a.reshape(S, len(a) // S, *a.shape[1:])  # noqa: E731

        def scanned(carry, slot):
            hub_p, layers_s, first = slot
            layers_s = {n: (p,) if n in lone else p for n, p in layers_s.items()}
            return superblock(carry, (hub_p, layers_s, first))

        # a zero hub before superblock 0 adds exactly nothing and keeps one body for the scan
        hubs = jax.tree.map(lambda a: jnp.concatenate([jnp.zeros_like(a[:1]), a]), hubs)
        every = jnp.arange(S, dtype=jnp.int32)
        first = {n: every * (sub.n_layers // S) for n, sub in cfg.streams}
        slots = (hubs, jax.tree.map(split, layers), first)
        (h, caches), way = lax.scan(scanned, (h, caches), slots)
    else:
        parts = []
        if hubs and not tuples:
            hubs = [jax.tree.map(operator.itemgetter(s), hubs) for s in range(S - 1)]
        for s in range(S):
            hub_p = hubs[s - 1] if s and hubs else None
            layers_s = {n: _rows(layers[n], *bounds[n][s : s + 2]) for n in cfg.names}
            first = {n: bounds[n][s] for n in cfg.names}
            (h, caches), part = superblock((h, caches), (hub_p, layers_s, first))
            parts.append(part)
        way = jax.tree.map(lambda *a: jnp.stack(a), *parts)

    f = {n: models.final_features(sub, streams[n], h[n]) for n, sub in cfg.streams}
    if state is None:
        return f, None, way
    return f, {n: {"layers": caches[n], **book[n]} for n in cfg.names}, way


def _rows(tree, start: int, stop: int):
    """Layers start..stop-1 of a stacked tree, or of a tuple of them."""
    if isinstance(tree, tuple):
        return tree[start:stop]
    return jax.tree.map(lambda a: a[start:stop], tree)


def gate(cfg: DelveConfig, p: dict, f: dict, present_BTK=None) -> jax.Array:
    """delta_BTG of the token gate; zero while w2 is zero (hybrid.md §9). G: `gate_outputs`."""
    parts = [rms(wide(f[n])) @ wide(p["p"][n]) for n in cfg.names]
    if present_BTK is not None:
        parts = [x * present_BTK[..., k, None] for k, x in enumerate(parts)]
    return jax.nn.silu(jnp.concatenate(parts, axis=-1) @ wide(p["w1"])) @ wide(p["w2"])


def gate_outputs(cfg: DelveConfig) -> int:
    """Numbers the gate gives a token: one a stream, and one a latent where both have weights."""
    K, J = len(cfg.streams), cfg.latents
    return K + J if 1 < J < K else K


def pool_weights(cfg: DelveConfig, pool: dict, delta, present_BTK=None):
    """(a [.., J, K] of the log-linear pools or None, log pi [.., J] of their mixture or None).

    The gate moves a by at most e^2. Of a subset of the streams a keeps its static sum, which is
    the inverse of a temperature; J = K: a is the identity (None), pi is over the streams.
    """
    K = len(cfg.streams)
    if cfg.latents == K and K > 1:
        log_w = pool["log_pi"] + delta
        if present_BTK is not None:
            log_w = jnp.where(present_BTK > 0, log_w, -jnp.inf)
        return None, jax.nn.log_softmax(log_w)
    a_JK = pool["a"][None] if cfg.latents == 1 else pool["a"]
    if present_BTK is not None:
        kept = a_JK * present_BTK[..., None, :]
        # streams of static weight 0 alone: they share it evenly
        even = present_BTK[..., None, :] / jnp.maximum(present_BTK.sum(-1)[..., None, None], 1)
        left = kept.sum(-1, keepdims=True)
        total = a_JK.sum(-1, keepdims=True)
        a_JK = jnp.where(left > 0, kept * total / jnp.where(left > 0, left, 1), even * total)
    a = a_JK * jnp.exp(2 * jnp.tanh(delta[..., None, :K] / 2))
    return a, None if cfg.latents == 1 else jax.nn.log_softmax(pool["log_pi"] + delta[..., K:])


def stream_logits(cfg: DelveConfig, params: dict, f: dict) -> list[jax.Array]:
    """Each stream's own logits, in the order of the streams."""
    streams = whole(cfg, params)
    return [models.head_logits(sub, streams[n], f[n]) for n, sub in cfg.streams]


def head(cfg: DelveConfig, params: dict, f: dict, present_BTK=None) -> jax.Array:
    """Features of all streams -> pooled logits [.., V], log p where J > 1; see `models.head`."""
    dtype = at_least_f32(f[cfg.names[0]].dtype)
    delta = jnp.zeros(gate_outputs(cfg), dtype)
    if cfg.gate_proj:
        delta = gate(cfg, params["gate"], f, present_BTK)
    a, log_pi = pool_weights(cfg, params["pool"], delta, present_BTK)
    latents = range(cfg.latents)
    if a is None:
        parts = stream_logits(cfg, params, f)
    elif "head" in cfg.codes:  # pooled as codes: one product with the long side a latent
        codes = [
            wide(linear({"kernel": params["streams"][n]["head"]["v"]}, f[n])) for n in cfg.names
        ]
        narrow, u_rV = f[cfg.names[0]].dtype, params["codes"]["head"]["u"]
        pooled = (sum(a[..., j, k, None] * z for k, z in enumerate(codes)) for j in latents)
        parts = [product(z.astype(narrow), u_rV, dtype) for z in pooled]
    else:
        own = stream_logits(cfg, params, f)
        parts = [sum(a[..., j, k, None] * ell for k, ell in enumerate(own)) for j in latents]
    if log_pi is None:
        return parts[0]
    terms = [log_pi[..., j, None] + jax.nn.log_softmax(ell) for j, ell in enumerate(parts)]
    return jax.nn.logsumexp(jnp.stack(terms), axis=0)


def subset(cfg: DelveConfig, params: dict, names: tuple[str, ...]) -> tuple[DelveConfig, dict]:
    """The DELVE of some of the streams, in the order of the whole one: a model of its own.

    Their pool keeps the whole one's temperature. DelveError: an unknown name, or none.
    """
    if unknown := [n for n in names if n not in cfg.names]:
        raise DelveError(f"--streams {unknown[0]}: the streams are {', '.join(cfg.names)}")
    if not names:
        raise DelveError(f"--streams: name at least one of {', '.join(cfg.names)}")
    kept = [k for k, n in enumerate(cfg.names) if n in names]
    some = {cfg.names[k] for k in kept}
    K, J = len(cfg.streams), cfg.latents
    if 1 < J < K and len(kept) <= J:
        raise DelveError(f"--streams: a head of {J} latents needs more than {J} streams")
    new = dataclasses.replace(
        cfg, streams=tuple(cfg.streams[k] for k in kept), latents=len(kept) if J == K else J,
        teachers=tuple(cfg.teachers[k] for k in kept) if len(cfg.teachers) == K else (),
    )  # fmt: skip
    at = jnp.array(kept)
    out = {k: v for k, v in params.items() if k == "codes"}
    for room in ("streams", "hub"):
        if room in params:
            out[room] = {n: p for n, p in params[room].items() if n in some}
    a_JK, log_pi = pool_weights(
        cfg, params["pool"], jnp.zeros(gate_outputs(cfg)), jnp.zeros(K).at[at].set(1.0)
    )
    if a_JK is None:  # one stream of a mixture is its own p
        out["pool"] = {"a": jnp.ones(1)} if len(kept) == 1 else {"log_pi": log_pi[at]}
    elif J == 1:
        out["pool"] = {"a": a_JK[0, at]}
    else:
        out["pool"] = {"a": a_JK[:, at], "log_pi": params["pool"]["log_pi"]}
    if "gate" in params:
        p, rows = params["gate"], cfg.gate_proj
        w1 = jnp.concatenate([p["w1"][k * rows : (k + 1) * rows] for k in kept])
        w2 = p["w2"][:, jnp.array([*kept, *range(K, gate_outputs(cfg))])]
        if a_JK is None and len(kept) == 1:
            w2 = jnp.zeros_like(w2)
        out["gate"] = {"p": {n: p["p"][n] for n in new.names}, "w1": w1, "w2": w2}
    return new, out


def init_joints(cfg: DelveConfig, key: jax.Array) -> dict:
    """Pool, hub and gate at step 0: equal weights, hub and gate present and exactly without effect.

    Only one factor of each pair is zero (hub b, gate w2), so both get gradients once one moves.
    """
    k, J = len(cfg.streams), cfg.latents
    pool = {} if J == 1 else {"log_pi": jnp.zeros((J,))}
    if J < k or k == 1:
        pool["a"] = jnp.full((J, k) if J > 1 else (k,), 1 / k)
    keys = iter(jax.random.split(key, 2 * k + 1))
    normal = lambda shape, fan: jax.random.normal(next(keys), shape) / fan**0.5  # noqa: E731
    out = {"pool": pool}
    if cfg.gate_proj:
        out["gate"] = {
            "p": {n: normal((s.d_model, cfg.gate_proj), s.d_model) for n, s in cfg.streams},
            "w1": normal((k * cfg.gate_proj, cfg.gate_hidden), k * cfg.gate_proj),
            "w2": jnp.zeros((cfg.gate_hidden, gate_outputs(cfg))),
        }
    S, r = cfg.n_superblocks, cfg.hub_rank
    if S > 1 and cfg.connectors != "none":
        out["hub"] = {
            n: {
                "a": normal((S - 1, sub.d_model, r), sub.d_model),
                "b": jnp.zeros((S - 1, r, sub.d_model)),
                "g": jnp.ones((S - 1, r)),
                "sigma": jnp.ones((S - 1,)),
            }
            for n, sub in cfg.streams
        }
        for n in filter(lambda n: routes(cfg, n), cfg.names):
            out["hub"][n] |= {"skip_v": jnp.zeros((S - 1, r)), "skip_c": jnp.zeros((S - 1,))}
    return out


def init_params(cfg: DelveConfig, key: jax.Array) -> dict:
    """Random parents and neutral joints."""
    k_joint, *keys = jax.random.split(key, len(cfg.streams) + 1)
    streams = {n: models.init_params(sub, k) for (n, sub), k in zip(cfg.streams, keys, strict=True)}
    return {**apart(cfg, streams), **init_joints(cfg, k_joint)}
