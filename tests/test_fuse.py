"""Pool weights: convex fits against scipy, the step-0 guarantee, the fused model's exactness."""

import dataclasses

import jax
import numpy as np
import pytest
from compiled import forward
from scipy.optimize import minimize

from delve_jax import DelveError, models
from delve_jax.compress import codes
from delve_jax.config import MambaConfig, NeoxConfig, RwkvConfig, from_json, to_json
from delve_jax.fuse import (
    _Cached,
    _em,
    fit_weights,
    fuse,
    joint_config,
    joints_count,
    warm_hub,
)
from delve_jax.models import delve, elastic

V = 61
SHARED = dict(vocab_size=V, vocab_rows=V, context_length=32)
PARENTS = {
    "m": MambaConfig(**SHARED, d_model=16, n_layers=4, d_inner=32, dt_rank=2, tie_embeddings=True),
    "r": RwkvConfig(**SHARED, d_model=16, n_layers=2, d_att=16, d_ffn=24),
    "x": NeoxConfig(**SHARED, d_model=24, n_layers=2, n_heads=2, d_ffn=32, rotary_pct=0.5),
}


@pytest.fixture(scope="module")
def parts(randomised):
    return [(n, c, randomised(c, seed)) for seed, (n, c) in enumerate(PARENTS.items())]


@pytest.fixture(scope="module")
def tokens():
    """Text that the parents find unequally likely: sampled from the first parent's favourites."""
    return np.random.default_rng(0).integers(0, V, (12, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def log_p(parts, tokens):
    """Each parent's log-probabilities [K, n, V] and the targets, straight from `forward`."""
    out = [
        np.asarray(jax.nn.log_softmax(forward(c, p, tokens[:, :-1])[0]), np.float64)
        for _, c, p in parts
    ]
    return np.stack(out).reshape(3, -1, V), tokens[:, 1:].reshape(-1)


def pooled_nll(log_p, targets, a):
    z = np.einsum("k,knv->nv", a, log_p)
    z -= np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) + z.max(
        -1, keepdims=True
    )
    return -z[np.arange(len(targets)), targets].mean()


def test_loglinear_weights_are_the_convex_optimum(parts, tokens, log_p):
    pool, report = fit_weights([c for _, c, _ in parts], [p for _, _, p in parts], tokens)
    w = pool["a"]
    best = minimize(
        lambda a: pooled_nll(*log_p, a), np.full(3, 1 / 3), bounds=[(0, None)] * 3,
        method="L-BFGS-B", options={"ftol": 1e-12},
    )  # fmt: skip
    assert (w >= 0).all()
    assert report["nll"] == pytest.approx(pooled_nll(*log_p, w), abs=1e-5)
    assert report["nll"] <= best.fun + 1e-5
    one_hot = [pooled_nll(*log_p, row) for row in np.eye(3)]
    np.testing.assert_allclose(report["nll_parents"], one_hot, atol=1e-5)
    assert report["nll"] <= min(one_hot) + 1e-9


def test_mixture_weights_are_the_convex_optimum(parts, tokens, log_p):
    pool, report = fit_weights(
        [c for _, c, _ in parts], [p for _, _, p in parts], tokens, latents=len(parts)
    )
    w = np.exp(pool["log_pi"])
    p = np.exp(log_p[0][:, np.arange(len(log_p[1])), log_p[1]])
    best = minimize(
        lambda z: -np.log(np.exp(z - z.max()) / np.exp(z - z.max()).sum() @ p).mean(),
        np.zeros(3), method="BFGS",
    )  # fmt: skip
    assert w.sum() == pytest.approx(1) and (w >= 0).all()
    assert report["nll"] == pytest.approx(best.fun, abs=1e-4)


def test_two_latents_fit_no_worse_than_one_and_are_what_they_say(parts, tokens, log_p):
    configs, weights = [c for _, c, _ in parts], [p for _, _, p in parts]
    one = fit_weights(configs, weights, tokens)[1]["nll"]
    pool, report = fit_weights(configs, weights, tokens, latents=2)
    assert pool["a"].shape == (2, 3) and pool["log_pi"].shape == (2,)
    z = np.einsum("jk,knv->jnv", pool["a"].astype(float), log_p[0])
    z -= np.logaddexp.reduce(z, axis=-1, keepdims=True)
    pi = pool["log_pi"] - np.logaddexp.reduce(pool["log_pi"])
    chosen = z[:, np.arange(len(log_p[1])), log_p[1]] + pi[:, None]
    assert report["nll"] == pytest.approx(-np.logaddexp.reduce(chosen, 0).mean(), abs=1e-4)
    assert report["nll"] <= one + 1e-6
    np.testing.assert_allclose(report["weights"], np.exp(pi) @ pool["a"], rtol=1e-5)


@pytest.mark.parametrize("connectors", ["hub", "self"])
def test_a_warm_hub_explains_what_was_lost_and_changes_nothing_yet(parts, tokens, connectors):
    """Streams whose dense parents are other streams' linear images: the regression finds them."""
    cfg, params, _ = fuse(parts, tokens, hub_rank=24, connectors=connectors)
    dense = [(c, jax.tree.map(lambda a: 1.05 * a, p)) for _, c, p in parts]
    warm, report = warm_hub(cfg, params, dense, tokens)
    run = jax.jit(lambda p: models.forward(cfg, p, tokens[:, :-1])[0])
    np.testing.assert_allclose(run(warm), run(params), rtol=0, atol=1e-5)  # g = 0
    assert all(0 < r <= 1 for r in report["r2"])
    # with all gains at 1 the streams come nearer to their parents at the first sync point
    pool = delve.plain_pool(cfg.names, [c for c, _ in dense], cfg.n_superblocks)
    whole = {"streams": dict(zip(cfg.names, (p for _, p in dense), strict=True))}
    goal = delve.traced(pool, whole, tokens)[2]["h"]
    h = {n: x[0] for n, x in delve.traced(cfg, warm, tokens)[2]["h"].items()}
    first = {n: jax.tree.map(lambda a: a[0], warm["hub"][n]) for n in cfg.names}
    open_ = {n: p | {"g": np.ones_like(p["g"])} for n, p in first.items()}
    after = delve.hub(cfg, open_, h)
    scale = {n: float(first[n]["sigma"]) for n in cfg.names}
    lost = lambda x: sum(  # noqa: E731
        float((((goal[n][0] - x[n]) / scale[n]) ** 2).sum()) for n in cfg.names
    )
    assert 1 - lost(after) / lost(h) == pytest.approx(report["r2"][0], abs=0.02)
    if connectors == "self":  # dense streams lost nothing: no share, and no NaN in JSON
        _, report = warm_hub(cfg, params, [(c, p) for _, c, p in parts], tokens[:2])
        assert set(report["r2"]) == {None}
    with pytest.raises(DelveError, match="connectors hub and self"):
        warm_hub(dataclasses.replace(cfg, connectors="cross"), params, dense, tokens)


def test_logits_of_large_vocabularies_come_in_smaller_chunks(parts, tokens, monkeypatch):
    """Three parents of 50,277 ids have 7.7 GiB of temporaries at 4096 tokens; fits are the same."""
    ways = [c for _, c, _ in parts], [p for _, _, p in parts], tokens
    assert _Cached(*ways).rows == 4096  # a small vocabulary's, as ever
    (want, facts), (pool, _) = fit_weights(*ways), fit_weights(*ways, 2)
    monkeypatch.setattr("delve_jax.fuse.LOGITS_BYTES", 4 * 3 * V * 100 + 5)
    known = _Cached(*ways)
    assert [len(y) for _, y in known.chunks] == [100, 100, 76] and known.rows == 100
    got, again = fit_weights(*ways)
    np.testing.assert_allclose(got["a"], want["a"], atol=1e-3)
    assert again["nll"] == pytest.approx(facts["nll"], abs=1e-6)
    np.testing.assert_allclose(fit_weights(*ways, 2)[0]["a"], pool["a"], atol=2e-2)  # weighted


def test_em_finds_the_generating_weights():
    rng = np.random.default_rng(1)
    sources = rng.dirichlet(np.ones(8) * 0.3, size=2)
    truth = np.array([0.8, 0.2])
    draws = rng.choice(8, 40_000, p=truth @ sources)
    w, _ = _em(np.log(sources[:, draws]))
    np.testing.assert_allclose(w, truth, atol=0.03)


@pytest.mark.parametrize("latents", [1, 3])
def test_step_zero_is_the_pool_of_its_parents(parts, tokens, log_p, latents):
    cfg, params, report = fuse(parts, tokens, latents=latents)
    logits, _ = jax.jit(lambda p, t: models.forward(cfg, p, t))(params, tokens[:, :-1])
    got = np.asarray(jax.nn.log_softmax(logits), np.float64).reshape(-1, V)
    w = np.array(report["weights"])
    if latents == 1:
        z = np.einsum("k,knv->nv", w, log_p[0])
        want = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    else:
        w = np.maximum(w, 1e-6) / np.maximum(w, 1e-6).sum()
        want = np.logaddexp.reduce(log_p[0] + np.log(w)[:, None, None], axis=0)
    assert np.abs(got - want).max() <= (2e-5 if latents == 1 else 1e-5)


def test_hub_scale_is_the_stream_rms_at_the_sync_point(parts, tokens):
    cfg, params, _ = fuse(parts, tokens, connectors="hub")
    assert cfg.n_superblocks == 2
    name, sub, p = parts[1]
    x = models.embed_tokens(sub, p, tokens[:8])
    first = jax.tree.map(lambda a: a[0], p["layers"])
    x = models.block_apply(sub, first, x)
    want = float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))
    assert float(params["hub"][name]["sigma"][0]) == pytest.approx(want, rel=1e-4)


def test_count_of_joints_and_equal_weights_without_text(parts):
    cfg, params, report = fuse(parts, connectors="hub")
    np.testing.assert_allclose(params["pool"]["a"], 1 / 3, rtol=1e-6)
    assert report == {"fitted": False}
    stored = sum(a.size for n in ("pool", "hub", "gate") for a in jax.tree.leaves(params[n]))
    assert joints_count(cfg) == stored


@pytest.mark.parametrize(
    "depths, expected", [((6, 3, 3), 3), ((6, 4), 2), ((48, 24, 24), 8), ((48, 24, 24, 16), 8),
                         ((5, 3), 3), ((1, 4), 1)],
)  # fmt: skip
def test_superblocks(depths, expected):
    S = delve.choose_superblocks(list(depths))
    assert S == expected
    for depth in depths:
        bounds = delve.boundaries(depth, S)
        assert bounds[0] == 0 and bounds[-1] == depth
        assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False))


def test_a_parent_and_its_near_twin(parts, tokens):
    """What tells them apart is below float32's rounding, so that their Hessian is singular."""
    _, cfg, params = parts[2]
    r = np.random.default_rng(0)
    other = jax.tree.map(lambda a: a * (1 + 1e-6 * r.normal(size=a.shape).astype(a.dtype)), params)
    for third in ([], [parts[1][1:]]):
        group = [(cfg, params), (cfg, other), *third]
        pool, report = fit_weights([c for c, _ in group], [p for _, p in group], tokens)
        assert report["nll"] <= min(report["nll_parents"]) + 1e-6
        alone, _ = fit_weights([c for c, _ in group[1:]], [p for _, p in group[1:]], tokens)
        assert pool["a"].sum() == pytest.approx(alone["a"].sum(), abs=5e-3)


def test_bad_parents(parts):
    (n, c, _), other = parts[0], parts[1]
    odd = dataclasses.replace(other[1], vocab_size=V - 1, vocab_rows=V - 1)
    with pytest.raises(DelveError, match="different vocabularies"):
        joint_config([(n, c), ("r", odd)])
    with pytest.raises(DelveError, match="same name"):
        joint_config([(n, c), (n, c)])
    with pytest.raises(DelveError, match="latents"):
        joint_config([(n, c), ("r", other[1])], latents=3)


# ---- common vocabulary tables --------------------------------------------------------------------


def test_common_codes_at_full_rank_are_the_parents(parts, tokens):
    """Rank sum D loses nothing: the fused model is the pool of the parents, tied ones too."""
    width = sum(c.d_model for _, c, _ in parts)
    cfg, params, report = fuse(parts, tokens, codes=width)
    plain, own, _ = fuse(parts, tokens)
    assert cfg.codes == ("embed", "head") and not cfg.streams[0][1].tie_embeddings
    weights = np.asarray(own["pool"]["a"])
    np.testing.assert_allclose(np.asarray(params["pool"]["a"]), weights, atol=2e-3)
    params["pool"], same = own["pool"], jax.nn.log_softmax
    got = same(forward(cfg, params, tokens)[0])
    want = same(forward(plain, own, tokens)[0])
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_common_codes_of_twins_cost_the_rank_of_one(parts, tokens):
    """Parents that know the same words share all directions."""
    _, cfg, params = parts[2]
    twins = [("a", cfg, params), ("b", cfg, params)]
    whole, _, _ = fuse(twins, tokens)
    fused, small, _ = fuse(twins, tokens, codes=cfg.d_model)
    d = cfg.d_model  # two tables of V x d less, four factors of d x d more
    assert models.count(whole) - models.count(fused) == 2 * V * d - 4 * d * d
    small["pool"] = {"a": np.full(2, 0.5, np.float32)}
    got = jax.nn.log_softmax(forward(fused, small, tokens)[0])
    want = jax.nn.log_softmax(forward(cfg, params, tokens)[0])
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_common_codes_need_text_and_a_rank_that_is_one(parts, tokens):
    with pytest.raises(DelveError, match="--codes: name text"):
        fuse(parts, codes=4)
    odd = [(n, dataclasses.replace(c, storage="int8"), p) for n, c, p in parts]
    with pytest.raises(DelveError, match="--codes: m is stored as int8"):
        fuse(odd, tokens, codes=4)
    for rank in (0, 57):
        with pytest.raises(DelveError, match="must lie in 1 .. 56"):
            fuse(parts, tokens, codes=rank)


def test_common_codes_have_at_most_the_rank_of_a_small_vocabulary(randomised):
    small = [dataclasses.replace(PARENTS[n], vocab_size=20, vocab_rows=20) for n in "rx"]
    parents = [(c.family, c, randomised(c, 0)) for c in small]
    tokens = np.random.default_rng(0).integers(0, 20, (4, 16)).astype(np.int32)
    with pytest.raises(DelveError, match=r"--codes 40: must lie in 1 \.\. 20, "):
        codes.common(parents, tokens, 40)
    made = codes.common(parents, tokens, 20)
    for (_, cfg, own), (_, _, dense) in zip(made, parents, strict=True):
        assert cfg.rank("embed") == cfg.rank("head") == (20,)
        table = own["embed"]["v"] @ own["embed"]["u"]
        np.testing.assert_allclose(table, dense["embed"]["kernel"], atol=2e-4)


def test_common_codes_forget_the_sizes_of_the_tables_before(randomised, tokens):
    """What a factored table kept at half its parent's size says nothing about the codes."""
    parents = []
    for seed, (name, half) in enumerate((("r", 3), ("x", 6))):
        ranks = (("embed", (8,)), ("att/out" if name == "x" else "att/output", (4, 4)))
        nested = tuple((n, (half,) * len(r)) if n == "embed" else (n, (2, 1)) for n, r in ranks)
        cfg = dataclasses.replace(PARENTS[name], ranks=ranks, nested=nested)
        parents.append((name, cfg, randomised(cfg, seed)))
    cfg, _, _ = fuse(parents, tokens, codes=5)
    assert from_json(to_json(cfg)) == cfg
    assert [sub.nested for _, sub in cfg.streams] == [c.nested[1:] for _, c, _ in parents]
    (_, one), (_, other) = elastic.config_at(cfg, 0.5).streams
    assert one.rank("embed") == other.rank("embed") == one.rank("head") == other.rank("head")


def test_the_metric_of_the_tables_is_the_gradient_of_the_loss(parts, tokens):
    """Moments of one batch against a gradient by the looked-up rows, labels of the same draw."""
    _, cfg, params = parts[2]
    cfg, params = codes.untied(cfg, params)
    found = codes.measure(cfg, params, tokens[:1, :6], seed=3)
    f_nD = np.asarray(models.features(cfg, params, tokens[:1, :6])[0], np.float64)[0]
    np.testing.assert_allclose(found.gram_DD, f_nD.T @ f_nD / 6, rtol=1e-4, atol=1e-5)
    logits = forward(cfg, params, tokens[:1, :6])[0]
    p_nV = np.asarray(jax.nn.softmax(logits), np.float64)[0]
    np.testing.assert_allclose(found.predicted_V, p_nV.mean(0), atol=1e-6)
    label_n = jax.random.categorical(jax.random.key(3 * 2**16), logits[0], axis=-1)

    def nll(shift_nD):
        rows = params["embed"]["kernel"][tokens[0, :6]] + shift_nD
        inside = {**params, "embed": {"kernel": rows}}
        out = forward(cfg, inside, np.arange(6)[None])[0][0]
        return -jax.nn.log_softmax(out)[np.arange(6), label_n].sum()

    g_nD = np.asarray(jax.grad(nll)(np.zeros((6, cfg.d_model), np.float32)), np.float64)
    np.testing.assert_allclose(found.grad_DD, g_nD.T @ g_nD / 6, rtol=1e-3, atol=1e-5)
