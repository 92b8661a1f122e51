"""The programs of a parent's passes: a layer, its moments and gradients, the vocabulary tables.

Each is compiled once for a batch's shape (`device.program`), whoever asks for it. Names: n tokens
of a flat batch, g the gradient of the loss.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from .. import models
from ..config import ParentConfig
from ..models.linear import HIGHEST, lookup, wide
from . import device


@functools.lru_cache(maxsize=8)
def watching(cfg: ParentConfig, collections: tuple[str, ...]):
    """The jitted pieces of a parent's passes whose layers sow `collections`, "moments" first."""
    block = models.FAMILY[cfg.family].Block(cfg)

    def context(x_BTD):
        return models.FAMILY[cfg.family].context(cfg, x_BTD)[0]

    @device.program
    def watch(layer, x_BTD):
        x_BTD, sown = models.block_apply(cfg, layer, x_BTD, mutable=list(collections))
        return x_BTD, sown["moments"]

    @device.program
    def back(layer, x_BTD, g_BTD):
        ctx = context(x_BTD)

        def run(x_BTD, bumps):
            (x_BTD, _), sown = block.apply(
                {"params": layer, "perturbations": bumps}, x_BTD, None, ctx,
                mutable=list(collections),
            )  # fmt: skip
            return x_BTD, sown["moments"]

        like = jax.eval_shape(
            lambda: block.apply({"params": layer}, x_BTD, None, ctx, mutable=["perturbations"])[1]
        )["perturbations"]
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        _, pull, sums = jax.vjp(run, x_BTD, zeros, has_aux=True)
        g_BTD, g_maps = pull(g_BTD)
        return g_BTD, _with_gradients(sums, g_maps, layer)

    return watch, back


@functools.lru_cache(maxsize=8)
def programs(cfg: ParentConfig):
    """The jitted pieces of a parent's passes that every pass shares."""

    @device.program
    def embed(outer, tokens_BT):
        return models.embed_tokens(cfg, outer, tokens_BT)

    @device.program
    def step(layer, x_BTD):
        return models.block_apply(cfg, layer, x_BTD)

    @device.program
    def head_inputs(outer, x_BTD):
        f_BTD = wide(models.final_features(cfg, outer, x_BTD))
        gram = jnp.einsum("btd,bte->de", f_BTD, f_BTD, precision=HIGHEST)
        return {"gram": gram, "abs": jnp.abs(f_BTD).sum((0, 1))}

    @device.program
    def head_back(outer, x_nD, key, index):
        def logits_of(x):
            return models.head_logits(cfg, outer, models.final_features(cfg, outer, x))

        logits_nV, pull = jax.vjp(logits_of, x_nD)
        # jax.random.categorical, whose argmax costs as much as all the rest of this on a CPU
        key = jax.random.fold_in(key, index)
        z_nV = logits_nV + jax.random.gumbel(key, logits_nV.shape, logits_nV.dtype)
        label_nV = (z_nV == z_nV.max(-1, keepdims=True)).astype(z_nV.dtype)
        p_nV = jax.nn.softmax(logits_nV)
        (g_nD,) = pull(p_nV - label_nV / label_nV.sum(-1, keepdims=True))  # ties share a label
        return g_nD, p_nV.sum(0)

    @device.program
    def embed_back(outer, tokens_BT, g_BTD):
        rows = wide(lookup(outer["embed"], tokens_BT))  # as the gradient is

        def rest(rows):  # RWKV normalises what it looks up
            ln0 = outer.get("ln0")
            return rows if ln0 is None else models.layer_norm(ln0, rows, cfg.norm_eps)

        (g,) = jax.vjp(rest, rows)[1](g_BTD)
        return jnp.einsum("btd,bte->de", g, g, precision=HIGHEST)

    @device.program
    def log_p(outer, x_nD):
        features = models.final_features(cfg, outer, x_nD)
        return jax.nn.log_softmax(models.head_logits(cfg, outer, features))

    @device.program
    def compare(log_t, log_s, label_n):
        kl = (jnp.exp(log_t) * (log_t - log_s)).sum()
        at_n = jnp.take_along_axis(log_s, jnp.maximum(label_n, 0)[:, None], 1)[:, 0]
        return kl, -jnp.where(label_n < 0, 0.0, at_n).sum()

    return SimpleNamespace(
        embed=embed, step=step, head_inputs=head_inputs, head_back=head_back,
        embed_back=embed_back, log_p=log_p, compare=compare,
    )  # fmt: skip


def _with_gradients(sums: dict, g: dict, params: dict) -> dict:
    """The tree of sums with "grad": the Gram of g over the narrow side of each map."""
    if "gram" in sums:
        g_NO = wide(g["out"].reshape(-1, g["out"].shape[-1]))
        n_in, n_out = params["kernel"].shape
        side = g_NO @ wide(params["kernel"]).T if n_out > n_in else g_NO
        return {**sums, "grad": jnp.matmul(side.T, side, precision=HIGHEST)}
    return {name: _with_gradients(sub, g[name], params[name]) for name, sub in sums.items()}
