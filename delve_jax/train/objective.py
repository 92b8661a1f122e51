"""Objectives: next-token cross-entropy and the KL divergence to a pooled teacher, in nats a token.

tokens_BT holds T+1 ids: positions 0..T-1 are read, 1..T are predicted.
"""

import jax
import jax.numpy as jnp

from .. import models


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the targets, float32."""
    logits = logits_BTV.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def kl(teacher_BTV: jax.Array, student_BTV: jax.Array) -> jax.Array:
    """Mean KL(teacher || student) of two sets of logits (or log-probabilities)."""
    log_t, log_s = jax.nn.log_softmax(teacher_BTV), jax.nn.log_softmax(student_BTV)
    return (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean()


REMAT_ABOVE = 100_000_000  # parameters; below, recomputing layers costs more than it saves


def language_model(cfg):
    """Loss of plain training: (params, frozen, tokens_BT) -> (nll, metrics)."""
    remat = models.count(cfg) > REMAT_ABOVE

    def loss(params, frozen, tokens_BT):
        logits, _ = models.forward(cfg, params, tokens_BT[:, :-1], remat=remat)
        nll = cross_entropy(logits, tokens_BT[:, 1:])
        return nll, {"nll": nll}

    return loss


def pooled_teacher(teachers: tuple, weights: jax.Array, params: tuple, tokens_BT) -> jax.Array:
    """Log-linear pool of dense parents: sum_k weights_k logits_k (hybrid.md §12, T)."""
    outs = [models.forward(c, p, tokens_BT)[0] for c, p in zip(teachers, params, strict=True)]
    return sum(w * out for w, out in zip(weights, outs, strict=True))


def healing(cfg, teachers: tuple = (), kl_weight: float = 0.5):
    """Loss of healing: (1 - w) CE + w KL(pool of dense parents || DELVE); w = 0 without teachers.

    frozen = {"weights": [K], "teachers": tuple of parameter trees}, so that they are arguments of
    the compiled step (sharded like the rest) and not constants inside it.
    """
    if not teachers:
        return language_model(cfg)
    remat = models.count(cfg) > REMAT_ABOVE

    def loss(params, frozen, tokens_BT):
        inputs = tokens_BT[:, :-1]
        logits, _ = models.forward(cfg, params, inputs, remat=remat)
        teacher = pooled_teacher(teachers, frozen["weights"], frozen["teachers"], inputs)
        nll = cross_entropy(logits, tokens_BT[:, 1:])
        divergence = kl(jax.lax.stop_gradient(teacher), logits)
        return (1 - kl_weight) * nll + kl_weight * divergence, {"nll": nll, "kl": divergence}

    return loss
