"""Objectives: next-token cross-entropy and the KL divergence to a pooled teacher, in nats a token.

tokens_BT holds T+1 ids: positions 0..T-1 are read, 1..T are predicted. The head runs chunk by chunk
of T, and its gradient is taken in the forward pass (chunk by chunk too), so that [B, T, V] is never
held and no logit is computed twice. With `eot` documents in a row do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .. import models
from ..models import Compute

LOGITS_BYTES = {"cpu": 2**24}  # of one chunk's float32 logits on a device; cache-sized on a CPU
LOGITS_BYTES_ELSEWHERE = 2**28
REMAT_ABOVE = 100_000_000  # parameters; below, recomputing layers costs more than it saves


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target, nats [B, T]."""
    picked = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked


def kl(teacher_BTV: jax.Array, student_BTV: jax.Array) -> jax.Array:
    """KL(teacher || student) at each position [B, T] of two sets of logits (or log-probs)."""
    log_t, log_s = jax.nn.log_softmax(teacher_BTV), jax.nn.log_softmax(student_BTV)
    return (jnp.exp(log_t) * (log_t - log_s)).sum(-1)


def default_remat(cfg) -> str:
    """Layers are recomputed where the model is large enough for it to pay."""
    return "layer" if models.count(cfg) > REMAT_ABOVE else "none"


def segments(tokens_BT: jax.Array, eot: int | None) -> jax.Array | None:
    """Document number of each token: `eot` opens the document that follows it."""
    return None if eot is None else jnp.cumsum(tokens_BT == eot, axis=1, dtype=jnp.int32)


def chunk_length(rows: int, T: int, vocab: int) -> int:
    """Positions per chunk, so that a chunk's float32 logits stay small; at least two chunks."""
    most = LOGITS_BYTES.get(jax.default_backend(), LOGITS_BYTES_ELSEWHERE)
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

    real_nc = (jnp.arange(n * chunk) < T).reshape(n, 1, chunk)

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


def language_model(
    cfg, how: Compute | None = None, eot: int | None = None, z_loss: float = 0.0, rows: int = 0
):
    """Loss of plain training: (params, frozen, tokens_BT) -> (loss, metrics with "nll").

    rows: rows of a batch on one device (0: all), which decides the chunk; z_loss: weight of
    logsumexp^2 (PaLM, arXiv 2204.02311).
    """
    return healing(cfg, (), 0.0, how=how, eot=eot, z_loss=z_loss, rows=rows)


def healing(
    cfg,
    teachers: tuple = (),
    kl_weight: float = 0.5,
    *,
    how: Compute | None = None,
    eot: int | None = None,
    z_loss: float = 0.0,
    rows: int = 0,
):
    """Loss of healing: (1 - w) CE + w KL(pool of dense parents || model); w = 0 without teachers.

    The pool is log-linear: sum_k weights_k logits_k (hybrid.md §12, T). frozen = {"weights": [K],
    "teachers": tuple of parameter trees}, so that they are arguments of the compiled step (sharded
    like the rest) and not constants inside it.
    """
    how = how or Compute(remat=default_remat(cfg))
    reading = Compute(dtype=how.dtype, residual=how.residual)  # teachers: nothing to recompute

    def position_loss(head, f, frozen, x):
        logits = models.head(cfg, head, f)
        nll = cross_entropy(logits, x["targets"])
        metrics = {"nll": nll}
        loss = nll
        if teachers:
            outs = [
                models.head(t, p, f_t)
                for t, p, f_t in zip(teachers, frozen["heads"], x["teachers"], strict=True)
            ]
            pool = sum(w * out for w, out in zip(frozen["weights"], outs, strict=True))
            metrics["kl"] = kl(lax.stop_gradient(pool), logits)
            loss = (1 - kl_weight) * nll + kl_weight * metrics["kl"]
        if z_loss:
            loss = loss + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return loss, metrics

    def loss(params, frozen, tokens_BT):
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
        seg = segments(inputs, eot)
        f, _ = models.features(cfg, params, inputs, segments_BT=seg, how=how)
        xs, fixed = {"targets": targets}, {}
        if teachers:
            xs["teachers"] = [
                lax.stop_gradient(models.features(t, p, inputs, segments_BT=seg, how=reading)[0])
                for t, p in zip(teachers, frozen["teachers"], strict=True)
            ]
            fixed = {
                "weights": frozen["weights"],
                "heads": [
                    models.head_params(t, p)
                    for t, p in zip(teachers, frozen["teachers"], strict=True)
                ],
            }
        chunk = chunk_length(rows or inputs.shape[0], inputs.shape[1], cfg.vocab_size)
        head = models.head_params(cfg, params)
        return over_chunks(position_loss, head, f, fixed, xs, chunk)

    return loss
