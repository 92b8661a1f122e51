"""Activation moments of a parent, one layer at a time: E[x x^T] or E[y y^T], and E[x], per map.

The calibration activations of one layer are held, the layer runs over them under jit, its Linear
modules sow float32 sums over at most 8k tokens, and these are merged in float64 on the host. Only
one layer's Grams exist at a time. Teacher activations feed every layer.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import models
from ..config import DelveError, ParentConfig

TOKENS = 8192  # float32 sums over more lose digits that the decomposition needs


class Moments(NamedTuple):
    """Second moment (over "inputs" or "outputs"), input mean, tokens counted; float64."""

    gram: np.ndarray
    mean_I: np.ndarray
    count: float
    over: str


def check_tokens(tokens_NT: np.ndarray, vocab_size: int) -> np.ndarray:
    """Calibration windows as int32 [N,T]; DelveError where they are empty or out of range."""
    tokens_NT = np.asarray(tokens_NT)
    if tokens_NT.ndim != 2 or not tokens_NT.size or tokens_NT.dtype.kind not in "iu":
        raise DelveError(
            f"calibration tokens: integer windows [N, T] expected, got {tokens_NT.dtype} "
            f"{list(tokens_NT.shape)}; give a longer --calibrate text"
        )
    low, high = int(tokens_NT.min()), int(tokens_NT.max())
    if low < 0 or high >= vocab_size:
        raise DelveError(
            f"calibration tokens: id {low if low < 0 else high} is outside the vocabulary of "
            f"{vocab_size}; tokenize with this parent's own tokenizer"
        )
    return tokens_NT.astype(np.int32)


def merge(partials: Iterator[dict]) -> dict:
    """Sum of trees of float32 partial sums, in float64 on the host."""
    total = None
    for part in partials:
        part = jax.tree.map(lambda a: np.asarray(a, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def normalise(sums: dict, over: str, where: str) -> Moments:
    """Moments from {"gram", "sum_in", "count"}; DelveError names `where` if they are not finite."""
    count = float(sums["count"])
    gram, mean_I = sums["gram"] / count, sums["sum_in"] / count
    if not (np.isfinite(gram).all() and np.isfinite(mean_I).all()):
        raise DelveError(
            f"{where}: calibration activations are not finite; check the weights for NaN or Inf "
            "and the text, or use --method svd, which needs no activations"
        )
    return Moments(gram, mean_I, count, over)


@functools.lru_cache(maxsize=8)
def _programs(cfg: ParentConfig):
    """The jitted pieces of a parent's forward pass: embedding, one layer, head inputs."""

    @jax.jit
    def embed(params, tokens_BT):
        return models.embed_tokens(cfg, params, tokens_BT)

    @jax.jit
    def block(layer, x_BTD):
        return models.block_apply(cfg, layer, x_BTD, mutable=["moments"])

    @jax.jit
    def head_inputs(params, x_BTD):
        f_BTD = models.final_features(cfg, params, x_BTD).astype(jnp.float32)
        gram = jnp.einsum("btd,bte->de", f_BTD, f_BTD)
        return {"gram": gram, "sum_in": f_BTD.sum((0, 1)), "count": f_BTD[..., 0].size}

    return embed, block, head_inputs


def stream(
    cfg: ParentConfig, params: dict, tokens_NT: np.ndarray
) -> Iterator[tuple[int | str, dict[str, Moments]]]:
    """Yields (layer, {map path: Moments}) for each layer in order, then ("head", {"head": ...}).

    params: the dense parent's tree; tokens_NT: int32 windows. The head's are those of its inputs.
    """
    embed, block, head_inputs = _programs(cfg)
    rows = max(1, TOKENS // tokens_NT.shape[1])
    outer = {name: tree for name, tree in params.items() if name != "layers"}

    def advance(layer):
        for i, x_BTD in enumerate(xs):
            xs[i], sown = block(layer, x_BTD)
            yield sown["moments"]

    with jax.default_matmul_precision("highest"):
        xs = [
            embed(outer, jnp.asarray(tokens_NT[i : i + rows]))
            for i in range(0, len(tokens_NT), rows)
        ]
    for index in range(cfg.n_layers):
        layer = jax.tree.map(operator.itemgetter(index), params["layers"])
        with jax.default_matmul_precision("highest"):  # never held across a yield: it is global
            sums = merge(advance(layer))
        yield index, _maps(sums, layer, f"layer {index}, map ")
    with jax.default_matmul_precision("highest"):
        head = merge(head_inputs(outer, x) for x in xs)
    yield "head", {"head": normalise(head, "inputs", "map head")}


def _maps(sums: dict, params: dict, where: str, path: str = "") -> dict[str, Moments]:
    """{"att/key": Moments, ...} from the nested tree of sown sums, which follows `params`."""
    if "gram" in sums:  # over the narrow side; a square map's is over its outputs
        n_in, n_out = params["kernel"].shape
        return {path: normalise(sums, "inputs" if n_out > n_in else "outputs", where + path)}
    out = {}
    for name, sub in sums.items():
        out |= _maps(sub, params[name], where, f"{path}/{name}" if path else name)
    return out
