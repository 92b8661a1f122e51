"""DELVE against its parts: the pool of its parents at step 0, and layer by layer once it moves.

The references are computed apart: whole parents pooled in float64, or one layer after the other in
a Python loop with hub, gate and pool written again from hybrid.md (sections 4, 5, 8 and 9).
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from delve_jax import config, models
from delve_jax.config import DelveConfig, DelveError, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.models import delve
from delve_jax.train import objective

V, T = 40, 12
both = {"vocab_size": V, "vocab_rows": V}


def mamba(L, d=24):
    return MambaConfig(n_layers=L, d_model=d, d_inner=2 * d, d_state=4, dt_rank=2, **both)


def rwkv(L, d=16):
    return RwkvConfig(n_layers=L, d_model=d, d_att=d, d_ffn=3 * d, **both)


def neox(L, d=32, **more):
    return NeoxConfig(n_layers=L, d_model=d, n_heads=2, d_ffn=2 * d, **both, **more)


def fused(*streams, latents, S):
    cfg = DelveConfig(
        streams=tuple((f"p{i}", sub) for i, sub in enumerate(streams)),
        n_superblocks=delve.choose_superblocks([sub.n_layers for sub in streams]),
        latents=latents,
        connectors="hub",
        hub_rank=4,
    )
    assert cfg.n_superblocks == S
    return cfg


def with_codes(cfg, rank=9):
    """The same with common vocabulary tables of this rank."""
    ranks = (("embed", (rank,)), ("head", (rank,)))
    streams = tuple((n, dataclasses.replace(sub, ranks=ranks)) for n, sub in cfg.streams)
    return dataclasses.replace(cfg, streams=streams, codes=("embed", "head"))


# name: depths, then J; 5/3 has no common divisor: superblocks of 2, 1, 2 and 1, 1, 1 layers
SETS = {
    "6/3/3 J=K": fused(mamba(6), rwkv(3), neox(3), latents=3, S=3),
    "6/4 J=1": fused(mamba(6), neox(4, parallel_residual=False), latents=1, S=2),
    "48/24/24 J=1": fused(mamba(48, 8), rwkv(24, 12), neox(24, 16), latents=1, S=8),
    "5/3 J=K": fused(rwkv(5), neox(3, rotary_pct=1.0), latents=2, S=3),
    "codes J=1": with_codes(fused(mamba(4), rwkv(2), neox(2), latents=1, S=2)),
    "codes J=K": with_codes(fused(rwkv(2), neox(2), latents=2, S=2)),
}
SCANNED, UNEVEN = SETS["6/3/3 J=K"], SETS["5/3 J=K"]


@functools.cache
def jitted(cfg):
    return jax.jit(functools.partial(models.forward, cfg))


@functools.cache
def jitted_block(cfg):
    return jax.jit(functools.partial(models.block_apply, cfg))


def text(rows=2):
    return np.random.default_rng(0).integers(0, V, size=(rows, T))


def at_step_0(cfg, randomised):
    """Random parents and random static weights; hub and gate as fusion makes them."""
    params = randomised(cfg, 5)
    joints = jax.jit(functools.partial(delve.init_joints, cfg))(jax.random.key(6))
    return {**params, **joints, "pool": params["pool"]}


def f64(x):
    return np.asarray(x, np.float64)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def pooled(cfg, pool, logits, delta_BTK=0.0):
    """log p of the pool, float64: p ~ prod_k p_k^a_k(x) (J = 1), or sum_k w_k(x) p_k (J = K)."""
    if cfg.latents == 1:
        a_BTK = f64(pool["a"]) * np.exp(2 * np.tanh(delta_BTK / 2)) + np.zeros(len(logits))
        return log_softmax(sum(a_BTK[..., k, None] * f64(ell) for k, ell in enumerate(logits)))
    w_BTK = np.exp(log_softmax(f64(pool["log_pi"]) + delta_BTK))
    p = [w_BTK[..., k, None] * np.exp(log_softmax(f64(ell))) for k, ell in enumerate(logits)]
    return np.log(sum(p))


def log_p(cfg, out):
    """What `forward` returned as log-probabilities; J = K must have returned them already."""
    return log_softmax(f64(out)) if cfg.latents == 1 else f64(out)


@pytest.mark.parametrize("name", SETS)
def test_step_0_is_the_pool_of_the_parents(name, randomised, record_property):
    cfg, tokens = SETS[name], text()
    params = at_step_0(cfg, randomised)
    parts = [jitted(sub)(delve.whole(cfg, params)[n], tokens)[0] for n, sub in cfg.streams]
    assert min(float(ell.std()) for ell in parts) > 2
    want = pooled(cfg, params["pool"], parts)
    got = log_p(cfg, jitted(cfg)(params, tokens)[0])
    error = np.abs(got - want).max()
    record_property("max_dlogp", float(error))
    assert error <= (2e-5 if cfg.latents == 1 else 1e-5)


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def layer_by_layer(cfg, params, tokens):
    """log p with hub and gate at work, in a Python loop over superblocks, streams and layers."""
    S, streams, hub = cfg.n_superblocks, delve.whole(cfg, params), params["hub"]
    h = {n: models.embed_tokens(sub, streams[n], tokens) for n, sub in cfg.streams}
    for s in range(S):
        if s:  # before every superblock but the first
            z = sum(rms(f64(h[n])) @ f64(hub[n]["a"][s - 1]) for n in h)
            for n in h:
                p = {name: f64(leaf[s - 1]) for name, leaf in hub[n].items()}
                h[n] = jnp.float32(f64(h[n]) + p["sigma"] * ((p["g"] * z) @ p["b"]))
        for n, sub in cfg.streams:
            for i in range(sub.n_layers):
                if (
                    (2 * s * sub.n_layers + S) // (2 * S)
                    <= i
                    < (2 * (s + 1) * sub.n_layers + S) // (2 * S)
                ):
                    layer = jax.tree.map(lambda a, i=i: a[i], streams[n]["layers"])
                    h[n] = jitted_block(sub)(layer, h[n])
    f = {n: models.final_features(sub, streams[n], h[n]) for n, sub in cfg.streams}
    logits = [models.head_logits(sub, streams[n], f[n]) for n, sub in cfg.streams]
    gate = jax.tree.map(f64, params["gate"])
    x = np.concatenate([rms(f64(f[n])) @ gate["p"][n] for n in f], axis=-1) @ gate["w1"]
    return pooled(cfg, params["pool"], logits, (x / (1 + np.exp(-x))) @ gate["w2"])


@pytest.mark.parametrize("name", ["6/3/3 J=K", "6/4 J=1", "5/3 J=K", "codes J=1"])
def test_hub_and_gate_at_work_equal_the_layer_by_layer_sum(name, randomised):
    """Both paths: superblocks scanned (6/3/3, 6/4), and of unequal lengths one by one (5/3)."""
    cfg, tokens = SETS[name], text()
    params = randomised(cfg, 7)
    got = log_p(cfg, jitted(cfg)(params, tokens)[0])
    np.testing.assert_allclose(got, layer_by_layer(cfg, params, tokens), rtol=0, atol=1e-4)
    off = params | {"hub": jax.tree.map(np.zeros_like, params["hub"])}
    assert np.abs(log_p(cfg, jitted(cfg)(off, tokens)[0]) - got).max() > 0.5  # the hub matters


@pytest.mark.parametrize("cfg", [SCANNED, UNEVEN], ids=["scanned", "uneven"])
def test_chunks_and_single_steps_continue_the_text(cfg, randomised):
    params, tokens = randomised(cfg, 8), text()
    want = jitted(cfg)(params, tokens)[0]
    state, out, at = models.init_state(cfg, 2, T), [], 0
    for n in (5, 1, 1, 5):
        logits, state = jitted(cfg)(params, tokens[:, at : at + n], state)
        out.append(logits)
        at += n
    np.testing.assert_allclose(np.concatenate(out, axis=1), want, rtol=0, atol=1e-4)


@functools.cache
def gradient(cfg, how=models.F32):
    """Gradient of the nll of one following token per position, weighted by w_T."""

    def loss(params, tokens_BT, w_T):
        logp = jax.nn.log_softmax(models.forward(cfg, params, tokens_BT, how=how)[0])
        picked = jnp.take_along_axis(logp, (tokens_BT[..., None] + 1) % V, axis=-1)[..., 0]
        return -(picked * w_T).sum()

    return jax.jit(jax.grad(loss))


def test_what_learns_at_step_0(randomised):
    """Zero factors (hub b, gate w2) get gradients, so that hub and gate can leave zero; the other
    factor of each pair only afterwards. Every tensor of every stream learns."""
    params = at_step_0(UNEVEN, randomised)
    assert not params["gate"]["w2"].any() and not any(p["b"].any() for p in params["hub"].values())
    grads = gradient(UNEVEN)(params, text(1), jnp.ones(T))
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(np.asarray(g).any())
        for path, g in jax.tree.leaves_with_path(grads)
    }
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    still = {name for name, moves in moved.items() if not moves}
    hub = {f"hub/{n}/{leaf}" for n in UNEVEN.names for leaf in ("a", "g", "sigma")}
    assert still == hub | {f"gate/p/{n}" for n in UNEVEN.names} | {"gate/w1"}
    for s in range(UNEVEN.n_superblocks - 1):
        assert all(grads["hub"][n]["b"][s].any() for n in UNEVEN.names)

    grads = gradient(UNEVEN)(randomised(UNEVEN, 9), text(1), jnp.ones(T))
    still = {p[-1].key for p, g in jax.tree.leaves_with_path(grads) if not np.asarray(g).any()}
    assert still == {"sigma"}  # measured at calibration, frozen


def test_the_hub_is_causal(randomised):
    """With hub and gate at work, what is said at t has no gradient from any later token."""
    tokens, t = np.arange(T)[None], 6  # each id once: row i of a table is the token at position i
    grads = gradient(UNEVEN)(randomised(UNEVEN, 10), tokens, jnp.eye(T)[t])
    for stream in grads["streams"].values():
        used = np.abs(np.asarray(stream["embed"]["kernel"])).max(axis=1)
        assert (used[: t + 1] > 0).all() and (used[t + 1 :] == 0).all()


def test_rematerialised_layers_give_the_same_gradient(randomised):
    args = randomised(UNEVEN, 13), text(1), jnp.ones(T)
    plain, remat = (gradient(UNEVEN, models.Compute(remat=r))(*args) for r in ("none", "layer"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(np.abs(a).max(), 1)),
        *jax.tree.map(np.asarray, (plain, remat)),
    )


def test_superblocks_cover_every_layer_evenly():
    for depths, S in {
        (48, 24, 24): 8, (64, 32, 32): 8, (6, 3, 3): 3, (6, 4): 2, (5, 3): 3, (12, 12): 6,
        (24,): 8, (7, 11): 7, (13, 17): 8, (1, 4): 1,
    }.items():  # fmt: skip
        assert delve.choose_superblocks(list(depths)) == S
        for depth in depths:
            bounds = delve.boundaries(depth, S)
            sizes = np.diff(bounds)
            assert bounds[0] == 0 and bounds[-1] == depth and len(sizes) == S
            assert sizes.max() - sizes.min() <= 1 and sizes.min() >= 1
    assert np.diff(delve.boundaries(6, 8)).tolist() == [1, 1, 0, 1, 1, 1, 0, 1]


def test_a_single_superblock_has_no_hub(randomised):
    cfg = dataclasses.replace(UNEVEN, n_superblocks=1)
    assert "hub" not in models.abstract_params(cfg)
    params = randomised(cfg, 11)
    f, _ = delve.features(cfg, params, text())
    for n, sub in cfg.streams:
        want, _ = models.features(sub, params["streams"][n], text())
        np.testing.assert_allclose(f[n], want, rtol=0, atol=1e-5)


RANKS = {
    "mamba": (("in_proj", (5, 9, 2)), ("out_proj", (3, 3, 3)), ("embed", (7,))),
    "rwkv": (("att/key", (1, 4, 6)), ("ffn/value", (8, 2, 2)), ("head", (6,))),
    "neox": (("att/qkv", (9, 1, 4)), ("mlp/down", (2, 7, 3)), ("embed", (5,)), ("head", (4,))),
}
FACTORED = {
    cfg.family: dataclasses.replace(cfg, ranks=RANKS[cfg.family])
    for cfg in (mamba(3), rwkv(3), neox(3))
}


def leaf_at(tree, name):
    """The map `name` of a parent's tree."""
    tree = tree if name in ("embed", "head") else tree["layers"]
    for part in name.split("/"):
        tree = tree[part]
    return tree


def true_count(cfg):
    """Dense parameters, with I O replaced by r (I + O) in every layer of every factored map."""
    dense = models.abstract_params(dataclasses.replace(cfg, ranks=()))
    total = sum(leaf.size for leaf in jax.tree.leaves(dense))
    for name, ranks in cfg.ranks:
        i, o = leaf_at(dense, name)["kernel"].shape[-2:]
        total += sum(r * (i + o) - i * o for r in ranks)
    return total


def test_count_is_the_sum_over_true_ranks():
    joined = DelveConfig(
        tuple(FACTORED.items()), n_superblocks=3, latents=1, connectors="hub", hub_rank=4
    )
    for cfg in FACTORED.values():
        assert models.count(cfg) == true_count(cfg)
    widths = [sub.d_model for _, sub in joined.streams]
    hub = 2 * (2 * 4 * sum(widths) + 3 * (4 + 1))  # a, b, g, sigma at two joints
    gate = 32 * sum(widths) + 96 * 64 + 64 * 3
    assert models.count(joined) == sum(map(true_count, FACTORED.values())) + hub + gate + 3


@pytest.mark.parametrize("family", FACTORED)
def test_padding_beyond_the_true_rank_is_inert(family, randomised):
    """Zero in both factors: it adds nothing and gets no gradient, so training leaves it zero."""
    cfg = FACTORED[family]
    params = randomised(cfg, 12)
    for name, ranks in cfg.ranks:
        p = leaf_at(params, name)
        keep = np.arange(max(ranks)) < np.array(ranks)[:, None]
        keep = keep[0] if name in ("embed", "head") else keep
        p["v"] = np.asarray(p["v"]) * keep[..., None, :]
        p["u"] = np.asarray(p["u"]) * keep[..., None]
    dense = jax.tree.map(np.asarray, params)
    for name, _ in cfg.ranks:
        p = leaf_at(dense, name)
        p["kernel"] = p.pop("v") @ p.pop("u")
    want = jitted(dataclasses.replace(cfg, ranks=()))(dense, text())[0]

    def loss(p):
        logits = models.forward(cfg, p, text())[0]
        return jnp.sin(logits).sum(), logits

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    grads = jax.tree.map(np.asarray, grads)
    for name, ranks in cfg.ranks:
        g = leaf_at(grads, name)
        v, u = (np.reshape(a, (len(ranks), *a.shape[-2:])) for a in (g["v"], g["u"]))
        for layer, r in enumerate(ranks):
            assert not v[layer, :, r:].any() and not u[layer, r:].any()
            assert v[layer, :, :r].any() and u[layer, :r].any()


def test_configs_go_through_json_and_bad_ones_are_named():
    joined = DelveConfig(
        tuple(FACTORED.items()),
        n_superblocks=3,
        latents=3,
        connectors="hub",
        hub_rank=4,
        teachers=("a", "b", "c"),
    )
    for cfg in (*FACTORED.values(), joined):
        back = config.from_json(json.loads(json.dumps(config.to_json(cfg))))
        assert back == cfg and hash(back) == hash(cfg) and type(back) is type(cfg)
    assert joined.context_length == 2048 and joined.vocab_size == joined.vocab_rows == V
    good = config.to_json(mamba(2))
    lacking = {k: v for k, v in good.items() if k != "d_model"}
    for data, field in (
        (good | {"family": "gpt2"}, "family"), (good | {"d_modell": 8}, "d_modell"),
        (lacking, "d_model"),
    ):  # fmt: skip
        with pytest.raises(DelveError, match=f"x.json.*{field}"):
            config.from_json(data, "x.json")


def test_common_codes_are_counted_once_and_come_apart_as_they_went_together(randomised):
    cfg = SETS["codes J=1"]
    params = randomised(cfg, 3)
    streams = delve.whole(cfg, params)
    jax.tree.map(
        np.testing.assert_array_equal, delve.apart(cfg, streams),
        {k: params[k] for k in ("streams", "codes")},
    )  # fmt: skip
    assert models.count(cfg) == sum(a.size for a in jax.tree.leaves(params))
    alone = sum(models.count(sub) for _, sub in cfg.streams)
    joints = sum(a.size for k in ("pool", "hub", "gate") for a in jax.tree.leaves(params[k]))
    assert alone + joints - models.count(cfg) == 2 * 2 * 9 * V  # two streams have no long factors


def test_training_reads_common_codes_chunk_by_chunk_as_whole_logits_do(randomised):
    """The head that a loss differentiates holds the codes: its gradient is that of the model."""
    cfg = SETS["codes J=1"]
    params = randomised(cfg, 4)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (2, T + 1)), jnp.int32)
    run = objective.language_model(cfg)

    def plain(params):
        logits, _ = models.forward(cfg, params, tokens[:, :-1])
        return objective.cross_entropy(logits, tokens[:, 1:]).mean()

    want, want_grad = jax.value_and_grad(plain)(params)
    (got, _), grad = jax.value_and_grad(run, has_aux=True)(params, (), tokens)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert np.abs(grad["codes"]["head"]["u"]).max() > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * (1 + np.abs(b).max())),
        grad, want_grad,
    )  # fmt: skip
