"""Schedules, AdamW, and AdamH (Adam with Hyperball, arXiv 2606.16899) as the Delphi runs used it.

AdamH keeps the Frobenius norm of every linear map of every layer and turns it by the angle lr:
W' = W - lr u |W| / |u|,  W <- W' |W| / |W'|,  u = Adam's direction. All other parameters take Adam
with its own rate. A schedule is a function of the number k of updates made so far.
"""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from ..config import DelveError

DECAYED = ("kernel", "u", "v")
FACTORED = ("adam", "sphere", "scaled")
TINY = 1e-10  # floor of the norms that are divided by

# path (inside its stream) -> group; the first that fits. Zero-initialised pairs (gate, hub), tables
# and depthwise taps are no projections: nothing would be gained from fixing their norm
_GROUPS = (
    (re.compile(r"(pool|gate|hub|embed)/.*|(.*/)?conv/.*"), "adam"),
    (re.compile(r"(.*/)?kernel"), "adamh"),
    (re.compile(r"(.*/)?[uv]"), "factor"),
)


# ---- schedules -----------------------------------------------------------------------------------


def _warm(k, w: int):
    """min(1, k / w): the way up."""
    return jnp.minimum(k / w, 1.0) if w else jnp.ones_like(k)


def _trapezoid(peak: float, steps: int, w: int, d: int):
    """Up in `w` steps, down to 0 in the last `d` of `steps`."""

    def rate(k):
        k = jnp.asarray(k, float)
        # (N - k) / d, not 1 - (k - w - stable) / d: the same without cancellation
        down = (steps - k) / d if d else jnp.ones_like(k)
        return peak * jnp.maximum(jnp.minimum(_warm(k, w), down), 0.0)

    return rate


def wsd(peak: float, steps: int, warmup: float = 0.1, decay: float = 0.2):
    """Warm-up, stable, linear decay (MiniCPM, arXiv 2404.06395): fractions of `steps`, truncated.

    The first update has rate 0, the last peak / d where d steps decay; 0 from `steps` on.
    """
    w, d = int(warmup * steps), int(decay * steps)
    if w + d > steps:
        raise DelveError(f"warmup {warmup} and decay {decay}: together they must not exceed 1")
    return _trapezoid(peak, steps, w, d)


def linear(peak: float, steps: int, warmup: float = 0.1):
    """Warm-up from 0, then a straight line down to 0 at `steps`."""
    w = int(warmup * steps)
    return _trapezoid(peak, steps, w, steps - w)


def cosine(peak: float, steps: int, warmup: float = 0.1, final: float = 0.1):
    """Warm-up from 0, then half a cosine down to `final` x peak at `steps`, and so for ever."""
    w = int(warmup * steps)

    def rate(k):
        k = jnp.asarray(k, float)
        done = jnp.clip((k - w) / max(steps - w, 1), 0.0, 1.0)
        return peak * _warm(k, w) * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

    return rate


# ---- AdamW ---------------------------------------------------------------------------------------


def adamw(schedule, weight_decay=0.1, clip=1.0, b2=0.95, eps=1e-8) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; zero-padded factors get zero updates and stay zero.

    Decay acts on kernels and factors only: gains, biases, rates of recurrences, the pool are free.
    """

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    return optax.chain(
        clipped(clip),
        optax.adamw(schedule, b1=0.9, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays),
    )


def clipped(norm: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm with one product an element, not a division and a product: XLA
    writes what it divided to memory on a CPU (results/forms_cpu.json)."""

    def update(updates, state, params=None):
        del params
        whole = optax.tree.norm(updates)
        by = jnp.where(whole < norm, 1.0, norm / whole)
        return jax.tree.map(lambda u: u * by.astype(u.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scaled(rooms: dict[str, float], others: float = 1.0) -> optax.GradientTransformation:
    """Updates times a number by the first word of their path; 0 leaves a part where it is, weight
    decay included."""

    def update(updates, state, params=None):
        del params
        by = {room: rooms.get(room, others) for room in updates}
        return {
            room: jax.tree.map(lambda u, room=room: u * by[room], tree)
            for room, tree in updates.items()
        }, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# ---- AdamH ---------------------------------------------------------------------------------------


class AdamHState(NamedTuple):
    """Trees of the parameters' own nesting (some leaves only), so that path rules place them."""

    count: jax.Array  # updates made, int32
    mu: dict  # Adam's moments, at least float32
    nu: dict
    free: dict  # bool per layer of a constrained map: it was all zero, so it takes plain Adam
    radius_mu: dict  # Adam's moments of the log-norms that are learned (factored="scaled")
    radius_nu: dict


def _inside(path: str) -> str:
    """The path inside its stream, where a DELVE's tree is given."""
    return re.sub(r"^streams/[^/]+/", "", path)


def group_of(path: str) -> str:
    """The group of a parameter: adamh (linear maps), factor (their v and u) or adam (all else)."""
    return next((g for pattern, g in _GROUPS if pattern.fullmatch(_inside(path))), "adam")


def groups(params: dict) -> dict:
    """The group of every parameter, by its path alone; leaves may be ShapeDtypeStructs."""
    return unflatten_dict({p: group_of(p) for p in _flat(params)}, sep="/")


def layer_axes(path: str) -> int:
    """Leading axes that count layers: a norm is taken over all the others."""
    return int(_inside(path).startswith("layers/"))


def _flat(tree: dict) -> dict:
    return flatten_dict(tree, sep="/")


def _wide(x):
    """x in at least float32, for moments and norms."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(x, lead: int):
    """The sum over all but the `lead` leading axes, which broadcasts against x."""
    return jnp.sum(x, axis=tuple(range(lead, x.ndim)), keepdims=True)


def _norm(x, lead: int):
    return jnp.sqrt(_sum(x * x, lead))


def hyperball(w, u, lr, lead: int):
    """w turned by the angle lr against u, its norm over all but `lead` leading axes kept."""
    norm = _norm(w, lead)
    moved = w - lr * u * (norm / jnp.maximum(_norm(u, lead), TINY))
    return moved * (norm / jnp.maximum(_norm(moved, lead), TINY))


def adamh(
    schedule,
    adam_schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.9999,
    eps: float = 1.85e-8,
    clip: float = 0.1,
    factored: str = "adam",
) -> optax.GradientTransformation:
    """AdamH with rate `schedule` for linear maps and Adam with `adam_schedule` for the rest.

    factored: how v and u of a factored map are trained. "adam": with the rest; "sphere": each at
    its own norm; "scaled": so, but log |u| is learned by Adam with `adam_schedule` (its slope,
    <g, W>, is that of log |v| too: one of them is enough). Healing the rwkv and neox proxies at
    keep 0.5 for 82k tokens (experiments/factored_optim.py) left 4.254 and 4.409 nats a token with
    "adam", 4.268 and 4.424 with "sphere", 4.261 and 4.423 with "scaled" (AdamW: 4.256 and 4.411).
    The gradients of the constrained parameters and of the rest are each clipped to norm `clip`.
    Current norms are used: they drift by rounding, 1.3e-6 at most in 1,000 float32 steps. A map
    that is all zero in a layer when training starts takes plain Adam there. No weight decay.
    """
    if factored not in FACTORED:
        raise DelveError(f"factored {factored}: choose one of {', '.join(FACTORED)}")
    spheres = ("adamh",) if factored == "adam" else ("adamh", "factor")

    def on_sphere(path):
        return group_of(path) in spheres

    def has_radius(path):
        return factored == "scaled" and group_of(path) == "factor" and path.endswith("u")

    def adam(g, mu, nu, t):
        """-> (mu, nu, direction). Written so that b2 = 0.9999 costs float32 no digits."""
        mu, nu = mu + (1 - b1) * (g - mu), nu + (1 - b2) * (g * g - nu)
        unbias = [-jnp.expm1(t * math.log(b)).astype(g.dtype) for b in (b1, b2)]
        return mu, nu, mu / unbias[0] / (jnp.sqrt(nu / unbias[1]) + eps)

    def init(params):
        flat = {p: _wide(w) for p, w in _flat(params).items()}
        norms = {p: _norm(w, layer_axes(p)) for p, w in flat.items() if on_sphere(p)}
        norms = {p: n.reshape(n.shape[: layer_axes(p)]) for p, n in norms.items()}
        radii = {p: n for p, n in norms.items() if has_radius(p)}
        free = unflatten_dict({p: n == 0 for p, n in norms.items()}, sep="/")

        def zeros(of):  # a new buffer each time: the loop donates its state
            return unflatten_dict({p: jnp.zeros_like(x) for p, x in of.items()}, sep="/")

        return AdamHState(jnp.int32(0), zeros(flat), zeros(flat), free, zeros(radii), zeros(radii))

    def update(grads, state, params):
        w, g = ({p: _wide(x) for p, x in _flat(tree).items()} for tree in (params, grads))
        mu, nu, free, radius_mu, radius_nu = map(_flat, state[1:])
        t = jnp.asarray(state.count + 1, float)
        lr, adam_lr = schedule(state.count), adam_schedule(state.count)
        for mine in (True, False):
            part = {p: x for p, x in g.items() if on_sphere(p) == mine}
            if part:
                g |= clipped(clip).update(part, ())[0]
        out = {}
        for p, x in w.items():
            mu[p], nu[p], u = adam(g[p], mu[p], nu[p], t)
            plain = -jnp.asarray(adam_lr, x.dtype) * u
            if not on_sphere(p):
                out[p] = plain
                continue
            lead = layer_axes(p)
            new = hyperball(x, u, jnp.asarray(lr, x.dtype), lead)
            ones = (1,) * (x.ndim - lead)
            if has_radius(p):
                slope = _sum(g[p] * x, lead).reshape(x.shape[:lead])
                radius_mu[p], radius_nu[p], r = adam(slope, radius_mu[p], radius_nu[p], t)
                new = new * jnp.exp(-jnp.asarray(adam_lr, x.dtype) * r).reshape(r.shape + ones)
            out[p] = jnp.where(free[p].reshape(free[p].shape + ones), plain, new - x)
        count = optax.safe_increment(state.count)
        flat = (out, mu, nu, free, radius_mu, radius_nu)
        updates, *trees = (unflatten_dict(x, sep="/") for x in flat)
        return updates, AdamHState(count, *trees)

    return optax.GradientTransformation(init, update)
