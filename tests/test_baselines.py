"""The published baselines against explicit formulations of their definitions."""

import itertools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compiled import forward

from delve_jax import models
from delve_jax.compress import plan_for
from delve_jax.compress.baselines import (
    SHIFT,
    STRS_RATIOS,
    asvd,
    cholesky,
    modegpt,
    rank_at,
    strs,
    svd_llm,
)
from delve_jax.compress.factorize import factor, svd
from delve_jax.config import DelveError, MambaConfig, NeoxConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import rivals  # noqa: E402

SHAPES = [(48, 20), (20, 48), (32, 32)]


def activations(n_in, tokens=None, seed=0):
    """x [tokens, n_in]: correlated, channels of uneven energy, a mean."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(n_in, n_in)) * np.geomspace(3, 0.03, n_in)
    return rng.normal(size=(tokens or 8 * n_in, n_in)) @ mixing + 0.3 * rng.normal(size=n_in)


def problem(shape, seed=0, tokens=None):
    x = activations(shape[0], tokens, seed)
    return x, np.random.default_rng(seed + 1).normal(size=shape)


def loss(x, w, fit):
    """E||x W - x v u||^2."""
    return np.mean(np.sum((x @ (w - fit.v_IK @ fit.u_KO)) ** 2, axis=1))


def best_in(w_oi, scale, rank):
    """Published form, W [out, in]: truncate SVD(W S), then multiply by S^-1 from the right."""
    a, s, b = np.linalg.svd(w_oi @ scale)
    k = np.arange(rank)
    return (a[:, k] * s[k]) @ b[k] @ np.linalg.inv(scale)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_asvd_is_its_definition(shape, alpha):
    x, w = problem(shape)
    abs_i = np.array([np.mean([abs(v) for v in column]) for column in x.T])
    fit = asvd(w, 7, abs_i, alpha)
    theirs = best_in(w.T, np.diag(abs_i**alpha + SHIFT), 7).T
    np.testing.assert_allclose(fit.v_IK @ fit.u_KO, theirs, atol=1e-10)
    scaled = np.linalg.svd(w * (abs_i**alpha + SHIFT)[:, None], compute_uv=False)
    np.testing.assert_allclose(fit.spectrum, scaled**2, rtol=1e-9)


def test_asvd_without_alpha_is_plain_svd_and_dead_channels_are_finite():
    x, w = problem((48, 20))
    plain = svd(w, 5)
    fit = asvd(w, 5, np.abs(x).mean(0), alpha=0.0)
    np.testing.assert_allclose(fit.v_IK @ fit.u_KO, plain.v_IK @ plain.u_KO, atol=1e-10)
    x[:, ::3] = 0
    fit = asvd(w, 5, np.abs(x).mean(0))
    assert np.isfinite(fit.v_IK).all() and np.isfinite(loss(x, w, fit))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_llm_is_its_definition(shape):
    x, w = problem(shape)
    gram = sum(np.outer(row, row) for row in x)  # the authors' sum, not a mean
    fit = svd_llm(w, 6, gram / len(x), count=len(x))
    theirs = best_in(w.T, np.linalg.cholesky(gram), 6).T
    np.testing.assert_allclose(fit.v_IK @ fit.u_KO, theirs, atol=1e-8)
    # whitening makes the lost energy the tail of the spectrum, and it is the least possible
    np.testing.assert_allclose(loss(x, w, fit), fit.spectrum[6:].sum(), rtol=1e-9)
    np.testing.assert_allclose(loss(x, w, fit), loss(x, w, factor(w, 6, gram)), rtol=1e-9)
    same = svd_llm(w, 6, gram / len(x))  # without a shift the count is of no consequence
    np.testing.assert_allclose(same.v_IK @ same.u_KO, theirs, atol=1e-8)


def test_svd_llm_of_one_hot_inputs():
    w = np.random.default_rng(0).normal(size=(30, 12))
    p = np.random.default_rng(1).dirichlet(np.ones(30))
    full, fast = svd_llm(w, 4, np.diag(p)), svd_llm(w, 4, p)
    np.testing.assert_allclose(fast.v_IK @ fast.u_KO, full.v_IK @ full.u_KO, atol=1e-10)
    p[3] = 0  # a word that was never seen
    shifted = svd_llm(w, 4, p, count=1000)
    explicit = best_in(w.T, np.diag(np.sqrt(p * 1000 + SHIFT)), 4).T
    np.testing.assert_allclose(shifted.v_IK @ shifted.u_KO, explicit, atol=1e-8)


@pytest.mark.parametrize("kind", ["few tokens", "dead channels", "indefinite"])
def test_singular_grams_are_shifted_as_published(kind):
    x, w = problem((24, 16), tokens=10 if kind == "few tokens" else None)
    if kind == "dead channels":
        x[:, :5] = 0
    gram = x.T @ x
    if kind == "indefinite":  # what float32 sums leave
        gram -= (np.linalg.eigvalsh(gram)[0] + 1e-3) * np.eye(24)
    low = np.linalg.eigvalsh(gram)[0]
    try:
        np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        expected = gram + (SHIFT - low) * np.eye(24)
        l_ii = cholesky(gram)
        np.testing.assert_allclose(l_ii @ l_ii.T, expected, atol=1e-9 * gram.trace())
    fit = svd_llm(w, 8, gram / len(x), count=len(x))
    assert np.isfinite(fit.v_IK).all()
    if kind != "indefinite":  # the shift costs next to nothing on the calibration data
        best = factor(w, 8, gram / len(x)).spectrum
        assert loss(x, w, fit) <= best[8:].sum() + 1e-6 * best.sum()


def test_a_second_failure_raises_the_shift(monkeypatch):
    x, _ = problem((24, 16), tokens=10)
    gram, tried, real = x.T @ x, [], np.linalg.cholesky

    def failing(a):  # as rounding makes it fail, at whichever size
        tried.append(a[0, 0] - gram[0, 0])
        if len(tried) < 4:
            raise np.linalg.LinAlgError
        return real(a)

    monkeypatch.setattr(np.linalg, "cholesky", failing)
    l_ii, low = cholesky(gram), np.linalg.eigvalsh(gram)[0]
    np.testing.assert_allclose(tried, [0, *(SHIFT * np.array([1, 10, 100]) - low)], atol=1e-12)
    np.testing.assert_allclose(l_ii @ l_ii.T, gram + tried[-1] * np.eye(24), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order_on_anisotropic_data(shape):
    """SVD-LLM <= ASVD <= plain in output error (the first is a theorem, the second is not)."""
    ratios = []
    for seed in range(5):
        x, w = problem(shape, seed)
        # uneven channels, weakly correlated: what ASVD's diagonal is made for
        x = x * 0.05 + np.random.default_rng(seed).normal(size=x.shape) * np.geomspace(
            5, 0.05, shape[0]
        )
        gram = x.T @ x / len(x)
        for rank in (2, 6, 10):
            white, scaled, plain = (
                loss(x, w, fit)
                for fit in (
                    svd_llm(w, rank, gram),
                    asvd(w, rank, np.abs(x).mean(0)),
                    svd(w, rank),
                )
            )
            assert white <= scaled * (1 + 1e-12) and white <= plain * (1 + 1e-12)
            ratios.append(scaled / plain)
    assert max(ratios) < 1


def test_biases_pass_through():
    x, w = problem((20, 12))
    bias = np.arange(12.0)
    gram = x.T @ x / len(x)
    for fit in (asvd(w, 3, np.abs(x).mean(0), bias_O=bias), svd_llm(w, 3, gram, bias)):
        np.testing.assert_array_equal(fit.bias_O, bias)


# ---- STRS ----------------------------------------------------------------------------------------


def search(losses, shapes, budget):
    """The definition, by trying every threshold: the least harmful pairs until the budget holds."""
    pairs = sorted(((row[r], m, r) for m, row in losses.items() for r in row), key=lambda p: p[0])
    for n in range(len(pairs) + 1):
        out = dict.fromkeys(losses, 1.0)
        for _, name, ratio in pairs[:n]:
            out[name] = min(out[name], ratio)
        cost = 0
        for name, ratio in out.items():
            i, o = shapes[name]
            cost += i * o if ratio == 1 else int(i * o * ratio) // (i + o) * (i + o)
        if cost <= budget:
            return out, cost
    return out, cost


@pytest.mark.parametrize("seed", range(4))
def test_strs_is_the_shortest_list_that_fits(seed):
    rng = np.random.default_rng(seed)
    names = [f"layer{i}/{m}" for i, m in itertools.product(range(3), ("qkv", "up", "down"))]
    shapes = {n: tuple(int(v) for v in rng.integers(16, 64, 2)) for n in names}
    losses = {  # falling in the ratio, but for noise: maps differ in how much they are missed
        n: {r: 3 + rng.exponential() * (1 - r) ** 2 + 0.05 * rng.normal() for r in STRS_RATIOS}
        for n in names
    }
    total = sum(i * o for i, o in shapes.values())
    for keep in (1.0, 0.9, 0.7, 0.5, 0.3, 0.12):
        out = strs(losses, shapes, int(keep * total))
        expected, cost = search(losses, shapes, int(keep * total))
        assert out == expected
        assert cost <= keep * total
    assert strs(losses, shapes, total) == dict.fromkeys(names, 1.0)
    assert set(strs(losses, shapes, 0).values()) == {STRS_RATIOS[0]}  # all it can do


def test_strs_spares_the_sensitive_map():
    shapes = {"calm": (64, 64), "touchy": (64, 64)}
    losses = {"calm": {0.2: 3.01, 0.5: 3.005}, "touchy": {0.2: 9.0, 0.5: 5.0}}
    assert strs(losses, shapes, int(0.62 * 2 * 64 * 64)) == {"calm": 0.2, "touchy": 1.0}
    assert rank_at(64, 64, 0.5) == 16


# ---- MoDeGPT -------------------------------------------------------------------------------------


def hidden(neurons=40, tokens=400, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(tokens, 12)) @ rng.normal(size=(12, neurons))
    return np.maximum(z + 0.1 * rng.normal(size=z.shape), 0) ** 2


@pytest.mark.parametrize("keep", [1, 13, 39, 40])
def test_modegpt_is_algorithm_one(keep):
    h, w = hidden(), np.random.default_rng(1).normal(size=(40, 16))
    gram, ridge = h.T @ h / len(h), 0.5
    scores = np.diag(gram @ np.linalg.inv(gram + ridge * np.eye(40)))
    chosen = sorted(sorted(range(40), key=lambda i: -scores[i])[:keep])
    select = np.eye(40)[:, chosen]
    theirs = np.linalg.pinv(select.T @ gram @ select) @ select.T @ gram @ w
    got = modegpt(gram, w, keep, ridge)
    assert got.kept_k.tolist() == chosen
    np.testing.assert_allclose(got.down_kO, theirs, atol=1e-7 * np.abs(theirs).max())
    # the repair is the least-squares fit of the old output from the neurons kept
    fitted = np.linalg.lstsq(h[:, chosen], h @ w, rcond=None)[0]
    np.testing.assert_allclose(h[:, chosen] @ got.down_kO, h[:, chosen] @ fitted, atol=1e-6)
    if keep == 40:
        np.testing.assert_allclose(got.down_kO, w, atol=1e-7)


def test_modegpt_with_dead_and_twin_neurons():
    h = hidden()
    h[:, 5] = 0
    h[:, 7] = 2 * h[:, 6]
    w = np.random.default_rng(1).normal(size=(40, 16))
    gram = h.T @ h / len(h)
    got = modegpt(gram, w, 39, floor=1e-12)
    assert 5 not in got.kept_k and np.isfinite(got.down_kO).all()
    np.testing.assert_allclose(h[:, got.kept_k] @ got.down_kO, h @ w, atol=1e-6)
    assert not modegpt(np.zeros((40, 40)), w, 10).down_kO.any()  # nothing acts, nothing is kept


# ---- as the study runs them ----------------------------------------------------------------------

SMALL = {"vocab_size": 61, "vocab_rows": 61, "d_model": 24, "n_layers": 2}
NEOX = NeoxConfig(**SMALL, n_heads=4, d_ffn=96)
TOKENS = (np.random.default_rng(0).beta(0.4, 2.0, (12, 16)) * 61).astype(np.int32)


@pytest.mark.parametrize("rival", rivals.RIVALS)
def test_rivals_meet_the_counted_budget(rival, randomised, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "SHARES", (0.1, 0.5))
    params, budget = randomised(NEOX, 0), int(0.4 * models.count(NEOX))
    cfg, small, row = rivals.counted(rival, NEOX, params, TOKENS, 0.4, tmp_path)
    assert budget - 24 - 96 < row["parameters"] <= budget  # less than a rank short of it
    assert row["bytes"] == 4 * row["parameters"]
    shapes = jax.tree.map(lambda a: a.shape, models.abstract_params(cfg))
    assert jax.tree.map(lambda a: a.shape, small) == shapes
    if rival == "modegpt":
        keep = int(plan_for(NEOX, keep=0.4)[0].rho * NEOX.d_ffn)
        assert cfg.neurons == (keep, keep) and "att/qkv" in dict(cfg.ranks)
        assert np.isfinite(forward(cfg, small, TOKENS)[0]).all()
        return
    spent = sum(a.size for a in jax.tree.leaves(small))  # multiplied out: by hand from the ranks
    for name in ("embed", "head", *models.FAMILY["neox"].FACTORABLE):
        kernel = np.asarray(models.leaf_of(small, name)["kernel"])
        for w in kernel if kernel.ndim == 3 else [kernel]:
            if (rank := np.linalg.matrix_rank(w, tol=1e-4)) < min(w.shape):
                spent += rank * sum(w.shape) - w.size
    assert spent == row["parameters"]


def test_modegpt_says_that_a_parent_has_no_mlp(tmp_path):
    cfg = MambaConfig(**SMALL, d_inner=48, dt_rank=2)
    with pytest.raises(DelveError, match="no MLP"):
        rivals.counted("modegpt", cfg, {}, TOKENS, 0.5, tmp_path)
