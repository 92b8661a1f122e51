"""Compression: the closed form against its tail bound and its rivals, moments, whole parents."""

import dataclasses
import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import forward
from flax import linen as nn
from tokenizers import Tokenizer

import delve_jax
from delve_jax import arrays, checkpoint, cli, models, parents, road
from delve_jax.compress import (
    assembly,
    behind,
    compress,
    curves,
    device,
    factorize,
    moments,
    spectra,
    vocab,
)
from delve_jax.compress.factorize import anchored, factor, svd
from delve_jax.compress.moments import HEAD_TOKENS, Sweep
from delve_jax.compress.spectra import InMemory, Spectra, at, recipe
from delve_jax.config import DelveConfig, DelveError, MambaConfig, NeoxConfig, RwkvConfig
from delve_jax.models import elastic
from delve_jax.models.linear import Linear, materialise
from delve_jax.report import ranks_picture

MAMBA = MambaConfig(  # a tied and padded vocabulary
    vocab_size=61, vocab_rows=64, d_model=24, n_layers=2, tie_embeddings=True,
    d_inner=48, d_state=4, dt_rank=2,
)  # fmt: skip
RWKV = RwkvConfig(vocab_size=61, vocab_rows=61, d_model=24, n_layers=2, d_att=32, d_ffn=96)
NEOX = NeoxConfig(vocab_size=61, vocab_rows=64, d_model=24, n_layers=2, n_heads=4, d_ffn=96)
SMALL = {"mamba": MAMBA, "rwkv": RWKV, "neox": NEOX}


def trained_like(cfg, seed=0):
    """Random parameters large enough that activations and logits vary, biases included."""
    rng = np.random.default_rng(seed)
    params = models.init_params(cfg, jax.random.key(seed))
    return jax.tree.map(
        lambda a: np.asarray(a + 0.1 * rng.normal(size=a.shape), np.float32), params
    )


def windows(cfg, n=24, t=16, seed=1):
    skew = np.random.default_rng(seed).beta(0.4, 2.0, (n, t))
    return (skew * cfg.vocab_size).astype(np.int32)


# --- the closed form -----------------------------------------------------------------------------


def activations(case, n_in, rng):
    """X [tokens, n_in] with correlated channels of uneven energy and a mean."""
    tokens = n_in // 2 if case == "few tokens" else 8 * n_in
    mixing = rng.normal(size=(n_in, n_in)) * np.geomspace(1, 0.05, n_in)
    x = rng.normal(size=(tokens, n_in)) @ mixing + 0.5 * rng.normal(size=n_in)
    if case == "zero columns":
        x[:, ::4] = 0
    if case == "outlier":
        x[:, 3] *= 1e3
    if case == "duplicate":
        x = np.linalg.qr(rng.normal(size=x.shape))[0] * np.sqrt(tokens)
    return x


CASES = ["plain", "few tokens", "zero columns", "outlier", "duplicate"]
SHAPES = [(48, 20), (20, 48), (32, 32)]


def problem(case, shape):
    rng = np.random.default_rng(hash((CASES.index(case), *shape)) % 2**32)
    w = rng.normal(size=shape)
    if case == "duplicate":  # singular values in groups of equal ones
        a, s, b = np.linalg.svd(w, full_matrices=False)
        w = a * np.repeat(s[::4], 4)[: len(s)] @ b
    return activations(case, shape[0], rng), w


def gram_of(x, w, over):
    y = x if over == "inputs" else x @ w
    return y.T @ y / len(x)


def loss(x, w, a, shift=0.0):
    """E||x W - x A - shift||^2."""
    return np.mean(np.sum((x @ (w - a) - shift) ** 2, axis=1))


@pytest.mark.parametrize("over", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_equals_its_tail_bound_and_beats_plain_svd(case, shape, over):
    x, w = problem(case, shape)
    energy = loss(x, w, 0)
    for rank in (1, 5, min(shape) // 2, min(shape) - 1):
        fit = factor(w, rank, gram_of(x, w, over), over=over)
        assert fit.spectrum.shape == (min(shape),)
        tail, got = fit.spectrum[rank:].sum(), loss(x, w, fit.v_IK @ fit.u_KO)
        # float64 resolves a loss down to some 1e-16 of the energy, so a tail below 1e-6 of it
        # (zero where tokens are few) is held to that instead
        assert abs(got - tail) <= 1e-9 * max(tail, 1e-6 * energy)
        plain = svd(w, rank)
        assert got <= loss(x, w, plain.v_IK @ plain.u_KO) + 1e-12 * energy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_is_no_worse_than_asvd(case, shape):
    x, w = problem(case, shape)
    d = np.sqrt(np.abs(x).mean(0)) + 1e-9
    a, s, b = np.linalg.svd(d[:, None] * w, full_matrices=False)
    rank = min(shape) // 3
    asvd = (a[:, :rank] * s[:rank] @ b[:rank]) / d[:, None]
    fit = factor(w, rank, gram_of(x, w, "inputs"))
    assert loss(x, w, fit.v_IK @ fit.u_KO) <= loss(x, w, asvd) + 1e-12 * loss(x, w, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_cholesky_whitening(shape):
    x, w = problem("plain", shape)
    rank = min(shape) // 3
    chol = np.linalg.cholesky(gram_of(x, w, "inputs"))  # SVD-LLM(W): SVD(W L), then L^-1
    a, s, b = np.linalg.svd(chol.T @ w, full_matrices=False)
    theirs = np.linalg.solve(chol.T, a[:, :rank] * s[:rank] @ b[:rank])
    for over in ("inputs", "outputs"):
        fit = factor(w, rank, gram_of(x, w, over), over=over)
        ours = fit.v_IK @ fit.u_KO
        assert np.linalg.norm(ours - theirs) < 1e-8 * np.linalg.norm(theirs)


def test_plain_svd_is_the_truncated_svd():
    for shape in SHAPES:
        _, w = problem("plain", shape)
        a, s, b = np.linalg.svd(w, full_matrices=False)
        fit = svd(w, 7)
        np.testing.assert_allclose(fit.spectrum, s**2, rtol=1e-10)
        np.testing.assert_allclose(fit.v_IK @ fit.u_KO, a[:, :7] * s[:7] @ b[:7], atol=1e-11)


@pytest.mark.parametrize("over", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centred_with_bias_is_no_worse_than_uncentred(shape, over):
    x, w = problem("plain", shape)
    x = x + 3.0  # a mean worth centring
    bias = np.linspace(-1, 1, shape[1])
    for rank in (2, 6, 12):
        gram = gram_of(x, w, over)
        raw = factor(w, rank, gram, over=over, bias_O=bias)
        fit = factor(w, rank, gram, over=over, bias_O=bias, mean_I=x.mean(0))
        np.testing.assert_array_equal(raw.bias_O, bias)
        got = loss(x, w, fit.v_IK @ fit.u_KO, fit.bias_O - bias)
        assert abs(got - fit.spectrum[rank:].sum()) <= 1e-9 * got
        assert got < loss(x, w, raw.v_IK @ raw.u_KO)


def test_ranks_are_nested_and_factors_balanced():
    for shape in SHAPES:
        x, w = problem("plain", shape)
        gram = gram_of(x, w, "inputs")
        wide, narrow = factor(w, 12, gram), factor(w, 5, gram)
        np.testing.assert_allclose(
            wide.v_IK[:, :5] @ wide.u_KO[:5], narrow.v_IK @ narrow.u_KO, atol=1e-9
        )
        v_K, u_K = np.linalg.norm(wide.v_IK, axis=0), np.linalg.norm(wide.u_KO, axis=1)
        np.testing.assert_allclose(v_K, u_K, rtol=1e-9)


def test_directions_without_data_follow_plain_svd():
    """With 3 tokens the other ranks are spent on W itself, not on arbitrary directions."""
    rng = np.random.default_rng(0)
    for shape, over in [((40, 24), "outputs"), ((24, 40), "inputs")]:
        x, w = rng.normal(size=(3, shape[0])), rng.normal(size=shape)
        fit = factor(w, 12, gram_of(x, w, over), over=over)
        a = fit.v_IK @ fit.u_KO
        assert loss(x, w, a) < 1e-20 * loss(x, w, 0)
        plain = svd(w, 9)  # 9 free ranks: at least as close to W as 9 ranks of plain SVD
        assert np.linalg.norm(w - a) <= np.linalg.norm(w - plain.v_IK @ plain.u_KO) + 1e-12


# --- vocabulary tables ---------------------------------------------------------------------------


def table_problem():
    rng = np.random.default_rng(5)
    p = vocab.weights(vocab.frequencies((rng.beta(0.5, 3, 500) * 90).astype(int), 90))
    f = rng.normal(size=(200, 16)) @ rng.normal(size=(16, 16)) + 1.0
    return p, rng.normal(size=(90, 16)) + 0.3, f.T @ f / 200


def test_weights_of_words_are_smoothed():
    w = vocab.weights(vocab.frequencies(np.array([[0, 0, 2]]), 4))
    assert w.sum() == pytest.approx(1) and w.min() > 0 and w[0] > w[2] > w[1] == w[3]


def test_embedding_is_optimal_for_weighted_lookups():
    p, table, _ = table_problem()
    fit = vocab.factor_embed(table, p, 6)
    got = np.sum(p[:, None] * (table - fit.v_IK @ fit.u_KO) ** 2)
    best = np.linalg.svd(np.sqrt(p)[:, None] * table, compute_uv=False)[6:]
    assert got == pytest.approx(np.sum(best**2), rel=1e-9)


def test_head_is_optimal_in_the_unigram_fisher_metric():
    p, table, gram = table_problem()
    w = table.T
    fit = vocab.factor_head(w, gram, p, 6)
    fisher = np.diag(p) - np.outer(p, p)
    diff = w - fit.v_IK @ fit.u_KO
    got = np.trace(gram @ diff @ fisher @ diff.T)
    assert got == pytest.approx(fit.spectrum[6:].sum(), rel=1e-9)
    plain = svd(w, 6)
    diff = w - plain.v_IK @ plain.u_KO
    assert got < np.trace(gram @ diff @ fisher @ diff.T)


def test_full_rank_head_shifts_logits_by_a_constant_only():
    p, table, gram = table_problem()
    fit = vocab.factor_head(table.T, gram, p, 16)
    f = np.random.default_rng(1).normal(size=(7, 16))
    shift = f @ table.T - f @ fit.v_IK @ fit.u_KO
    assert np.ptp(shift, axis=1).max() < 1e-10 < np.abs(shift).max()


def test_tied_table_is_optimal_for_lookups_and_logits_together():
    p, table, gram = table_problem()
    rows = table.T @ (p[:, None] * table)
    metric = np.sum(rows * gram) / np.trace(rows) * np.eye(16) + gram
    fit = vocab.factor_tied(table, gram, p, 6)

    def joint(a):
        return np.sum(p[:, None] * ((table - a) @ metric) * (table - a))

    got, plain = joint(fit.v_IK @ fit.u_KO), svd(table, 6)
    assert got == pytest.approx(fit.spectrum[6:].sum(), rel=1e-9)
    assert got < joint(plain.v_IK @ plain.u_KO)
    full = vocab.factor_tied(table, gram, p, 16)
    np.testing.assert_allclose(full.v_IK @ full.u_KO, table, atol=1e-10)


def test_head_is_factored_within_one_array_of_its_length(monkeypatch):
    """A float64 copy of a head of 50,000 words is gigabytes: its factor is the only one."""
    monkeypatch.setattr(factorize, "ROWS", 64)
    monkeypatch.setattr(vocab, "ROWS", 64)
    rng = np.random.default_rng(3)
    n_in, n_out, rank = 48, 8192, 40
    w = rng.normal(size=(n_in, n_out)).astype(np.float32)
    p = vocab.weights(rng.random(n_out) ** 4)
    for tokens in (4 * n_in, rank // 2):  # enough, and fewer than there are ranks
        f = rng.normal(size=(tokens, n_in))
        gram = f.T @ f / tokens
        tracemalloc.start()
        fit = vocab.factor_head(w, gram, p, rank)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        factor_bytes = 8 * rank * n_out
        assert factor_bytes <= peak < 1.5 * factor_bytes  # pieces and what is n_in by n_in beside
        want = factor((w - (w @ p)[:, None]) * np.sqrt(p), rank, gram)
        dense = [fit.v_IK @ fit.u_KO, want.v_IK @ want.u_KO / np.sqrt(p)]
        np.testing.assert_allclose(*dense, atol=1e-8)


def test_embedding_is_factored_within_one_array_of_its_length(monkeypatch):
    monkeypatch.setattr(factorize, "ROWS", 64)
    monkeypatch.setattr(vocab, "ROWS", 64)
    rng = np.random.default_rng(4)
    table, rank = rng.normal(size=(8192, 48)).astype(np.float32), 40
    table[:, 20:] = 0  # beyond its own rank the rest is chosen by plain SVD
    g = rng.normal(size=(200, 48))
    tracemalloc.start()
    fit = vocab.factor_embed(table, vocab.weights(rng.random(8192)), rank, g.T @ g / 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 8 * rank * 8192 <= peak < 1.5 * 8 * rank * 8192
    np.testing.assert_allclose(fit.v_IK @ fit.u_KO, table, atol=1e-6)


# --- moments -------------------------------------------------------------------------------------


def inputs_of(cfg, params, tokens):
    """[{map path: explicit inputs X [tokens, I] in float64}] per layer, by intercepting Linear."""

    @jax.jit
    def run(layer, x):
        seen = {}

        def catch(call, args, kwargs, context):
            if isinstance(context.module, Linear) and context.method_name == "__call__":
                seen["/".join(context.module.path)] = args[0].reshape(-1, args[0].shape[-1])
            return call(*args, **kwargs)

        with nn.intercept_methods(catch):
            return models.block_apply(cfg, layer, x), seen

    x, layers = models.embed_tokens(cfg, params, tokens), []
    for i in range(cfg.n_layers):
        x, seen = run(jax.tree.map(lambda a, i=i: a[i], params["layers"]), x)
        layers.append({path: np.asarray(a, np.float64) for path, a in seen.items()})
    return layers, np.asarray(models.final_features(cfg, params, x), np.float64)


@pytest.mark.parametrize("family", SMALL)
def test_moments_are_those_of_the_explicit_activations(family):
    cfg = SMALL[family]
    params, tokens = trained_like(cfg), windows(cfg)
    layers, f = inputs_of(cfg, params, tokens)
    sweep = Sweep(InMemory(cfg, params), tokens, inputs=True)
    for layer, sown in sweep.forward():
        if layer == "head":
            f = f.reshape(-1, cfg.d_model)
            want = f.T @ f / len(f)
            np.testing.assert_allclose(sown.gram, want, atol=1e-5 * np.abs(want).max())
            np.testing.assert_allclose(sown.abs_D, np.abs(f).mean(0), rtol=1e-4)
            continue
        assert sown.keys() == layers[layer].keys() and len(sown) >= 4
        for path, m in sown.items():
            x = layers[layer][path]
            kernel = at(params["layers"], path)["kernel"][layer].astype(np.float64)
            want = gram_of(x, kernel, m.over)
            assert m.count == tokens.size and len(m.gram) == min(kernel.shape)
            np.testing.assert_allclose(m.gram, want, atol=1e-5 * np.abs(want).max(), err_msg=path)
            np.testing.assert_allclose(m.mean_I, x.mean(0), atol=1e-5 * np.abs(x).max())
            np.testing.assert_allclose(m.abs_I, np.abs(x).mean(0), atol=1e-5 * np.abs(x).max())
            want = x.T @ x / len(x)
            np.testing.assert_allclose(m.inputs, want, atol=1e-5 * np.abs(want).max())


def test_moments_do_not_depend_on_the_chunk_size(monkeypatch):
    cfg = dataclasses.replace(NEOX, d_model=128, d_ffn=256, n_layers=1)
    params, tokens = trained_like(cfg), windows(cfg, n=23)
    ((_, whole), _) = Sweep(InMemory(cfg, params), tokens).forward()
    monkeypatch.setattr(moments, "TOKENS", 5 * 16)  # 23 windows: four chunks of 5 and one of 3
    ((_, parts), _) = Sweep(InMemory(cfg, params), tokens).forward()
    for path, m in whole.items():
        apart = np.linalg.norm(m.gram - parts[path].gram)
        assert apart <= 1e-6 * np.linalg.norm(m.gram), path
        assert m.count == parts[path].count == tokens.size


@pytest.mark.parametrize("family", SMALL)
def test_gradients_are_those_of_the_sampled_loss(family, tmp_path):
    """E[g g^T] of every map and of the embedding, against jax.grad through the whole model."""
    cfg = SMALL[family]
    params, tokens = trained_like(cfg), windows(cfg)
    sweep = Sweep(InMemory(cfg, params), tokens, tmp_path, seed=3)
    sweep.boundaries()
    *_, mean_p_V = sweep.head()
    assert mean_p_V.sum() == pytest.approx(1, abs=1e-4)
    logits = np.asarray(forward(cfg, params, jnp.asarray(tokens))[0])
    flat = logits.reshape(-1, logits.shape[-1])
    labels = [
        jax.random.categorical(jax.random.fold_in(jax.random.key(3), i), flat[i : i + HEAD_TOKENS])
        for i in range(0, len(flat), HEAD_TOKENS)
    ]
    labels = np.concatenate(labels).reshape(tokens.shape)
    block = models.FAMILY[cfg.family].Block(cfg)
    bumps = [
        jax.eval_shape(
            lambda i=i: block.apply(
                {"params": jax.tree.map(lambda a: a[i], params["layers"])},
                jnp.zeros((*tokens.shape, cfg.d_model)), None,
                models.FAMILY[cfg.family].context(cfg, jnp.zeros((*tokens.shape, cfg.d_model)))[0],
                mutable=["perturbations"],
            )[1]["perturbations"]
        )
        for i in range(cfg.n_layers)
    ]  # fmt: skip
    bumps = jax.tree.map(lambda a: jnp.zeros(a.shape), bumps)

    def loss(bumps):
        x = models.embed_tokens(cfg, params, jnp.asarray(tokens))
        ctx, _ = models.FAMILY[cfg.family].context(cfg, x)
        for i, bump in enumerate(bumps):
            layer = {"params": jax.tree.map(lambda a, i=i: a[i], params["layers"])}
            x, _ = block.apply({**layer, "perturbations": bump}, x, None, ctx)
        out = jax.nn.log_softmax(
            models.head_logits(cfg, params, models.final_features(cfg, params, x))
        )
        return -jnp.take_along_axis(out, labels[..., None], -1).sum()

    want = jax.jit(jax.grad(loss))(bumps)
    for i in range(cfg.n_layers - 1, -1, -1):
        for path, m in sweep.layer(i).items():
            g = np.asarray(at(want[i], path)["out"], np.float64)
            g = g.reshape(-1, g.shape[-1])
            kernel = at(params["layers"], path)["kernel"][i].astype(np.float64)
            side = g @ kernel.T if m.over == "inputs" else g
            gram = side.T @ side / len(g)
            np.testing.assert_allclose(m.grad, gram, atol=2e-4 * np.abs(gram).max(), err_msg=path)
        sweep.drop(i)
    assert (
        np.all(np.isfinite(sweep.embed_grad())) and sweep.embed_grad().shape == (cfg.d_model,) * 2
    )


def test_two_sided_loss_is_its_tail_and_beats_the_one_sided(tmp_path):
    """C4, both routes: tr(G dW^T C dW) of the explicit matrices."""
    rng = np.random.default_rng(5)
    for n_in, n_out in ((24, 40), (40, 24), (32, 32)):
        w = rng.normal(size=(n_in, n_out))
        x = rng.normal(size=(500, n_in)) @ rng.normal(size=(n_in, n_in))
        g = rng.normal(size=(500, n_out)) * np.logspace(0, -2, n_out)
        c, metric = x.T @ x / 500, g.T @ g / 500
        over = "inputs" if n_out > n_in else "outputs"
        gram = c if over == "inputs" else w.T @ c @ w
        grad = w @ metric @ w.T if over == "inputs" else metric
        two = factor(w, 9, gram, over=over, grad=grad, damping=0.0)
        one = factor(w, 9, gram, over=over)

        def lost(fit, w=w, c=c, metric=metric):
            d = w - fit.v_IK @ fit.u_KO
            return np.trace(metric @ d.T @ c @ d)

        assert lost(two) == pytest.approx(two.spectrum[9:].sum(), rel=1e-8)
        assert lost(two) < 0.9 * lost(one)
        # G = I: the one-sided optimum
        plain = w @ w.T if over == "inputs" else np.eye(n_out)
        same = factor(w, 9, gram, over=over, grad=plain, damping=0.0)
        assert lost(same) == pytest.approx(lost(one), rel=1e-7)


def test_a_map_that_the_loss_does_not_feel_keeps_finite_factors():
    rng = np.random.default_rng(6)
    w, x = rng.normal(size=(24, 24)), rng.normal(size=(500, 24))
    gram = w.T @ x.T @ x @ w / 500
    for size in (0.0, 1e-40, 1e-25):  # 1e-40: float32 sums of squares are not even positive there
        grad = rng.normal(size=(24, 24)) * size
        fit = factor(w, 9, gram, over="outputs", grad=grad @ grad.T if size == 1e-25 else grad)
        assert np.isfinite(fit.v_IK).all() and np.isfinite(fit.u_KO).all() and fit.error < 1
        assert max(np.abs(fit.v_IK).max(), np.abs(fit.u_KO).max()) < 1e6


# --- ranks ---------------------------------------------------------------------------------------


def test_curve_goes_through_both_points_and_knows_nothing():
    a, b = curves.through((0.01, 0.02), (0.1, 0.3))
    assert a * 0.01**b == pytest.approx(0.02) and a * 0.1**b == pytest.approx(0.3)
    assert curves.through((1e-12, 1e-12), (1e-11, 1e-12)) == (1.0, 1.0)
    assert curves.through((0.0, 0.0), (0.1, 0.3)) == pytest.approx((3.0, 1.0))
    a, b = curves.through((0.01, 1e-6), (0.1, 0.3))  # steeper than two points may say
    assert b == 2.0 and 1e-6 < a * 0.01**b and a * 0.1**b < 0.3


def test_a_divergence_that_is_not_a_number_is_named_and_never_free():
    """As zero nats it would have the allocator delete the map."""
    nan = float("nan")
    for bad in (((0.01, nan), (0.1, 0.3)), ((0.01, 0.02), (0.1, nan)), ((nan, 0.02), (0.1, 0.3)),
                ((0.01, 0.02), (0.1, float("inf")))):  # fmt: skip
        with pytest.raises(DelveError, match="^map att/out: .*not a finite number; check"):
            curves.through(*bad, of="map att/out")
    assert np.isnan(curves._nats(np.array([0.0, 0.1]), 2, (nan, 1.0))).all()  # for `knapsack`


def test_sizes_that_all_diverge_to_nan_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "measured", lambda spectra, plans: [{"kl": float("nan")}] * 9)
    with pytest.raises(DelveError, match="--keep 0.5: .*not a finite number"):
        compress(NEOX, trained_like(NEOX), windows(NEOX), keep=0.5, progress=False, work=tmp_path)


def test_allocation_meets_the_budget_and_its_bound_and_is_repeatable(tmp_path):
    """C6: never over, gap small; a folder of factors serves several ratios with the same bits."""
    cfg = NEOX
    params, tokens = trained_like(cfg), windows(cfg)
    alone = compress(cfg, params, tokens, keep=0.5, progress=False)
    for keep in (0.7, 0.5):
        new, small, report = compress(
            cfg, params, tokens, keep=keep, progress=False, work=tmp_path / "work"
        )
        assert models.count(new) == report.plan.parameters <= keep * models.count(cfg)
        assert report.bound <= report.expected * (1 + 1e-9)
    assert new == alone[0]
    jax.tree.map(np.testing.assert_array_equal, small, alone[1])
    with pytest.raises(DelveError, match="allocated by activations"):
        compress(cfg, params, None, keep=0.5, method="svd", allocation=True, progress=False)
    with pytest.raises(DelveError, match="another parent, text, method"):
        compress(cfg, params, tokens, keep=0.5, method="asvd", progress=False,
                 work=tmp_path / "work")  # fmt: skip


def test_a_folder_of_factors_belongs_to_a_config_and_to_windows(tmp_path):
    """The same weights run otherwise with other heads, the same ids otherwise in other windows."""
    tokens = windows(NEOX)
    heads = dataclasses.replace(NEOX, n_heads=2 * NEOX.n_heads)
    made = InMemory(NEOX, params := trained_like(NEOX))

    def of(source, tokens_NT):
        Spectra(source, [], [], tokens_NT, tmp_path, recipe("svd"), {}, progress=False)

    of(made, tokens)
    for source, tokens_NT in ((InMemory(heads, params), tokens), (made, tokens.reshape(-1, 2))):
        with pytest.raises(DelveError, match="another parent, text, method.*remove it or name"):
            of(source, tokens_NT)
    of(InMemory(dataclasses.replace(NEOX, dtype="float16", hf_config="{}"), params), tokens)


def through_kills(run, left, more):
    """(what `run` gives in the end, how often it was killed); left[0]: steps until the next kill,
    more(kills so far) each time."""
    for stops in range(50):
        left[0] = more(stops)
        try:
            return run(), stops
        except KeyboardInterrupt:
            pass
    raise AssertionError("a run that is killed again and again never ends")


@pytest.mark.parametrize("method", ["delve", "svd-llm"])
def test_killed_anywhere_goes_on_to_the_same_bits(method, tmp_path, monkeypatch):
    """C9: stopped after every file in turn, the next run ends with the bits of an undisturbed."""
    cfg = NEOX
    params, tokens = trained_like(cfg), windows(cfg)
    want = compress(cfg, params, tokens, keep=0.5, method=method, progress=False)[1]
    real, left = spectra.write_arrays, [0]

    def dying(file, **arrays):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(file, **arrays)

    monkeypatch.setattr(spectra, "write_arrays", dying)
    work = tmp_path / "work"
    how = {"keep": 0.5, "method": method, "progress": False, "work": work}
    run = lambda: compress(cfg, params, tokens, **how)[1]  # noqa: E731
    got, stops = through_kills(run, left, lambda stops: 1)  # one more file each time
    assert stops >= cfg.n_layers
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not list(work.glob("*.npy")), "boundaries are gone in the end"


# --- from files, layer by layer ------------------------------------------------------------------


def stock_parent(folder, cfg, seed=0):
    """A stock directory of small random weights; its parameters in memory."""
    params = trained_like(cfg, seed)
    parents.export_stock(cfg, params, folder)
    return params


@pytest.mark.parametrize("family,kind", [("mamba", "ours"), ("neox", "stock")])
def test_from_files_as_from_memory_bit_for_bit(family, kind, tmp_path):
    """Stock files, and a checkpoint of ours; a layer is read a few times, whatever its maps."""
    params, tokens = stock_parent(tmp_path / "stock", SMALL[family]), windows(SMALL[family])
    cfg = parents.peek(tmp_path / "stock")[0]
    checkpoint.save(tmp_path / "ours", cfg, params)
    how = {"keep": 0.5, "progress": False, "check": True}
    want = compress(cfg, params, tokens, **how)
    source, seen = parents.open_layers(tmp_path / kind), []
    real = source.layer
    source.layer = lambda i: seen.append(i) or real(i)
    got = compress(source.cfg, source, tokens, **how, work=tmp_path / "work")
    assert got[0] == want[0] and got[2].to_json() == want[2].to_json()
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])
    # weights, forward, back, factors, curves, plans, assembly, twice pass 2, check
    assert max(map(seen.count, range(cfg.n_layers))) <= 10
    files = list((tmp_path / "work" / "stacks").iterdir())
    assert sum(f.stat().st_size for f in files) == sum(
        leaf.nbytes for leaf in jax.tree.leaves(got[1])
    )
    whole = compress(source.cfg, source, None, keep=1.0, work=tmp_path / "whole")
    alone = compress(cfg, params, None, keep=1.0)
    assert whole[0] == alone[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1], alone[1])


def test_what_is_measured_is_the_divergence_of_the_result():
    params, tokens = trained_like(MAMBA), windows(MAMBA)
    cfg, small, report = compress(MAMBA, params, tokens, keep=0.6, progress=False, check=True)
    logs = [
        jax.nn.log_softmax(forward(c, p, jnp.asarray(tokens))[0])
        for c, p in ((MAMBA, params), (cfg, small))
    ]
    kl = float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), -1)))
    nll = [-np.take_along_axis(np.asarray(x[:, :-1]), tokens[:, 1:, None], 2).mean() for x in logs]
    facts = report.measured
    assert facts["tokens"] == tokens.size and facts["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0
    assert [facts["nll_before"], facts["nll_after"]] == pytest.approx(nll, rel=1e-5)
    # and the model of half the budget inside is the one that the allocator named
    half = elastic.shrink(cfg, small, models.count(elastic.config_at(cfg, 0.5)))[0]
    assert (
        dict(half.ranks) == dict(cfg.nested) and dict(cfg.nested).keys() == report.plan.ranks.keys()
    )
    assert models.count(half) < models.count(cfg)


BYTES = dataclasses.replace(NEOX, vocab_size=256, vocab_rows=256, context_length=32)
TEXT = ["".join(chr(97 + (i * i + 3 * i) % 26) for i in range(800))]


def test_verb_killed_anywhere_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """C9 with files as the source: every write of the road may be the last, the report too."""
    stock_parent(tmp_path / "hf", BYTES)
    how = {"keep": 0.5, "documents": TEXT, "calibrate_tokens": 512}
    road.compress(tmp_path / "hf", tmp_path / "want", **how)
    left, stops = [0], 0

    def dying(real):
        def write(*args, **more):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*args, **more)

        return write

    for place, name in ((spectra, "write_arrays"), (Sweep, "_keep"), (assembly, "_filled"),
                        (arrays, "save"), (checkpoint, "_write_texts")):  # fmt: skip
        monkeypatch.setattr(place, name, dying(getattr(place, name)))
    while True:
        left[0] = 3 + 3 * stops  # assembly starts anew: each call must get further than the last
        try:
            road.compress(tmp_path / "hf", tmp_path / "got", **how)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not (tmp_path / "got").exists()
    assert stops >= 3
    for name in ("compress.json", "config.json"):
        got, want = (json.loads((tmp_path / d / name).read_text()) for d in ("got", "want"))
        assert got == want
    restored = [checkpoint.restore(tmp_path / d)[1] for d in ("got", "want")]
    jax.tree.map(np.testing.assert_array_equal, *restored)
    assert {p.name for p in (tmp_path / "got").iterdir()} == {
        "compress.json", "compress.png", "config.json", "lineage.json", "params", "run.json",
        "spectra.npz",
    }  # fmt: skip


def test_damaged_files_are_named(tmp_path, capsys):
    params = jax.tree.map(np.copy, trained_like(BYTES))
    params["layers"]["mlp"]["down"]["kernel"][1, 3, 2] = np.nan
    parents.export_stock(BYTES, params, tmp_path / "hf")
    (tmp_path / "text").write_text(TEXT[0])
    argv = ["compress", tmp_path / "hf", tmp_path / "small", "--keep", 0.5, "--calibrate",
            tmp_path / "text"]  # fmt: skip
    assert cli.main([*map(str, argv)]) == 2
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("error:"))
    assert str(tmp_path / "hf" / "model.safetensors") in line and "NaN or Inf" in line
    assert "gpt_neox.layers.1.mlp.dense_4h_to_h.weight" in line
    assert not (tmp_path / "small").exists()


def test_picture_of_every_kind_of_entry(tmp_path):
    """Dense, dropped and pruned entries, many layers; from the two files' contents alone."""
    L = 40
    facts = {
        "maps": {"att/out": {"shape": [24, 24], "ranks": [i % 12 for i in range(L)]},
                 "embed": {"shape": [61, 24], "ranks": [3]}},
        "dense": {"mlp/up": [24, 96]}, "neurons": [90 - i for i in range(L)], "neurons_before": 96,
        "ratio": 0.5, "parameters_before": 1000, "expected_kl": None,
        "measured": {"kl": 0.1, "nll_before": 1.0, "nll_after": 1.1},
    }  # fmt: skip
    arrays = {"att.out": np.geomspace(1, 1e-12, L * 24).reshape(L, 24), "embed": np.ones((1, 24))}
    ranks_picture(facts, arrays, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes()[:4] == b"\x89PNG"


# --- whole parents -------------------------------------------------------------------------------


@pytest.mark.parametrize("method,keep", [("delve", 0.9), ("delve", 0.4), ("svd", 0.4)])
@pytest.mark.parametrize("family", SMALL)
def test_compressed_parent_runs_and_equals_its_explicit_product(family, method, keep):
    cfg = SMALL[family]
    params, tokens = trained_like(cfg), windows(cfg)
    new, small, report = compress(cfg, params, tokens, keep=keep, method=method, progress=False)
    assert new.vocab_rows == cfg.vocab_size and (new.ranks or new.neurons)
    if method == "svd":
        assert "embed" in report.errors  # tables factored, one of them tied
    assert models.count(new) == report.plan.parameters <= keep * models.count(cfg)
    abstract = models.abstract_params(new)
    jax.tree.map(lambda a, b: (a.shape == b.shape) or pytest.fail(f"{a} {b}"), small, abstract)

    def dense(tree):
        if "v" in tree:
            rest = {k: a for k, a in tree.items() if k not in "uv"}
            return {"kernel": materialise(tree), **rest}
        return {k: dense(a) if isinstance(a, dict) else a for k, a in tree.items()}

    got, _ = forward(new, small, tokens)
    want, _ = forward(dataclasses.replace(new, ranks=()), dense(small), tokens)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()

    out = json.loads(json.dumps(report.to_json()))
    assert out["ratio"] <= keep and out["maps"].keys() == dict(new.ranks).keys()
    for name, ranks in new.ranks:
        leaf = small if name in ("embed", "head") else small["layers"]
        for part in name.split("/"):
            leaf = leaf[part]
        assert report.spectra[name].shape == (len(ranks), min(out["maps"][name]["shape"]))
        assert report.spectra[name].dtype == np.float64
        for layer, rank in enumerate(ranks if leaf["v"].ndim == 3 else ()):
            assert not np.any(leaf["v"][layer, :, rank:]) and not np.any(leaf["u"][layer, rank:])
            spectrum = report.spectra[name][layer]
            error = np.sqrt(spectrum[rank:].sum() / spectrum.sum())
            assert out["maps"][name]["error"][layer] == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("family", SMALL)
def test_every_map_loses_no_more_than_plain_svd(family):
    assert_beats_plain(SMALL[family], trained_like(SMALL[family]), windows(SMALL[family]), [0.5])


def assert_beats_plain(cfg, params, tokens, keeps):
    """Loss on explicit calibration activations: tail bound, and <= plain SVD's, for every map."""
    layers, _ = inputs_of(cfg, params, tokens)
    for keep in keeps:
        _check_maps(cfg, params, tokens, keep, layers)


def _check_maps(cfg, params, tokens, keep, layers):
    new, small, report = compress(  # pass 1 alone: the theorem is about the parent's own inputs
        cfg, params, tokens, keep=keep, metric=False, allocation=False, anchor=False, progress=False
    )
    _, plain, _ = compress(cfg, params, None, keep=keep, method="svd", progress=False)
    checked = 0
    for name, ranks in new.ranks:
        if name in ("embed", "head"):
            continue
        trees = [params["layers"], small["layers"], plain["layers"]]
        for part in name.split("/"):
            trees = [t[part] for t in trees]
        for layer, rank in enumerate(ranks):
            (dense, ours, theirs), x = [take(t, layer) for t in trees], layers[layer][name]
            shift = ours.get("bias", 0.0) - dense.get("bias", 0.0)
            energy = loss(x, dense["kernel"], 0)
            got = loss(x, dense["kernel"], ours["v"] @ ours["u"], shift)
            assert got <= loss(x, dense["kernel"], theirs["v"] @ theirs["u"]) + 1e-12 * energy
            tail = report.spectra[name][layer][rank:].sum()
            assert abs(got - tail) <= 1e-4 * tail + 1e-6 * energy, (name, layer)  # float32 store
            over = "inputs" if dense["kernel"].shape[1] > x.shape[1] else "outputs"
            exact = factor(dense["kernel"], rank, gram_of(x, dense["kernel"], over), over=over)
            got, tail = loss(x, dense["kernel"], exact.v_IK @ exact.u_KO), exact.spectrum[rank:]
            assert abs(got - tail.sum()) <= 1e-9 * max(tail.sum(), 1e-6 * energy), (name, layer)
            checked += 1
    assert checked >= cfg.n_layers * 2


PROXIES = sorted(p.parent for p in Path(delve_jax.__file__).parent.glob("proxies/*/config.json"))


@pytest.mark.skipif(not PROXIES, reason="no trained proxies in delve_jax/proxies yet")
@pytest.mark.parametrize("path", PROXIES, ids=lambda p: p.name)
def test_every_map_of_every_proxy_loses_no_more_than_plain_svd(path):
    from delve_jax import parents

    cfg, params, tokenizer = parents.load(str(path), dtype="float32")
    params = jax.tree.map(np.asarray, params)
    text = Path(json.__file__).with_name("decoder.py").read_text()
    ids = Tokenizer.from_str(tokenizer).encode(text).ids[: 16 * 128]
    tokens = np.array(ids[: len(ids) // 64 * 64], np.int32).reshape(-1, 64)
    assert_beats_plain(cfg, params, tokens, [0.5, 0.25])


def take(tree, layer):
    return {k: np.asarray(a[layer], np.float64) for k, a in tree.items()}


@pytest.mark.parametrize("family", SMALL)
def test_keep_one_returns_the_parent(family):
    cfg = SMALL[family]
    params, tokens = trained_like(cfg), windows(cfg, n=2)
    new, same, report = compress(cfg, params, tokens, keep=1.0, progress=False)
    assert new.ranks == () and report.plan.parameters == report.plan.total == models.count(new)
    want, _ = forward(cfg, params, tokens)
    got, _ = forward(new, same, tokens)
    np.testing.assert_array_equal(got, want)
    if cfg.vocab_rows == cfg.vocab_size:
        assert same is params


def test_more_budget_is_never_a_worse_map():
    params, tokens = trained_like(RWKV), windows(RWKV)
    errors = []
    for keep in (0.4, 0.6, 0.8):
        *_, report = compress(RWKV, params, tokens, keep=keep, progress=False)
        errors.append(report.errors)
    for name in errors[-1]:
        assert np.all(np.diff([e[name] for e in errors], axis=0) <= 0)


def test_bad_input_is_named():
    params, tokens = trained_like(NEOX), windows(NEOX)
    run = lambda cfg=NEOX, p=params, t=tokens, **k: compress(  # noqa: E731
        cfg, p, t, **{"keep": 0.5, "progress": False, **k}
    )
    with pytest.raises(DelveError, match="--method pca.*delve, svd"):
        run(method="pca")
    with pytest.raises(DelveError, match="id 61 is outside"):
        run(t=np.full((2, 8), 61))
    with pytest.raises(DelveError, match="id -1 is outside"):
        run(t=np.full((2, 8), -1))
    for wrong in (np.zeros((0, 8), int), np.zeros(5, int), np.zeros((2, 8))):
        with pytest.raises(DelveError, match="calibration tokens"):
            run(t=wrong)
    with pytest.raises(DelveError, match="needs calibration tokens"):
        run(t=None)
    broken = jax.tree.map(np.copy, params)
    broken["layers"]["mlp"]["down"]["kernel"][1, 0, 0] = np.nan
    with pytest.raises(DelveError, match=r"layer 1, map mlp/down"):
        run(p=broken)
    with pytest.raises(DelveError, match=r"layer 1, map mlp/down"):
        run(p=broken, method="svd")
    with pytest.raises(DelveError, match="already"):
        run(cfg=dataclasses.replace(NEOX, ranks=(("att/out", (1, 1)),)))
    with pytest.raises(DelveError, match="family 'delve'"):
        run(cfg=DelveConfig(streams=(("a", NEOX),), n_superblocks=1))


# --- what an accelerator does, made to do it here -------------------------------------------------


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU as if it were an accelerator with room, for matrices of any size."""
    monkeypatch.setattr(device, "on", lambda: True)
    monkeypatch.setattr(device, "takes", lambda n: True)
    monkeypatch.setattr(device, "room", lambda: 2**30)


def metric_of(case, w, over, rng):
    g = rng.normal(size=(4 * w.shape[1], w.shape[1])) * np.geomspace(1, 0.1, w.shape[1])
    if case == "few tokens":
        g = g[: w.shape[1] // 3]
    side = g if over == "outputs" else g @ w.T
    return side.T @ side / len(g)


@pytest.mark.parametrize("over", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("case,centred", [*((case, False) for case in CASES), ("plain", True)])
def test_accelerator_finds_the_same_factors(case, shape, over, centred, monkeypatch):
    """One factor in Cholesky's place of another: the same map, loss and bias, to rounding."""
    x, w = problem(case, shape)
    rng = np.random.default_rng(5)
    how = {"over": over, "grad": metric_of(case, w, over, rng), "floor": spectra.FLOOR}
    if centred:
        how |= {"mean_I": x.mean(0), "bias_O": rng.normal(size=shape[1])}
    rank = min(shape) // 2
    want = factor(w, rank, gram_of(x, w, over), **how)
    asked = []
    real = device.two_sided
    monkeypatch.setattr(device, "takes", lambda n: True)
    monkeypatch.setattr(device, "two_sided", lambda *a: asked.append(real(*a)) or asked[-1])
    got = factor(w, rank, gram_of(x, w, over), **how)
    assert asked[0] is not None
    np.testing.assert_allclose(got.spectrum, want.spectrum, atol=1e-10 * want.spectrum[0])
    # where few tokens leave directions free, what counts is the outputs on the tokens
    outputs = [x @ fit.v_IK @ fit.u_KO for fit in (got, want)]
    np.testing.assert_allclose(*outputs, atol=1e-6 * np.abs(outputs[1]).max())
    if case == "plain":
        dense = [fit.v_IK @ fit.u_KO for fit in (got, want)]
        np.testing.assert_allclose(*dense, atol=1e-8 * np.abs(w).max())
        np.testing.assert_allclose(
            np.linalg.norm(got.v_IK, axis=0), np.linalg.norm(got.u_KO, axis=1), rtol=1e-9
        )
    if centred:
        np.testing.assert_allclose(got.bias_O, want.bias_O, atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accelerator_finds_the_same_target_behind_a_prefix(shape, biased, monkeypatch):
    x, w = problem("plain", shape)
    rng = np.random.default_rng(6)
    z = x + 0.1 * rng.normal(size=x.shape)
    wide = shape[1] > shape[0]
    d = x - z if wide else x @ w - z @ w
    grad = metric_of("plain", w, "inputs" if wide else "outputs", rng)
    moments_of = {"gram_II": z.T @ z / len(z), "drift": z.T @ d / len(z), "grad": grad}
    if biased:
        bias_O = rng.normal(size=shape[1])
        moments_of |= {"mean_I": z.mean(0), "shift": d.mean(0), "bias_O": bias_O}
    want = anchored(w, **moments_of, ridge=1e-3, blend=0.5)
    monkeypatch.setattr(device, "takes", lambda n: True)
    got = anchored(w, **moments_of, ridge=1e-3, blend=0.5)
    assert isinstance(got.kernel_IO, jax.Array) and got.over == want.over
    for a, b in zip(got, want, strict=True):
        if isinstance(b, np.ndarray):
            np.testing.assert_allclose(np.asarray(a), b, rtol=1e-9, atol=1e-9 * np.abs(b).max())
    fits = [goal.factor(min(shape) // 2, z.mean(0)) for goal in (got, want)]
    np.testing.assert_allclose(*(f.v_IK @ f.u_KO for f in fits), atol=1e-8 * np.abs(w).max())


def test_what_is_not_finite_on_the_accelerator_is_done_on_the_host(monkeypatch):
    x, w = problem("plain", (20, 48))
    grad = metric_of("plain", w, "inputs", np.random.default_rng(5))
    want = factor(w, 9, gram_of(x, w, "inputs"), grad=grad)
    monkeypatch.setattr(device, "takes", lambda n: True)
    bad = lambda a: (jnp.full(len(a), jnp.nan), a)  # noqa: E731
    monkeypatch.setattr(device, "_eigh", bad)
    monkeypatch.setattr(device, "_two_sided", device._two_sided.__wrapped__)
    got = factor(w, 9, gram_of(x, w, "inputs"), grad=grad)
    np.testing.assert_array_equal(got.v_IK, want.v_IK)


@pytest.mark.parametrize("family", SMALL)
def test_accelerator_compresses_to_the_same_parent(family, tmp_path, request):
    """From files: sums, products, boundaries that are held, files that are written behind."""
    params, tokens = stock_parent(tmp_path / "stock", SMALL[family]), windows(SMALL[family])
    del params
    run = lambda: compress(  # noqa: E731
        SMALL[family], parents.open_layers(tmp_path / "stock"), tokens, keep=0.6, progress=False
    )
    cfg, params, report = run()
    want = forward(cfg, params, tokens[:2])[0]
    request.getfixturevalue("accelerator")
    asked = []
    real = device.two_sided
    request.getfixturevalue("monkeypatch").setattr(
        device, "two_sided", lambda *a: asked.append(real(*a)) or asked[-1]
    )
    again, params, got = run()
    assert asked and all(a is not None for a in asked)
    assert again == cfg and got.plan == report.plan
    assert abs(got.measured["kl"] - report.measured["kl"]) < 1e-5
    np.testing.assert_allclose(forward(cfg, params, tokens[:2])[0], want, atol=2e-3)


def test_accelerator_compiles_every_program_once(tmp_path, caplog, accelerator):
    """Whatever of its arguments is committed to a device, and at whatever rank a map is cut."""
    cfg = dataclasses.replace(MAMBA, n_layers=3, norm_eps=1.5e-5)  # programs of its own
    stock_parent(tmp_path / "stock", cfg)
    tokens = windows(cfg, n=16)
    jax.clear_caches()  # of the programs that other tests share
    jax.config.update("jax_log_compiles", True)  # on threads too, where `jax.log_compiles` is not
    try:
        source = parents.open_layers(tmp_path / "stock")
        with caplog.at_level("WARNING", logger="jax"):
            report = compress(source.cfg, source, tokens, keep=0.6, progress=False)[2]
    finally:
        jax.config.update("jax_log_compiles", False)
    assert report.blend and len(set(report.plan.ranks["in_proj"])) > 1  # what there is to compile
    compiled = [
        re.match(r"Compiling jit\((\w+)\) with .*? types (\(.*?\))\. ", record.getMessage())
        for record in caplog.records
    ]
    seen = Counter(match.groups() for match in compiled if match)
    names = Counter(name for name, _ in seen)
    assert names["step"] == names["back"] == names["log_p"] == 1
    assert names["_two_sided"] == 3 and names["sums"] == names["_anchored"] == 2
    assert not [name for name, count in seen.items() if count > 1]


@pytest.mark.parametrize("room", [2**30, 80_000], ids=["all is held", "two boundaries are held"])
def test_killed_accelerator_goes_on_to_the_same_bits(room, tmp_path, monkeypatch, accelerator):
    """Files that are written behind the work come in its order, each whole: C9 there too.

    What was held on the accelerator and has no file is made again.
    """
    monkeypatch.setattr(device, "room", lambda: room)
    cfg = MAMBA
    params, tokens = trained_like(cfg), windows(cfg)
    run = lambda **how: compress(cfg, params, tokens, keep=0.5, progress=False, **how)[1]  # noqa: E731
    want = run()
    left = [0]

    def dying(real):
        def work(*args, **named):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*args, **named)

        return work

    monkeypatch.setattr(behind, "_run", dying(behind._run))
    work = tmp_path / "work"
    got, stops = through_kills(lambda: run(work=work), left, lambda stops: 2 + 2 * stops)
    assert stops >= cfg.n_layers
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_nothing_is_written_after_a_failure(tmp_path, accelerator):
    def full():
        raise OSError("disk full")

    behind.do(full)
    behind.do((tmp_path / "later").touch)
    with pytest.raises(OSError, match="disk full"):
        behind.wait()
    assert not (tmp_path / "later").exists()
    behind.do((tmp_path / "anew").touch)
    behind.wait()
    assert (tmp_path / "anew").exists()
