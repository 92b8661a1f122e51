"""Objectives, in nats a token: cross-entropy, KL to dense parents (pooled, and each to its stream),
hidden match; streams and ranks left out at random, so that parts of a model are models; tokens
that do without an FFN (`delve.router`).

tokens_BT holds T+1 ids: positions 0..T-1 are read, 1..T are predicted. The head runs chunk by chunk
of T, and its gradient is taken in the forward pass (chunk by chunk too), so that [B, T, V] is never
held and no logit is computed twice. With `eot` documents in a row do not see each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import models
from ..config import DelveError
from ..models import Compute, delve, elastic

LOGITS_BYTES = {"cpu": 2**24}  # of one chunk's float32 logits on a device; cache-sized on a CPU
LOGITS_BYTES_ELSEWHERE = 2**28
ALONE = 8  # times as many on an accelerator where one model's logits are all that a loss holds
JOINTS = ("hub", "gate", "pool")  # what fusion adds to its parents
FFN_WEIGHT = 10.0  # of the squared distance to `ffn_share`
CUT_WEIGHTS = np.array([1.0, 2.0]) / 3  # under rank-drop: of the whole model, of the smaller one
REMAT_ABOVE = 100_000_000  # parameters; below, recomputing layers costs more than it saves


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, nats [B, T]."""
    if jax.default_backend() == "cpu":
        picked = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    else:  # a sum that is part of the loops over V, forward and backward: no scatter, no pass more
        here_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
        picked = jnp.where(here_BTV, logits_BTV, 0).sum(-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked


def kl(teacher_BTV: jax.Array, student_BTV: jax.Array) -> jax.Array:
    """KL(teacher || student) at each position [B, T] of two sets of logits (or log-probs)."""
    log_t, log_s = jax.nn.log_softmax(teacher_BTV), jax.nn.log_softmax(student_BTV)
    return (jnp.exp(log_t) * (log_t - log_s)).sum(-1)


def sampled_kl(logits_BTV: jax.Array, ids_BTS, counts_BTS, entropy_BT) -> jax.Array:
    """Estimate of KL(T || p) at each position [B, T] from samples of T (`cache`), unbiased.

    ids_BTS, counts_BTS: distinct ids and how often each was drawn; entropy_BT: - mean log T of the
    same draws.
    """
    chosen = jnp.take_along_axis(logits_BTV, ids_BTS.astype(jnp.int32), axis=-1)
    nll = jax.nn.logsumexp(logits_BTV, axis=-1)[..., None] - chosen
    counts_BTS = counts_BTS.astype(nll.dtype)
    mean_BT = (counts_BTS * nll).sum(-1) / jnp.maximum(counts_BTS.sum(-1), 1)
    return mean_BT - entropy_BT.astype(nll.dtype)


def default_remat(cfg) -> str:
    """Layers are recomputed where the model is large enough for it to pay; on a CPU all but the
    products is for any: a step takes 0.84 to 0.98 of the time, Mamba's 1.02 and 1.08 (results/
    training_cpu.json; healing the quickstart's DELVE 0.92, results/forms_cpu.json), in less than
    half of the memory."""
    if models.count(cfg) > REMAT_ABOVE:
        return "layer"
    return "dots" if jax.default_backend() == "cpu" else "none"


def tokens_of(batch) -> jax.Array:
    """The ids of a batch: it is them, or a dict of them and of teachers' samples (`cache`)."""
    return batch["tokens"] if isinstance(batch, dict) else batch


def segments(tokens_BT: jax.Array, eot: int | None) -> jax.Array | None:
    """Document number of each token: `eot` opens the document that follows it."""
    return None if eot is None else jnp.cumsum(tokens_BT == eot, axis=1, dtype=jnp.int32)


def chunk_length(rows: int, T: int, vocab: int, alone: bool = False) -> int:
    """Positions per chunk, so that a chunk's float32 logits stay small; at least two chunks.

    alone: the loss holds one model's, not those of streams and teachers as well.
    """
    most = LOGITS_BYTES.get(jax.default_backend(), LOGITS_BYTES_ELSEWHERE * (ALONE if alone else 1))
    n = max(min(2, T), -(-4 * rows * T * vocab // most))
    return -(-T // min(n, T))


def over_chunks(fn: Callable, head: dict, features, frozen, xs_BT, chunk: int):
    """Mean over [B, T] of `fn` -> (loss, {name: mean}); differentiable in head and features.

    fn(head, f_chunk, frozen, x_chunk) -> (loss [B, c], {name: [B, c]}); `features` and `xs_BT` are
    trees with leading axes B, T and are cut along T; `frozen` is passed whole.
    """
    B, T = jax.tree.leaves(features)[0].shape[:2]
    n = -(-T // chunk)

    def cut(a):  # [B, T, ..] -> [n, B, c, ..], zeros at the end
        a = jnp.pad(a, ((0, 0), (0, n * chunk - T)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, n, chunk, *a.shape[2:]), 1, 0)

    def joined(a, like):
        return jnp.moveaxis(a, 0, 1).reshape(B, n * chunk, *like.shape[2:])[:, :T]

    # numpy: a scan may trace `forward` again when the trace that this runs in is over
    real_nc = (np.arange(n * chunk) < T).reshape(n, 1, chunk)

    def sums(head, f, frozen, x, real):
        loss, metrics = fn(head, f, frozen, x)
        return (loss * real).sum(), {k: (v * real).sum() for k, v in metrics.items()}

    def forward(head, features, frozen, xs):
        def body(_, slot):
            f, x, real = slot
            return None, sums(head, f, frozen, x, real)

        _, out = lax.scan(body, None, (jax.tree.map(cut, features), jax.tree.map(cut, xs), real_nc))
        return jax.tree.map(lambda a: a.sum(0) / (B * T), out)

    def forward_and_gradient(head, features, frozen, xs):
        def body(g_head, slot):
            f, x, real = slot
            grad = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)
            out, (g, g_f) = grad(head, f, frozen, x, real)
            return jax.tree.map(jnp.add, g_head, g), (out, g_f)

        slots = (jax.tree.map(cut, features), jax.tree.map(cut, xs), real_nc)
        g_head, (out, g_f) = lax.scan(body, jax.tree.map(jnp.zeros_like, head), slots)
        out = jax.tree.map(lambda a: a.sum(0) / (B * T), out)
        return out, (g_head, jax.tree.map(joined, g_f, features))

    def backward(saved, cotangent):
        scale = cotangent[0] / (B * T)  # metrics carry no gradient
        g_head, g_f = jax.tree.map(lambda g: g * scale.astype(g.dtype), saved)
        return g_head, g_f, None, None

    run = jax.custom_vjp(forward)
    run.defvjp(forward_and_gradient, backward)
    return run(head, features, frozen, xs_BT)


# ---- what is trained for -------------------------------------------------------------------------

Weight = float | tuple[float, float]  # of a whole run, or at its first and its last step


@dataclass(frozen=True)
class Terms:
    """ce CE + kl KL(T || model) + streams mean_k KL(T_k || stream k) + hidden (hybrid.md §12).

    T: the log-linear pool of the dense parents; T_k: the parent of stream k alone; hidden: mean
    square of rms(h) - rms(h of the dense parent) at the sync points (ends of superblocks but the
    last). The last two are for a DELVE whose teachers are its streams' own parents.
    """

    ce: Weight = 0.5
    kl: Weight = 0.5
    streams: Weight = 0.0
    hidden: Weight = 0.0
    stream_drop: float = 0.0  # chance that a sequence does without a stream (one always stays)
    rank_drop: float = 1.0  # share of a smaller model inside, trained in every step as well
    ffn_share: float = 1.0  # of the tokens that run their FFNs, behind the first hub (1: free)

    def at(self, name: str, step, steps: int):
        """Weight of a term at a step, linear between its two ends."""
        first, last = ends(getattr(self, name))
        if first == last:
            return first
        return first + (last - first) * jnp.minimum(step / max(steps - 1, 1), 1.0)

    def has(self, name: str) -> bool:
        return any(ends(getattr(self, name)))

    @property
    def name(self) -> str:
        """The terms that count, as "ce+kl"."""
        return "+".join(filter(self.has, ("ce", "kl", "streams", "hidden")))

    def checked(self) -> Terms:
        """Itself; DelveError names the flag that is out of its range."""
        for name in ("ce", "kl", "streams", "hidden"):
            weight = ends(getattr(self, name))
            if len(weight) != 2 or not all(0 <= w < math.inf for w in weight):
                raise DelveError(
                    f"objective, {name}: {weight} must be one or two numbers, not negative"
                )
        if not any(self.has(name) for name in ("ce", "kl", "streams", "hidden")):
            raise DelveError("objective: all its weights are 0")
        if not 0 <= self.stream_drop < 1:
            raise DelveError(f"--stream-drop {self.stream_drop}: must lie in [0, 1)")
        if not 0 < self.rank_drop <= 1:
            raise DelveError(f"--rank-drop {self.rank_drop}: must lie in (0, 1]")
        if not 0 < self.ffn_share <= 1:
            raise DelveError(f"--ffn-share {self.ffn_share}: must lie in (0, 1]")
        return self


def ends(weight: Weight) -> tuple[float, float]:
    """(first, last) of a weight."""
    return tuple(weight) if isinstance(weight, (tuple, list)) else (weight, weight)


PLAIN = Terms(ce=1.0, kl=0.0)


def language_model(
    cfg, how: Compute | None = None, eot: int | None = None, z_loss: float = 0.0, rows: int = 0
):
    """Loss of plain training: (params, frozen, batch, step) -> (loss, metrics with "nll").

    rows: rows of a batch on one device (0: all), which decides the chunk; z_loss: weight of
    logsumexp^2 (PaLM, arXiv 2204.02311).
    """
    return healing(cfg, (), PLAIN, how=how, eot=eot, z_loss=z_loss, rows=rows)


def _own_parents(cfg, teachers: tuple) -> bool:
    """Whether teacher k can teach stream k alone: as many, of the same families and sizes."""
    shape = lambda c: (c.family, c.d_model, c.n_layers)  # noqa: E731
    return cfg.family == "delve" and [shape(c) for _, c in cfg.streams] == [*map(shape, teachers)]


def draws(tokens_BT: jax.Array, step, seed: int) -> jax.Array:
    """A random key a row: a function of step, seed and the row's ids, not of how rows are spread
    over devices and microbatches."""
    weigh_T = jax.random.bits(jax.random.key(seed), tokens_BT.shape[1:], jnp.uint32) | 1
    rows_B = (tokens_BT.astype(jnp.uint32) * weigh_T).sum(1)
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def drop_streams(keys_B: jax.Array, K: int, chance: float) -> jax.Array:
    """present_B1K of 0 and 1: each stream is absent with this chance; where all were, all stay."""
    here_BK = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - chance, (K,)))(keys_B)
    return jnp.where(here_BK.any(1, keepdims=True), here_BK, True)[:, None].astype(jnp.float32)


def healing(
    cfg,
    teachers: tuple = (),
    terms: Terms = Terms(),  # noqa: B008  (frozen)
    *,
    steps: int = 1,
    seed: int = 0,
    trains: str = "all",
    cached: bool = False,
    how: Compute | None = None,
    eot: int | None = None,
    z_loss: float = 0.0,
    rows: int = 0,
):
    """Loss of healing by `Terms`: (params, frozen, batch, step) -> (loss, {term: mean}).

    frozen = {"weights": [K] of the teachers' log-linear pool, "teachers": tuple of parameter
    trees}, so that they are arguments of the compiled step (sharded like the rest) and not
    constants inside it; () without teachers, which only CE does without. steps: of the run, for
    weights that change; trains: "all", or only the "experts" or the "joints" (hub, gate, pool) get
    gradients; cached: batches bring samples of the teachers' pool (`cache`), frozen is ().
    DelveError: terms that these teachers cannot give.
    """
    how = how or Compute(remat=default_remat(cfg))
    reading = Compute(dtype=how.dtype, residual=how.residual)  # teachers: nothing to recompute
    if not (teachers or cached):  # what is left out at random stays
        terms = dataclasses.replace(terms, ce=1.0, kl=0.0, streams=0.0, hidden=0.0)
    terms.checked()
    hybrid = cfg.family == "delve"
    if terms.rank_drop < 1 and not any(
        sub.ranks or sub.nested for sub in (dict(cfg.streams).values() if hybrid else [cfg])
    ):
        raise DelveError("--rank-drop: needs factored maps, and this model has none")
    routed = hybrid and any(delve.routes(cfg, n) for n in cfg.names)
    if terms.ffn_share < 1 and not routed:
        raise DelveError("--ffn-share: this model has no routers; make them by `fuse --ffn-skip`")
    matched, hidden = terms.has("streams"), terms.has("hidden")
    if (matched or hidden) and cached:
        raise DelveError(
            "--teacher-cache: holds the pool's answers alone; without KL of each stream and hidden "
            "match"
        )
    if (matched or hidden) and not _own_parents(cfg, teachers):
        raise DelveError(
            "objective: KL of each stream and hidden match need the dense parent of every stream "
            "as its teacher, in the order of the streams"
        )
    if teachers:
        own = _own_parents(cfg, teachers)
        names = cfg.names if own else map(str, range(len(teachers)))
        pool = delve.plain_pool(names, list(teachers), cfg.n_superblocks if own else 1)
    K = len(cfg.streams) if hybrid else 1
    dropping = hybrid and K > 1 and terms.stream_drop > 0

    def position_loss(head, f, frozen, x):
        here = x.get("present")
        logits = delve.head(cfg, head, f, here) if hybrid else models.head(cfg, head, f)
        nll = cross_entropy(logits, x["targets"])
        metrics = {"nll": nll}
        loss = frozen["ce"] * nll if frozen else nll
        if cached:
            metrics["kl"] = sampled_kl(logits, x["ids"], x["counts"], x["entropy"])
            loss = loss + frozen["kl"] * metrics["kl"]
        elif teachers:
            outs = delve.stream_logits(pool, frozen["pool"], x["teachers"])
            a_K = frozen["pool"]["pool"]["a"]
            taught = sum(w * out for w, out in zip(a_K, outs, strict=True))
            metrics["kl"] = kl(lax.stop_gradient(taught), logits)
            loss = loss + frozen["kl"] * metrics["kl"]
        if matched:
            own = zip(outs, delve.stream_logits(cfg, head, f), strict=True)
            each = jnp.stack([kl(lax.stop_gradient(t), s) for t, s in own], -1)  # [B, c, K]
            share = jnp.ones_like(each) if here is None else here
            metrics["stream_kl"] = (each * share).sum(-1) / jnp.maximum(share.sum(-1), 1)
            loss = loss + frozen["streams"] * metrics["stream_kl"]
        if z_loss:
            loss = loss + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return loss, metrics

    def loss(params, frozen, batch, step=0):
        tokens_BT = tokens_of(batch)
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
        seg = segments(inputs, eot)
        here, goal = None, None
        if dropping:
            here = drop_streams(draws(tokens_BT, step, seed), K, terms.stream_drop)
        if trains != "all":
            params = {
                room: p if (room in JOINTS) == (trains == "joints") else lax.stop_gradient(p)
                for room, p in params.items()
            }
        xs, fixed = {"targets": targets}, {}
        if here is not None:
            xs["present"] = jnp.broadcast_to(here, (*inputs.shape, K))
        if cached:
            xs |= {name: batch[name] for name in ("ids", "counts", "entropy")}
            fixed = {name: terms.at(name, step, steps) for name in ("ce", "kl")}
        elif teachers:
            dense = {"streams": dict(zip(pool.names, frozen["teachers"], strict=True)),
                     "pool": {"a": frozen["weights"]}}  # fmt: skip
            xs["teachers"], _, goal = lax.stop_gradient(
                delve.traced(pool, dense, inputs, segments_BT=seg, how=reading, trace=hidden)
            )
            fixed = {name: terms.at(name, step, steps) for name in ("ce", "kl", "streams")}
            fixed["pool"] = models.head_params(pool, dense)
        alone = not (hybrid or teachers or cached)
        chunk = chunk_length(rows or inputs.shape[0], inputs.shape[1], cfg.vocab_size, alone)

        def student(params):
            way = None
            if hybrid:
                f, _, way = delve.traced(
                    cfg, params, inputs, segments_BT=seg, how=how, present_BTK=here, trace=hidden
                )
            else:
                f, _ = models.features(cfg, params, inputs, segments_BT=seg, how=how)
            head = models.head_params(cfg, params)
            total, metrics = over_chunks(position_loss, head, f, fixed, xs, chunk)
            if routed:
                shares = [share_S[1:] for share_S in way["ffn"].values()]
                metrics["ffn_share"] = jnp.stack(shares).mean()
                if terms.ffn_share < 1:
                    total = total + FFN_WEIGHT * (metrics["ffn_share"] - terms.ffn_share) ** 2
            if hidden and cfg.n_superblocks > 1:
                metrics["hidden"] = hidden_match(cfg.names, way["h"], goal["h"], here)
                total = total + terms.at("hidden", step, steps) * metrics["hidden"]
            return total, metrics

        if terms.rank_drop == 1:
            return student(params)
        shares = jnp.array([1.0, terms.rank_drop])
        totals, both = lax.map(lambda share: student(elastic.masked(cfg, params, share)), shares)
        metrics = {k: v[0] for k, v in both.items()} | {"nll_cut": both["nll"][1]}
        return totals @ CUT_WEIGHTS, metrics

    return loss


def hidden_match(names, way: dict, goal: dict, present_BTK=None) -> jax.Array:
    """Mean square of rms(h) - rms(goal) over channels, tokens, sync points and present streams.

    names: of the streams in their order, which the keys of what a scan gives have lost.
    """
    total = count = 0.0
    for k, n in enumerate(names):
        gap_SBT = (delve.rms(way[n][:-1]) - delve.rms(goal[n][:-1])) ** 2
        gap_SBT = gap_SBT.mean(-1)
        share = 1.0 if present_BTK is None else present_BTK[None, ..., k]
        total = total + (gap_SBT * share).sum()
        count = count + jnp.broadcast_to(share, gap_SBT.shape).sum()
    return total / count
