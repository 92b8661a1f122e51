"""Documents packed into one row stay apart: attention, recurrences, convolution and token shifts.

The reference is every document alone, in a row of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import models
from delve_jax.config import DelveConfig, MambaConfig, NeoxConfig, Qwen3Config, RwkvConfig
from delve_jax.models import attention, scan

V, T = 50, 24
LENGTHS = ((9, 7, 8), (1, 15, 8))  # of the documents of each row; the scans' chunks are 8 long
LONGEST = max(map(max, LENGTHS))
small = {"vocab_size": V, "vocab_rows": V, "d_model": 16, "n_layers": 2}
MAMBA = MambaConfig(d_inner=24, d_state=4, dt_rank=3, **small)
RWKV = RwkvConfig(d_att=24, d_ffn=24, **small)
NEOX = NeoxConfig(n_heads=2, d_ffn=24, **small)
QWEN3 = Qwen3Config(n_heads=4, n_kv_heads=2, head_dim=8, d_ffn=24, **small)
DELVE = DelveConfig((("m", MAMBA), ("q", QWEN3)), 2, latents=2, connectors="hub", hub_rank=4)
# config, and which scan is run how
WAYS = {
    "mamba sequential": (MAMBA, {"mamba": "sequential"}),
    "mamba fused": (MAMBA, {"mamba": "fused"}),
    "mamba chunked": (MAMBA, {"mamba": "chunked"}),
    "mamba associative": (MAMBA, {"mamba": "associative"}),
    "rwkv sequential": (RWKV, {"wkv": "sequential"}),
    "rwkv chunked": (RWKV, {"wkv": "chunked"}),
    "neox": (NEOX, {}),
    "qwen3": (QWEN3, {}),
    "delve": (DELVE, {}),
}


def spans():
    """(row, first, last + 1) of every document."""
    ends = [np.cumsum(row) for row in LENGTHS]
    return [
        (b, end - n, end)
        for b, row in enumerate(LENGTHS)
        for end, n in zip(ends[b], row, strict=True)
    ]


TOKENS = np.stack([np.random.default_rng(0).permutation(V)[:T] for _ in LENGTHS])
TARGETS = np.random.default_rng(1).integers(0, V, TOKENS.shape)
SEGMENTS = np.stack([np.repeat(np.arange(len(row)), row) for row in LENGTHS]).astype(np.int32)


def alone(a_BT):
    """Every document in a row of its own, zeros behind it."""
    out = np.zeros((len(spans()), LONGEST), a_BT.dtype)
    for row, (b, first, end) in zip(out, spans(), strict=True):
        row[: end - first] = a_BT[b, first:end]
    return out


@functools.cache
def gradient(cfg):
    """(params, tokens, segments, targets, weights) -> (sum of nll, logits), gradients."""

    def loss(params, tokens_BT, segments_BT, targets_BT, w_BT):
        logits, _ = models.forward(cfg, params, tokens_BT, segments_BT=segments_BT)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], axis=-1)
        return -(logp[..., 0] * w_BT).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def each_alone(cfg, randomised):
    """Logits [document, time, V] and gradients of the sum over all documents."""
    weights = alone(np.ones(TOKENS.shape, np.float32))
    (_, logits), grads = gradient(cfg)(
        randomised(cfg, 1), alone(TOKENS), None, alone(TARGETS), weights
    )
    return np.asarray(logits), jax.tree.map(np.asarray, grads)


def tables(grads):
    """Gradients of the token embeddings, of every stream."""
    parts = grads["streams"].values() if "streams" in grads else [grads]
    return [np.abs(np.asarray(p["embed"]["kernel"])).max(axis=1) for p in parts]


@pytest.mark.parametrize("name", WAYS)
def test_packed_documents_equal_documents_alone(name, randomised, monkeypatch):
    """Logits, the gradient of every parameter, and no gradient at all from other documents."""
    cfg, impls = WAYS[name]
    logits, grads = each_alone(cfg, randomised)
    for kind, impl in impls.items():
        monkeypatch.setitem(scan.DEFAULT["cpu"], kind, (impl, 8))
    packed = gradient.__wrapped__(cfg)  # traced anew, with these scans
    params = randomised(cfg, 1)
    (_, got), got_grads = packed(params, TOKENS, SEGMENTS, TARGETS, np.ones_like(TOKENS, float))
    assert logits.std() > 1
    for (b, first, end), want in zip(spans(), logits, strict=True):
        np.testing.assert_allclose(got[b, first:end], want[: end - first], rtol=0, atol=2e-5)
    for (path, g), want in zip(
        jax.tree.leaves_with_path(got_grads), jax.tree.leaves(grads), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            g, want, rtol=0, atol=2e-5 * max(np.abs(want).max(), 1e-3), err_msg=where
        )
    # each id stands once in row 0: row i of the table's gradient is that of one position
    only = np.zeros(TOKENS.shape)
    only[0, 12] = 1  # inside the second document, 9..15
    _, from_one = packed(params, TOKENS, SEGMENTS, TARGETS, only)
    for used in tables(from_one):
        assert (used[TOKENS[0, 9:13]] > 0).all()
        assert (used[np.delete(np.arange(V), TOKENS[0, 9:13])] == 0).all()


def test_without_segments_documents_do_mix(randomised):
    """The comparison above would notice: one state through the row gives other logits."""
    for cfg in (MAMBA, RWKV, NEOX, QWEN3):
        logits, _ = each_alone(cfg, randomised)
        whole = models.forward(cfg, randomised(cfg, 1), TOKENS)[0]
        b, first, end = spans()[1]
        assert np.abs(whole[b, first:end] - logits[1, : end - first]).max() > 0.1


def test_a_state_with_segments_is_refused(randomised):
    with pytest.raises(ValueError, match="segments_BT"):
        models.forward(
            NEOX, randomised(NEOX, 1), TOKENS, models.init_state(NEOX, 2, T), None, SEGMENTS
        )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("loop", [False, True])
def test_attention_by_blocks_of_queries_is_the_same(loop, rows, monkeypatch):
    """Value and gradient, with a remainder block, documents in a row and shared heads; the heads at
    once and one by one, under one mask or one a row."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 11, 4, 4), (2, 2, 11, 4), (2, 2, 11, 4))  # heads of keys and values come first
    q, k, v = (jax.random.normal(x, shape) for x, shape in zip(keys, shapes, strict=True))
    seg = jnp.cumsum(jnp.arange(11) % jnp.array([[5], [4]]) == 0, axis=1)[:rows]
    mask = (jnp.tril(jnp.ones((11, 11), bool)) & (seg[:, :, None] == seg[:, None]))[:, None]

    def value_and_grad(causal=False):
        return jax.value_and_grad(
            lambda *a: (attention.weighted(*a, mask, causal) ** 2).sum(), argnums=(0, 1, 2)
        )(q, k, v)

    whole = value_and_grad()
    monkeypatch.setattr(attention, "QUERIES", 4)
    if loop:
        monkeypatch.setattr(attention, "LOOPED", 1)
    assert attention._looped(True, 11) == loop
    for causal in (False, True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            value_and_grad(causal),
            whole,
        )
