"""Delphi's recipe against published numbers, fits against known laws, the verbs and bad input.

Numbers: design notes, delphi.md sections 1, 2, 5, 6, 7. Published tables and other people's sweeps
are read from ../shared/data where they are there; the rest is made here from known laws.
"""

import csv
import dataclasses
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from delve_jax import cli, presets
from delve_jax.config import DelveError
from delve_jax.delphi import fit, forecast, plots, points
from delve_jax.delphi.recipe import DELPHI

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GRID = SHARED / "delphi" / "isoflop_points.csv"
BUDGETS = {3e18: 5, 9e18: 10, 1.8e19: 15, 3e19: 9, 9e19: 14, 1.8e20: 13, 3e20: 12}
published = pytest.mark.skipif(not GRID.exists(), reason=f"{GRID}: not there")


def rows_of(path):
    return list(csv.DictReader(x for x in path.read_text().splitlines() if x[0] != "#"))


# ---- recipe --------------------------------------------------------------------------------------


def test_shapes_and_flops():
    assert DELPHI.forward_flops(512) == 232_292_352
    assert DELPHI.params(512) == 156_508_160
    assert DELPHI.params(3840) == 9_714_698_752
    assert DELPHI.params(3840, qk_norm=False) == 9_714_689_280
    halves = dataclasses.replace(DELPHI)
    assert [halves.layers(H) for H in (512, 1280, 2048, 5376)] == [6, 13, 21, 51]
    cfg = presets.preset("delphi-2560")
    assert (cfg.n_layers, cfg.n_heads) == (DELPHI.layers(2560), DELPHI.heads(2560)) == (26, 20)


@pytest.mark.parametrize("C", BUDGETS)
def test_the_sweep_is_enumerated(C):
    found = DELPHI.candidates(C)
    assert len(found) == BUDGETS[C]
    step = 256 if C > 2e19 else 128
    assert all((c.hidden - 512) % step == 0 for c in found)
    for c in found:
        assert c.tokens == c.batch_size * c.steps * 4096 and 8 <= c.batch_size <= 8192
        assert c.flops == 3 * DELPHI.forward_flops(c.hidden) * c.tokens
        assert c.flops == pytest.approx(C, rel=2e-5) and c.tokens <= 250 * c.params
        assert c.batch_size & (c.batch_size - 1) == 0


def test_selection_and_rates_of_the_held_out_budgets():
    """Design notes, section 2; the batch was set by hand."""
    rows = (
        (1e21, 4.060e10, 2560, 512, 22057, 46_256_881_664, 7.42531e-3, 4.31351e-4),
        (1e22, 1.544e11, 3840, 1024, 38235, 160_369_213_440, 7.23180e-3, 3.27622e-4),
        (1e23, 5.871e11, 5376, 2048, 74884, 628_172_521_472, 6.79006e-3, 2.34104e-4),
    )
    for C, T, H, B, steps, tokens, lr, adam_lr in rows:
        assert DELPHI.optimal_tokens(C) == pytest.approx(T, rel=2e-4)
        c = DELPHI.config(C, batch=B)
        assert (c["hidden"], c["steps"], c["tokens"]) == (H, steps, tokens)
        assert c["lr"] == pytest.approx(lr, rel=1e-6)
        assert c["adam_lr"] == pytest.approx(adam_lr, rel=2e-6)
        assert c == DELPHI.config(C, hidden=H, batch=B)
    own = [DELPHI.config(C)[k] for C in (1e21, 1e22, 1e23) for k in ("batch_size", "steps")]
    assert own == [256, 44114, 1024, 38235, 4096, 37442]


def test_tokens_of_the_rates_are_whole_steps_only_above_the_sweep():
    T = DELPHI.target_tokens(3e20, 2304)
    inside, outside = DELPHI.config(3e20, hidden=2304), DELPHI.config(1e21)
    assert inside["lr"] == DELPHI.hyperparameters(128, T)["lr"]
    assert inside["tokens"] != T
    assert outside["lr"] == DELPHI.hyperparameters(256, outside["tokens"])["lr"]


def test_the_smallest_tokens_above_the_target_else_the_most():
    found = DELPHI.candidates(3e19)
    tokens = sorted(c.tokens for c in found)
    assert DELPHI.select(3e19, lambda C: tokens[3]).tokens == tokens[3]
    assert DELPHI.select(3e19, lambda C: tokens[3] + 1).tokens == tokens[4]
    assert DELPHI.select(3e19, lambda C: 2 * tokens[-1]).tokens == tokens[-1]
    assert DELPHI.select(3e19, lambda C: 0.0).tokens == tokens[0]


def test_batch_rules():
    """Up to a power of two, never raised to 8, halved while a capped rate is at its limit."""
    unit = 2**16 * 4096
    assert [DELPHI.batch(x * unit) for x in (0.5, 1, 1.01, 2, 2.1, 4.1)] == [1, 1, 2, 2, 4, 8]
    T = 400 * unit
    assert DELPHI.batch(T) == 512 < dataclasses.replace(DELPHI, max_lr=1.0).batch(2e3 * T)
    tight = dataclasses.replace(DELPHI, max_lr=DELPHI.hyperparameters(256, T)["lr"])
    assert tight.batch(T) == 128  # at 256 the rate is not below its limit
    slow = dataclasses.replace(DELPHI, beta2_min=DELPHI.beta2_0 ** (256 / 64))
    assert slow.batch(T) == 128
    assert dataclasses.replace(DELPHI, max_lr=0.0).batch(T) == 8
    rates = DELPHI.hyperparameters(10**9, 1e6)
    assert (rates["lr"], rates["adam_lr"], rates["beta2"]) == (0.01, 0.01, 0.9)
    assert DELPHI.hyperparameters(8, 1e9)["beta2"] == 0.9999


def test_limits_of_size():
    assert DELPHI.max_params(3e20) == DELPHI.max_params(1e18) == 12e9
    assert DELPHI.max_params(1.2e21) == pytest.approx(24e9)
    assert DELPHI.max_params(1e30) == 1e12
    assert "250" in DELPHI.outside(3e20, 1024) and DELPHI.outside(3e20, 1280) is None
    assert "parameters exceed" in DELPHI.outside(3e20, 4352)
    # QK-norms do not count: 250.001 tokens a parameter without them, 249.999 with
    least = DELPHI.params(512, qk_norm=False)
    assert least == 156_508_160 - 6 * 256
    C = DELPHI.train_flops(512, 1) * 250.001 * least
    assert "250" in DELPHI.outside(C, 512)
    assert DELPHI.target_tokens(C, 512) < 250 * DELPHI.params(512)


def test_schedule_truncates():
    assert DELPHI.schedule(37335) == {"warmup": 3733, "stable": 26135, "decay": 7467}
    assert DELPHI.schedule(37339) == {"warmup": 3733, "stable": 26139, "decay": 7467}


@published
def test_recipe_reproduces_the_logged_runs():
    runs = {(float(r["flops_budget"]), int(r["hidden"])): r for r in rows_of(GRID)}
    for C in BUDGETS:
        for c in DELPHI.candidates(C):
            row = runs.pop((C, c.hidden))
            for key in ("layers", "batch_size", "steps", "tokens", "params"):
                assert getattr(c, key) == int(row[key])
            assert c.flops == pytest.approx(1e9 * float(row["total_gflops"]), rel=1e-9)
    assert sorted(runs) == [(1.8e20, 768), (3e20, 768), (3e20, 1024)]
    for r in rows_of(SHARED / "delphi" / "recipe_hparams.csv"):
        c = DELPHI.config(float(r["flops"]), int(r["hidden"]), int(r["batch_size"]))
        assert c["steps"] == int(r["steps_recipe"])
        for key in ("layers", "heads", "tokens", "params"):
            assert c[key] == int(r[key])
        for mine, theirs in (("lr", "peak_lr"), ("adam_lr", "peak_adam_lr"), ("beta2", "beta2"),
                             ("epsilon", "epsilon")):  # fmt: skip
            assert c[mine] == pytest.approx(float(r[theirs]), rel=1e-12)


# ---- runs of a known law -------------------------------------------------------------------------

LAW = (1.8, 480.0, 2000.0, 0.35, 0.36)  # E, A, B, alpha, beta


def best_of(C, law=LAW):
    """(N, loss) of the optimum of L(N, D) on C = 6 N D."""
    E, A, B, a, b = law
    N = (a * A / (b * B)) ** (1 / (a + b)) * (C / 6) ** (b / (a + b))
    return N, fit.parametric_at(law, N, C / (6 * N))


def runs_of(budgets=7, runs=9, noise=0.0, decades=0.6, seed=0):
    rng = np.random.default_rng(seed)
    C = np.repeat(np.logspace(18.5, 20.5, budgets), runs)
    N = best_of(C)[0] * 10 ** np.tile(np.linspace(-decades, decades, runs), budgets)
    T = C / (6 * N)
    L = fit.parametric_at(LAW, N, T) * (1 + noise * rng.standard_normal(len(C)))
    return points.Points(C, N, T, L)


def write(path, runs, head="flops,params,tokens,loss"):
    lines = [",".join(map(repr, map(float, row))) for row in zip(runs.C, runs.N, runs.T, runs.L,
                                                                 strict=True)]  # fmt: skip
    path.write_text("\n".join(["# made from a law", head, *lines]) + "\n")
    return path


def test_descent_finds_the_minimum_that_lbfgs_finds():
    """Huber with far outliers, where reweighting is far from least squares."""
    runs = runs_of(noise=0.004, seed=3)
    runs = dataclasses.replace(runs, L=np.where(np.arange(63) % 9 == 4, 1.1 * runs.L, runs.L))
    E, A, B, alpha, beta = fit.parametric(runs)[0]
    n, d, y = np.log(runs.N), np.log(runs.T), np.log(runs.L)

    def cost(p):
        terms = np.logaddexp(p[0] - p[3] * n, p[1] - p[4] * d)
        return 1e4 * fit.huber(np.logaddexp(terms, p[2]) - y).sum()

    mine = np.array([np.log(A), np.log(B), np.log(E), alpha, beta])
    rng = np.random.default_rng(0)
    others = [
        minimize(cost, mine + s * rng.standard_normal(5), method="L-BFGS-B").fun
        for s in (0.0, 0.01, 0.05)
    ]
    assert cost(mine) <= min(others) * (1 + 1e-6)


def test_parametric_fits_recover_the_law():
    runs = runs_of()
    np.testing.assert_allclose(fit.parametric(runs)[0], LAW, rtol=1e-3)
    np.testing.assert_allclose(fit.variable_projection(runs), LAW, rtol=0.02)
    spoilt = np.where(np.arange(63) == 30, 2 * runs.L, runs.L)  # one bad run of 63
    robust = fit.parametric(dataclasses.replace(runs, L=spoilt))[0]
    np.testing.assert_allclose(robust, LAW, rtol=0.05)


def test_loss_law_recovers_E_and_survives_a_bad_budget():
    C = np.logspace(18, 21, 8)
    law = (1.7, 1.3, 0.1)
    L = fit.loss_at(law, C)
    np.testing.assert_allclose(fit.loss_laws(C, L)[0], law, rtol=1e-4)
    np.testing.assert_allclose(fit.loss_laws(C, 2 * L)[0], (3.4, 2.6, 0.1), rtol=1e-4)
    bad = L * np.where(np.arange(8) == 3, 1.05, 1)
    robust = fit.loss_at(fit.loss_laws(C, bad)[0], 1e23) / fit.loss_at(law, 1e23)
    squares = fit.loss_at(fit.loss_laws(C, bad, delta=1.0)[0], 1e23) / fit.loss_at(law, 1e23)
    assert abs(robust - 1) < 0.005 < abs(squares - 1)
    weight = np.ones((1, 8))
    weight[0, 3] = 0
    np.testing.assert_allclose(fit.loss_laws(C, bad, weight)[0], law, rtol=1e-4)
    no_floor = fit.loss_laws(C, 2.6 * (C / 1e20) ** -0.05)[0]
    assert fit.loss_at(no_floor, 1e23) == pytest.approx(2.6 * 1e3**-0.05, rel=1e-3)


def test_optima_of_exact_parabolas():
    C = np.repeat([1e18, 1e19, 1e20], 5)
    star = np.repeat([9.0, 9.5, 10.0], 5)
    x = star + np.tile([-0.4, -0.2, 0.1, 0.3, 0.6], 3)
    N = 1e26 / 10 ** (2 * x)  # ln N = ln 1e26 - 2 ln T
    L = np.repeat([3.5, 3.2, 3.0], 5) + 0.5 * (x - star) ** 2
    for row, s, low in zip(fit.optima(points.Points(C, N, 10**x, L)), (9, 9.5, 10),
                           (3.5, 3.2, 3.0), strict=True):  # fmt: skip
        assert row["loss"] == pytest.approx(low) and row["tokens"] == pytest.approx(10**s)
        assert row["params"] == pytest.approx(1e26 / 10 ** (2 * s))
        for key in ("a", "a_under", "a_over"):
            assert row[key] == pytest.approx(0.5, rel=1e-6)


def test_vertices_see_through_skew_and_batch():
    """Plain parabolas are off by what the joint fit takes out exactly."""
    rng = np.random.default_rng(1)
    C = np.repeat(np.logspace(18, 20, 5), 9)
    star = np.repeat(np.linspace(9, 10, 5), 9)
    d = np.tile(np.linspace(-0.7, 0.7, 9), 5)
    steps = rng.uniform(-0.5, 0.5, 45)
    best = np.repeat(np.linspace(3.6, 3.0, 5), 9)
    L = best + d * d * (0.4 + 0.08 * d) - 0.006 * (steps - steps.mean())
    runs = points.Points(C, C, 10 ** (star + d), L, steps)
    found = fit.vertices(runs)
    assert found.shared == pytest.approx({"cubic": 0.08, "steps": -0.006}, rel=1e-6)
    np.testing.assert_allclose(found.loss, best[::9], atol=1e-9)
    np.testing.assert_allclose(found.x, star[::9], atol=1e-9)
    np.testing.assert_allclose(found.at(np.stack([L, L + 1]))[1], [best[::9], best[::9] + 1])
    plain = fit.vertices(runs, window=None, cubic=False, steps=False)
    published = [r["loss"] for r in fit.optima(runs)]
    np.testing.assert_allclose(plain.loss, published, atol=1e-9)
    assert np.abs(plain.loss - best[::9]).max() > 1e-3
    # a batch that goes with the tokens says nothing of its own; few runs bear no shared terms
    tied = dataclasses.replace(runs, log2_steps=np.log2(runs.T))
    assert set(fit.vertices(tied).shared) == {"cubic"}
    few = runs.where(np.isin(np.arange(45) % 9, (1, 4, 7)))
    assert fit.vertices(few).shared == {}


SEEDS = np.array([-1.0, 0.0, 1.0])  # losses of three seeds about their mean


def valleys(places, seeds=None, skew=0.0, budgets=4):
    """(runs, log10 T*, best losses): runs at these decades from T*, once for each of `seeds`."""
    star, best = np.linspace(9, 10, budgets), np.linspace(3.6, 3.0, budgets)
    noise = np.zeros(1) if seeds is None else np.asarray(seeds)
    d = np.tile(np.repeat(places, len(noise)), budgets)
    C = np.repeat(np.logspace(18, 20, budgets), len(d) // budgets)
    x = np.repeat(star, len(d) // budgets) + d
    L = np.repeat(best, len(d) // budgets) + d * d * (0.4 + skew * d)
    return points.Points(C, C, 10**x, L + np.tile(noise, len(L) // len(noise))), star, best


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_seeds_of_three_widths_let_no_skew_in(seeds):
    """Three token counts a budget are a parabola, however often each was run."""
    places = (-1.2, 0.1, 0.7)
    runs, star, best = valleys(places, 3e-3 * np.array(((0,), (-1, 1), SEEDS)[seeds - 1]))
    found = fit.vertices(runs)
    assert found.shared == {}
    assert found.spare == 12 * (seeds - 1) == len(runs.C) - np.linalg.matrix_rank(found.design_NQ)
    np.testing.assert_allclose(found.loss, best, atol=1e-9)
    np.testing.assert_allclose(found.x, star, atol=1e-9)
    truth = fit.loss_at(fit.loss_laws(found.C, best)[0], 1e21)
    out = forecast.interval(runs, np.array([1e21]), 100)
    assert out["loss"][0] == pytest.approx(truth, rel=1e-6)
    assert out["low"][0] < truth < out["high"][0]


@pytest.mark.parametrize("places", [4, 5, 9])
def test_seeds_decide_nothing_that_one_seed_does_not(places):
    rng = np.random.default_rng(4)
    at = np.linspace(-0.7, 0.6, places)
    once, _, best = valleys(at, skew=0.08, budgets=5)
    steps = rng.uniform(-0.5, 0.5, len(once.C))
    once = dataclasses.replace(once, L=once.L - 0.006 * (steps - steps.mean()), log2_steps=steps)
    often = points.Points(
        *(np.repeat(v, 3) for v in (once.C, once.N, once.T)),
        np.repeat(once.L, 3) + 1e-3 * np.tile(SEEDS, len(once.C)), np.repeat(steps, 3),
    )  # fmt: skip
    one, many = fit.vertices(once), fit.vertices(often)
    assert list(one.shared) == list(many.shared)
    assert set(many.shared) == {4: set(), 5: {"cubic"}, 9: {"cubic", "steps"}}[places]
    np.testing.assert_allclose(many.loss, one.loss, atol=1e-9)
    if places == 9:
        np.testing.assert_allclose(many.loss, best, atol=1e-9)


def test_runs_side_by_side_determine_no_skew():
    """Six token counts, in three pairs that are 3 % apart: what bends them is noise."""
    pairs = np.repeat([-0.6, 0.0, 0.6], 2) + np.tile([0.0, 0.0125], 3)
    runs = valleys(pairs)[0]
    assert fit.vertices(runs).shared == {}
    assert set(fit.vertices(valleys(np.linspace(-0.6, 0.6, 6))[0]).shared) == {"cubic"}


@pytest.mark.parametrize("apart", [0.0, 1e-9])
def test_a_window_counts_places_not_runs(apart):
    """The five nearest runs lie at two token counts here, and no parabola goes through these."""
    at = (np.array([-0.15, 0.2, 1.3])[:, None] + apart * SEEDS).ravel()
    runs, star, best = valleys(at)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit.vertices(runs)
    assert len(found.fitted_N) == 36
    np.testing.assert_allclose(found.loss, best, atol=1e-7)
    np.testing.assert_allclose(found.x, star, atol=1e-7)


def test_a_window_keeps_far_runs_out():
    runs = runs_of(runs=13, decades=1.5)
    bent = np.where(np.tile(np.arange(13), 7) < 2, runs.L + 1.0, runs.L)  # far overtrained runs
    bent = dataclasses.replace(runs, L=bent)
    true = best_of(runs.budgets)[1]
    near = np.abs(fit.vertices(bent).loss / true - 1).max()
    far = np.abs(fit.vertices(bent, window=None).loss / true - 1).max()
    assert near < 0.002 < 10 * near < far


def test_extra_compute_pays_for_the_gap():
    rows = fit.optima(runs_of())
    law = fit.loss_laws([r["flops"] for r in rows], [r["loss"] for r in rows])[0]
    gap = fit.penalty_law(rows, 5.0)
    k = fit.extra_compute(law, gap, 1e21)
    paid = fit.loss_at(law, k * 1e21) + gap[0] * (k * 1e21) ** gap[1]
    assert k > 1.5 and paid == pytest.approx(fit.loss_at(law, 1e21), rel=1e-9)
    assert k < fit.extra_compute(law, fit.penalty_law(rows, 10.0), 1e21)
    assert fit.extra_compute(law, (0.5, 0.0), 1e21) == math.inf  # a gap that does not shrink


def test_penalties_are_those_of_the_budgets_at_hand(tmp_path, capsys):
    """A toy ladder, valleys that widen with compute: nothing is said of 1e21 unless asked for."""
    C, x = np.repeat([1e12, 1e13, 1e14], 7), np.tile(np.linspace(-0.5, 0.5, 7), 3)
    T = 0.05 * C**0.57 * 10**x
    width = 0.5 * (C / 1e12) ** 0.06
    runs = points.Points(C, C / 6 / T, T, 2 + 0.6 * (C / 1e13) ** -0.1 + width * x * x)
    path = write(tmp_path / "p.csv", runs)
    code, out, _ = delve(capsys, "fit", path)
    said = [line for line in out.splitlines() if "x T* tokens" in line]
    assert code == 0 and len(said) == 1 and said[0].startswith("2 x T* tokens at 1e+14: 0.060 nats")
    assert 1 < float(said[0].split("as ")[1].split()[0]) < 10
    r = forecast.forecast(path, [1e22, 1e13], samples=20)["fit"]["penalty"]["rows"]
    assert {p["flops"] for p in r} == {1e14, 1e22}
    assert all((p["extra_compute"] is None) == (p["flops"] == 1e22) for p in r if p["scale"] == 2)
    _, out, _ = delve(capsys, "forecast", path, "--flops", "1e22")
    assert "2 x T* tokens at 1e+22" in out and "which no compute makes up for" in out


# ---- forecasts -----------------------------------------------------------------------------------


def test_forecast_of_a_known_law():
    """300-fold ahead: the truth lies inside, near the point, and less noise is less width."""
    C = np.array([1e21, 1e23])
    true = best_of(C)[1]
    widths = []
    for noise in (1e-3, 3e-3):
        out = forecast.interval(runs_of(noise=noise), C, 150)
        assert (out["low"] < true).all() and (true < out["high"]).all()
        assert np.abs(out["loss"] / true - 1).max() < 0.02
        widths.append((out["high"] - out["low"]) / out["loss"])
        assert widths[-1][1] > widths[-1][0]
    assert (widths[0] < widths[1]).all()
    exact = forecast.interval(runs_of(), C, 50)
    assert np.abs(exact["loss"] / true - 1).max() < 1e-3


def test_no_false_certainty_where_nothing_is_left_to_judge_by():
    out = forecast.interval(runs_of(budgets=3, runs=3, decades=0.4), np.array([1e22]), 100)
    assert out["high"][0] / out["low"][0] - 1 > 0.005


def test_forecast_report(tmp_path):
    path = write(tmp_path / "p.csv", runs_of(budgets=4, runs=7, noise=1e-3))
    r = forecast.forecast(path, [1e22, 1e19, 1e28], samples=60)
    assert [f["flops"] for f in r["forecasts"]] == [1e22, 1e19, 1e28]
    assert r["forecasts"][0]["config"]["hidden"] and set(r["forecasts"][2]["config"]) == {
        "params", "tokens"
    }  # fmt: skip
    rows = r["fit"]["validation"]["rows"]
    assert [(x["budgets"], x["covered"]) for x in rows] == [(3, True)]
    assert r["fit"]["validation"]["largest_error"] == pytest.approx(abs(rows[0]["error"]))
    low, high = r["fit"]["loss_law"]["E_interval"]
    assert low < r["fit"]["loss_law"]["E"] < high
    assert r == json.loads(json.dumps(r))
    again = forecast.forecast(path, [1e22], samples=60)
    assert again["forecasts"][0] == r["forecasts"][0]  # seeded


def test_pictures_come_from_json_alone(tmp_path):
    path = write(tmp_path / "p.csv", runs_of(budgets=4, runs=7, noise=1e-3))
    runs = points.read(path)
    r = forecast.forecast(runs, [1e22], samples=40)
    r["runs"] = [dict(zip(("flops", "params", "tokens", "loss"), row, strict=True))
                 for row in np.stack([runs.C, runs.N, runs.T, runs.L], 1).tolist()]  # fmt: skip
    r = json.loads(json.dumps(r))
    for name in ("isoflop", "loss_law"):
        plots.draw(name, r, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def parallel_valleys(fall=1 / 30):
    """Nine runs of equal parabolas, which no L(N, D) of believable exponents has."""
    C, k = np.repeat([1e18, 1e19, 1e20], 3), np.tile([-1.0, 0.0, 1.0], 3)
    N = 2e8 * (C / 1e18) ** 0.5 * 2**k
    return points.Points(C, N, C / (6 * N), 3 + 0.1 * k * k - np.log10(C) * fall)


def test_exponents_that_the_runs_do_not_determine(tmp_path, capsys):
    """The report says so, in numbers that JSON has, and nothing overflows aloud."""
    path = write(tmp_path / "p.csv", parallel_valleys())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, out, err = delve(capsys, "fit", path, "--json")
        assert code == 0 and err == ""
        r = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for p in r["parametric"].values():
            assert list(p) == ["failed"] and "between 0.02 and 2" in p["failed"]
        code, out, err = delve(capsys, "fit", path)
        assert code == 0 and err == ""
        assert "L(N, D) (huber): none, the runs determine no" in out and "e+206" not in out
        # exponents of 1.9 and 1.5, which redrawn runs take to infinite and to absurd B
        for fall in (0.1, 0.12):
            p = forecast.forecast(parallel_valleys(fall), [1e21], samples=20)["fit"]["parametric"]
            assert fit.determined([p["huber"][k] for k in forecast.SURFACE])
            assert all(p["huber"][f"{k}_interval"] is None for k in forecast.SURFACE)
    p = forecast.forecast(runs_of(noise=1e-3), [1e21], samples=20)["fit"]["parametric"]["huber"]
    for k in forecast.SURFACE:
        assert p[f"{k}_interval"][0] < p[k] < p[f"{k}_interval"][1]


@published
def test_published_optima_and_laws():
    runs = fit.checked(points.read(GRID))
    assert len(runs.C) == 81 and runs.excluded == () and runs.log2_steps is not None
    rows = fit.optima(runs)
    names = {"T_star": "tokens", "P_star": "params", "loss_star": "loss"}
    names |= {k: k for k in ("a", "b", "c", "a_under", "a_over")}
    for mine, theirs in zip(rows, rows_of(SHARED / "delphi" / "optima_fit.csv"), strict=True):
        for a, b in names.items():
            assert mine[b] == pytest.approx(float(theirs[a]), rel=1e-9)
    C = [r["flops"] for r in rows]
    T = fit.power_law(C, [r["tokens"] for r in rows])
    assert T == pytest.approx((0.04758, 0.5684), rel=1e-3)
    assert fit.power_law(C, [r["params"] for r in rows]) == pytest.approx((13.41, 0.4026), rel=1e-3)
    E, _, alpha = law = fit.loss_laws(C, [r["loss"] for r in rows])[0]
    assert 1.67 < E < 1.71 and 0.099 < alpha < 0.102
    for scale, (low, high) in {10: (5.9, 6.4), 5: (2.5, 2.7), 2: (1.15, 1.25)}.items():
        gap = fit.penalty_law(rows, scale)
        assert gap[1] == pytest.approx(-0.136, abs=1e-3)
        assert low < fit.extra_compute(law, gap, 1e23) < high
    minima = rows_of(SHARED / "delphi" / "c4en_bpb_minima.csv")
    bpb = fit.power_law(*np.array([[float(r["flops"]), float(r["opt_tokens"])] for r in minima]).T)
    assert bpb[1] == pytest.approx(0.5813, abs=1e-4)
    for law in (T, bpb):
        widths = [DELPHI.select(c, lambda x, p=law: p[0] * x ** p[1]).hidden
                  for c in (1e21, 1e22, 1e23)]  # fmt: skip
        assert widths == [2560, 3840, 5376]


@published
def test_leaving_the_two_largest_budgets_out():
    """Against the published vertices, and against what parabolas alone would have said."""
    runs = points.read(GRID)
    budgets = runs.budgets
    five = runs.where(runs.C <= budgets[4])
    out = forecast.interval(five, budgets[5:], 100)
    loss = np.array([r["loss"] for r in fit.optima(runs)])[5:]
    assert np.abs(out["loss"] / loss - 1).max() < 0.001
    assert (out["low"] < loss).all() and (loss < out["high"]).all()
    parabolas = [r["loss"] for r in fit.optima(five)]
    old = fit.loss_at(fit.loss_laws(budgets[:5], parabolas)[0], budgets[5:])
    assert np.abs(old / loss - 1).max() > 0.003


@published
def test_the_pre_registered_forecast():
    """What experiments/delphi.py recorded before any held-out loss was known here."""
    out = forecast.interval(points.read(GRID), np.array([1e21, 1e22, 1e23]), 200)
    np.testing.assert_allclose(out["loss"], [2.7492, 2.5338, 2.3639], atol=2e-4)
    width = (out["high"] - out["low"]) / out["loss"]
    assert (width < [0.03, 0.06, 0.10]).all()


def test_chinchillas_points():
    path = SHARED / "scaling" / "chinchilla_svg_extracted_data.csv"
    if not path.exists():
        pytest.skip(f"{path}: not there")
    runs = points.read(path)
    assert len(runs.C) == 245
    ratio = runs.T / runs.N
    runs = runs.where(ratio > np.sort(ratio)[4])
    E, A, B, alpha, beta = fit.parametric(runs)[0]
    assert (E, alpha, beta) == pytest.approx((1.8172, 0.3478, 0.3658), abs=0.01)
    assert (A, B) == pytest.approx((482.0, 2085.4), rel=0.1)


# ---- point files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    ["flops_budget,params,tokens,loss", "Training FLOP,Model Size,tokens,loss",
     "FLOPs, n_params ,tokens,Loss", "total_gflops,params,tokens,loss"],
)  # fmt: skip
def test_headings(head, tmp_path):
    runs = runs_of(budgets=3, runs=4)
    if head.startswith("total_gflops"):
        runs = dataclasses.replace(runs, C=runs.C / 1e9)
    path = write(tmp_path / "p.csv", runs, head)
    read = points.read(path)
    np.testing.assert_allclose(read.C, runs_of(budgets=3, runs=4).C)
    np.testing.assert_allclose(read.T, runs.T)
    assert read.log2_steps is None and len(read.budgets) == 3


def test_tokens_and_steps_are_worked_out(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("flops,params,loss,batch_size\n6e18,1e8,3.5,8\n6e18,2e8,3.4,16\n")
    runs = points.read(path)
    np.testing.assert_allclose(runs.T, [1e10, 5e9])
    assert runs.log2_steps[0] - runs.log2_steps[1] == pytest.approx(2)
    path.write_text("flops,params,tokens,loss,steps\n6e18,1e8,,3.5,100\n6e18,2e8,7e9,3.4,\n")
    runs = points.read(path)
    np.testing.assert_allclose(runs.T, [1e10, 7e9])
    assert runs.log2_steps is None


def test_budgets_are_grouped():
    flops = np.array([1.0e18, 3.01e18, 0.99e18, 2.99e18, 3.0e18])
    np.testing.assert_allclose(points.grouped(flops), [0.995e18, 3e18, 0.995e18, 3e18, 3e18])
    chain = points.grouped(np.logspace(18, 19, 200))
    assert len(np.unique(chain)) > 8


def test_what_is_left_out_is_listed(tmp_path):
    runs = runs_of(budgets=4, runs=5)
    path = write(tmp_path / "p.csv", runs)
    lines = path.read_text().splitlines()
    extra = ["3e18,1e8,1e9,nan", "3e18,1e8,1e9,", "0,1e8,1e9,3", lines[5], "1e17,1e8,1e9,4.0"]
    up = [f"7e20,1e9,{t:g},{loss}" for t, loss in ((1e10, 3.0), (2e10, 3.1), (4e10, 3.0))]
    path.write_text("\n".join([*lines, *extra, *up]) + "\n")
    read = fit.checked(points.read(path))
    said = [(e.get("line") or e["flops"], e["reason"]) for e in read.excluded]
    assert [x[0] for x in said] == [23, 24, 25, 26, 1e17, 7e20]
    assert "loss" in said[0][1] and "flops" in said[2][1] and "same run" in said[3][1]
    assert "1 runs" in said[4][1] and "downward" in said[5][1]
    np.testing.assert_allclose(read.L, runs.L)
    twice = valleys((-0.3, 0.3), SEEDS)[0]
    with pytest.raises(DelveError, match="6 runs of 2 token counts; a parabola needs 3"):
        fit.checked(twice)


BAD = {
    "empty": ("", "empty"),
    "comment": ("# nothing\n", "empty"),
    "no loss": ("flops,params\n1e18,1e8\n", "no column for loss"),
    "no params": ("flops,loss\n1e18,3\n", "no column for params"),
    "word": ("flops,params,loss\n1e18,1e8,low\n", "line 2, column loss: 'low'"),
    "all nan": ("flops,params,loss\n1e18,1e8,nan\n", "no row has positive numbers"),
    "one budget": (
        "flops,params,loss\n1e18,1e8,3.1\n1e18,2e8,3.0\n1e18,4e8,3.1\n",
        "1 budgets have an optimum",
    ),
    "twice": ("flops,params,loss,Loss\n1e18,1e8,3,4\n", "two columns are called loss"),
    "quote": ('flops,params,loss\n"1e18,1e8,3\n', "CSV"),
    "bytes": (b"\x80\x81\xff", "CSV"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_point_files(kind, tmp_path, capsys):
    content, said = BAD[kind]
    path = tmp_path / "p.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for argv in (("fit", path), ("forecast", path, "--flops", "1e22")):
        code, out, err = delve(capsys, *argv)
        assert code == 2 and out == "" and said in err and str(path) in err
        assert err.count("\n") == 1 and "Traceback" not in err


def test_losses_that_do_not_fall():
    runs = runs_of(budgets=3, runs=5)
    for rise in (0.0, 0.1):
        L = np.tile(runs.L[:5], 3) + rise * np.repeat([0, 1, 2], 5)
        with pytest.raises(DelveError, match="is not below that at"):
            forecast.usable(dataclasses.replace(runs, L=L))


# ---- the verbs -----------------------------------------------------------------------------------


def delve(capsys, *argv):
    capsys.readouterr()
    try:
        code = cli.main(["delphi", *map(str, argv)])
    except SystemExit as err:
        code = err.code
    return code, *capsys.readouterr()


CANDIDATE = ["hidden", "layers", "heads", "batch_size", "steps", "tokens", "params", "flops"]
RATES = ["lr", "adam_lr", "beta1", "beta2", "epsilon", "max_grad_norm", "z_loss", "warmup", "decay"]


def test_the_contract(capsys, tmp_path):
    code, out, err = delve(capsys, "candidates", "--flops", "3e18", "--json")
    rows = json.loads(out)["candidates"]
    assert code == 0 and err == "" and len(rows) == 5 and list(rows[0]) == CANDIDATE
    assert rows[0]["tokens"] == 4_304_928_768 and rows[0]["flops"] == 3_000_006_086_133_547_008
    code, out, _ = delve(capsys, "recipe", "--flops", "1e21", "--batch", 512, "--json")
    r = json.loads(out)
    assert code == 0 and list(r) == CANDIDATE + RATES
    constants = {"beta1": 0.9, "max_grad_norm": 0.1, "z_loss": 1e-7, "warmup": 0.1, "decay": 0.2}
    assert {k: r[k] for k in constants} == constants and r["steps"] == 22057
    path = write(tmp_path / "p.csv", runs_of(budgets=3, runs=5, noise=1e-3))
    code, out, _ = delve(capsys, "forecast", path, "--flops", "1e22", "1e21", "--json")
    r = json.loads(out)
    assert code == 0 and list(r) == ["fit", "forecasts"]
    assert [f["flops"] for f in r["forecasts"]] == [1e22, 1e21]
    for f in r["forecasts"]:
        assert list(f) == ["flops", "loss", "interval", "config"]
        assert f["interval"][0] < f["loss"] < f["interval"][1]
        assert list(f["config"]) == CANDIDATE + RATES
    code, out, _ = delve(capsys, "fit", path, "--json")
    found = json.loads(out)
    mine, ahead = (f["penalty"].pop("rows") for f in (found, r["fit"]))
    assert code == 0 and found == r["fit"]  # but for the budgets that were forecast
    assert [p for p in ahead if p["flops"] < 1e21] == mine and len(ahead) == 3 * len(mine)


def test_for_people(capsys, tmp_path):
    code, out, _ = delve(capsys, "candidates", "--flops", "3e18")
    assert code == 0 and len(out.splitlines()) == 6 and "4,304,928,768" in out
    code, out, _ = delve(capsys, "recipe", "--flops", "3e20", "--hidden", 768)
    assert code == 0 and "no candidate of the sweep" in out and "delve train delphi-768" in out
    path = write(tmp_path / "p.csv", runs_of(budgets=3, runs=5, noise=1e-3))
    code, out, _ = delve(capsys, "forecast", path, "--flops", "1e22")
    assert code == 0 and "T* =" in out and "95 % interval" in out and "without a held-out" in out
    for action in ("candidates", "recipe", "fit", "forecast", "sweep", "downstream"):
        code, out, _ = delve(capsys, action, "--help")
        assert code == 0 and "example: delve delphi" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("candidates", "--flops", "0"), "--flops 0"),
        (("candidates", "--flops", "inf"), "--flops inf"),
        (("candidates", "--flops", "1e15"), "smallest with one is about 7.5e+17"),
        (("recipe", "--flops=-1e20"), "--flops -1e+20"),
        (("recipe", "--flops", "1e21", "--hidden", "1000"), "--hidden 1000"),
        (("recipe", "--flops", "1e21", "--hidden", "-128"), "--hidden -128"),
        (("recipe", "--flops", "3e18", "--hidden", "4096"), "give --batch"),
        (("recipe", "--flops", "1e21", "--batch", "4"), "--batch 4"),
        (("recipe", "--flops", "1e21", "--batch", "16384"), "--batch 16384"),
        (("recipe", "--flops", "1e13", "--hidden", "512", "--batch", "64"), "less than one step"),
        (("recipe", "--flops", "much"), "--flops"),
        (("recipe",), "--flops"),
        ((), "ACTION"),
        (("forecast", "/nowhere.csv", "--flops", "1e22"), "/nowhere.csv"),
        (("forecast", "/nowhere.csv"), "--flops"),
        (("forecast", "/nowhere.csv", "--flops", "nan"), "--flops nan"),
    ],
)
def test_refusals_are_one_line(argv, said, capsys):
    code, out, err = delve(capsys, *argv)
    assert code == 2 and out == "" and said in err
    assert err.startswith("error:") and err.count("\n") == 1


def test_numbers_only():
    """No JAX behind these verbs; and no parameter reaches infinity on the way."""
    code = (
        "import sys; from delve_jax import cli; cli.main(['delphi', 'recipe', '--flops', '1e21']);"
        "import delve_jax.delphi.forecast, delve_jax.delphi.downstream, delve_jax.delphi.plots;"
        "assert not {'jax', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
    assert math.isfinite(DELPHI.select(1e25).flops)
