"""Two-step forecasts: sigmoids and laws that are known, intervals, the verb, real evaluations.

Gadre's runs and Pythia's evaluations are read from ../shared/data where they are there.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from delve_jax import cli
from delve_jax.delphi import downstream, fit, plots, points

GADRE = Path(__file__).resolve().parents[2] / "shared/data/scaling/gadre_small_lt500M.csv"
SIGMOID = (0.6, -1.7, 2.6, 0.25)  # a, k, x0, b: accuracy falls as the soft metric (nats) grows


def pool_of(law=SIGMOID, n=40, noise=0.0, low=1.5, high=5.0, seed=0):
    x = np.linspace(low, high, n)
    rng = np.random.default_rng(seed)
    return x, downstream.sigmoid_at(law, x) + noise * rng.standard_normal(n)


@pytest.mark.parametrize("sign", [1, -1])
def test_sigmoid_is_recovered_in_either_direction(sign):
    """Bits per byte fall, log-probabilities rise."""
    x, y = pool_of()
    a, k, x0, b = SIGMOID
    want = (a, sign * k, sign * x0, b)
    np.testing.assert_allclose(downstream.sigmoids(sign * x, y)[0], want, rtol=1e-2)
    np.testing.assert_allclose(downstream.sigmoids(sign * x, y, b)[0], want, rtol=1e-3)
    again = downstream.sigmoids(sign * x, y, b, first=want)[0]
    np.testing.assert_allclose(again, want, rtol=1e-3)


def test_floor_and_ceiling_hold():
    x, y = pool_of((0.75, -2.0, 3.0, 0.25), noise=0.02)
    a, k, _, b = downstream.sigmoids(x, y, 0.25, 1.0)[0]
    assert (a, b) == pytest.approx((0.75, 0.25)) and k == pytest.approx(-2, rel=0.2)
    a, _, _, b = downstream.sigmoids(x, y, ceiling=1.0)[0]
    assert a + b == pytest.approx(1.0)
    for law in downstream.sigmoids(x, 1.2 * y):
        assert law[0] + law[3] <= 1 + 1e-9


def test_a_bad_model_does_not_move_the_sigmoid():
    x, y = pool_of()
    y[20] -= 0.3
    np.testing.assert_allclose(downstream.sigmoids(x, y, 0.25)[0], SIGMOID, rtol=0.05)


def test_weights_are_repetitions():
    x, y = pool_of(noise=0.01)
    weight = np.ones((2, 40))
    weight[1, ::2] = 2
    got = downstream.sigmoids(x, y, 0.25, weight_SN=weight)
    rows = np.repeat(np.arange(40), weight[1].astype(int))
    at = np.linspace(1.5, 5, 9)
    for law, mine in ((got[0], np.arange(40)), (got[1], rows)):
        # the same rows in other units of x: the same curve
        alone = downstream.sigmoids(x[mine], y[mine], 0.25)[0]
        np.testing.assert_allclose(
            downstream.sigmoid_at(law, at), downstream.sigmoid_at(alone, at), atol=1e-4
        )


def test_the_form_is_the_one_that_looks_ahead():
    """The pool's furthest quarter tells a sigmoid of soft from one of log soft."""
    x, y = pool_of((0.75, -2.0, 2.2, 0.25), low=1.8)
    assert not downstream.choose_form(x, y, 0.25).log
    x, _ = pool_of(low=1.8)
    y = downstream.sigmoid_at((0.75, -4.0, np.log(2.2), 0.25), np.log(x))
    form = downstream.choose_form(x, y, 0.25)
    assert form == downstream.Form(log=True, ceiling=1.0)
    assert downstream.choose_form(-x, y, 0.25) == form
    assert downstream.choose_form(x[:6], y[:6], 0.25) == downstream.FORMS[0]
    # the quarter of the best models decides, whatever the others look like
    best = x <= np.quantile(x, 0.25)
    plain = downstream.sigmoids(x[~best], y[~best], 0.25, 1.0)[0]
    mixed = np.where(best, downstream.sigmoid_at(plain, x), y)
    assert downstream.choose_form(x, mixed, 0.25) == downstream.Form(log=False, ceiling=1.0)


def test_draws_keep_three_groups():
    groups = np.repeat([1.0, 2.0, 3.0, 4.0], 2)
    weight = downstream.redrawn(np.random.default_rng(0), 500, groups)
    assert (weight.sum(axis=1) == 8).all()
    kinds = (weight.reshape(500, 4, 2).sum(axis=2) > 0).sum(axis=1)
    assert kinds.min() == 3 and kinds.max() == 4


@pytest.mark.parametrize("sign", [1, -1])
def test_both_steps_of_known_laws(sign):
    """Forecasts near the truth, truth inside, and width that grows with the noise."""
    C = np.logspace(18.5, 20.5, 7)
    law = (0.3, 1.9, 0.13)
    ahead = np.array([1e21, 1e22])
    true_soft = fit.loss_at(law, ahead)
    true = downstream.sigmoid_at(SIGMOID, true_soft)
    widths = []
    for noise in (0.001, 0.01):
        rng = np.random.default_rng(1)
        soft = fit.loss_at(law, C) * (1 + noise * rng.standard_normal(7))
        x, y = pool_of(noise=5 * noise, low=0.8, n=60)
        at, draws, _ = downstream.soft_draws(C, sign * soft, ahead, 200)
        np.testing.assert_allclose(at, sign * true_soft, rtol=10 * noise)
        out = downstream.compose(at, draws, sign * x, y, 0.25)
        assert (out["low"] <= true).all() and (true <= out["high"]).all()
        assert np.abs(out["hard"] - true).max() < 0.02 + 2 * noise
        widths.append(out["high"] - out["low"])
    assert (widths[0] < widths[1]).all() and widths[0].max() < 0.1


def files(tmp_path):
    C = np.logspace(18.5, 20.5, 7)
    soft = fit.loss_at((0.3, 1.9, 0.13), C)
    winners, pool = tmp_path / "w.csv", tmp_path / "p.csv"
    winners.write_text("# winners\nflops,soft\n" + "".join(f"{c!r},{s!r}\n" for c, s in
                       zip(C.tolist(), soft.tolist(), strict=True)) + "1e20,nan\n")  # fmt: skip
    x, y = pool_of(noise=0.005, low=0.8)
    pool.write_text("model,soft,hard\n" + "".join(f"m,{s!r},{h!r}\n" for s, h in
                    zip(x.tolist(), y.tolist(), strict=True)))  # fmt: skip
    return winners, pool


def delve(capsys, *argv):
    capsys.readouterr()
    code = cli.main(["delphi", "downstream", *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_verb(tmp_path, capsys):
    winners, pool = files(tmp_path)
    flags = ("--pool", pool, "--flops", "1e22", "1e21", "--floor", "0.25")
    code, out, err = delve(capsys, winners, *flags, "--json")
    r = json.loads(out)
    assert code == 0 and err == "" and [f["flops"] for f in r["forecasts"]] == [1e22, 1e21]
    for f in r["forecasts"]:
        assert f["interval"][0] <= f["hard"] <= f["interval"][1] and f["inside_pool"]
        true = downstream.sigmoid_at(SIGMOID, fit.loss_at((0.3, 1.9, 0.13), f["flops"]))
        assert f["hard"] == pytest.approx(true, abs=0.01)
    assert r["fit"]["hard"]["b"] == 0.25 and r["fit"]["excluded"][0]["line"] == 10
    code, out, _ = delve(capsys, winners, *flags)
    assert code == 0 and "left out" in out and "hard = b + a" in out
    # one file can be both
    both = tmp_path / "both.csv"
    both.write_text(pool.read_text().replace("model", "flops").replace("m,", "1e19,", 20)
                    .replace("m,", "1e20,", 10).replace("m,", "1e21,"))  # fmt: skip
    assert delve(capsys, both, "--flops", "1e22")[0] == 0


def test_bad_input(tmp_path, capsys):
    winners, pool = files(tmp_path)
    few, share, signs = (tmp_path / f"{n}.csv" for n in ("few", "share", "signs"))
    few.write_text("flops,soft\n1e18,3\n1e19,2\n1e20,1\n")
    share.write_text("soft,hard\n" + "1.5,55\n" * 9)
    signs.write_text("soft,hard\n" + "".join(f"-{i},0.{i}\n" for i in range(1, 9)))
    same = tmp_path / "same.csv"
    same.write_text("flops,soft\n" + "1e18,3\n1e18,2\n" * 3)
    for argv, said in (
        ((winners, "--flops", "1e22"), "no column for hard"),
        ((pool, "--flops", "1e22"), "no column for flops"),
        ((few, "--pool", pool, "--flops", "1e22"), "3 usable rows"),
        ((winners, "--pool", share, "--flops", "1e22"), "line 2, column hard"),
        ((winners, "--pool", signs, "--flops", "1e22"), "sign differs"),
        ((same, "--pool", pool, "--flops", "1e22"), "1 budgets"),
        ((winners, "--pool", pool, "--flops", "0"), "--flops 0"),
        ((winners, "--pool", pool, "--flops", "1e22", "--floor", "1"), "--floor 1"),
        ((tmp_path / "gone.csv", "--flops", "1e22"), "gone.csv: no such file"),
    ):
        code, out, err = delve(capsys, *argv)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1, err


def test_gadres_largest_models(tmp_path):
    """Fitted on models up to 154M parameters, the 411M ones lie within a few points."""
    if not GADRE.exists():
        pytest.skip(f"{GADRE}: not there")
    rows = [r for r in csv.DictReader(GADRE.open()) if r["dataset"] == "rw_original"]
    get = lambda part, *names: [np.array([float(r[n]) for r in part]) for n in names]  # noqa: E731
    small = [r for r in rows if float(r["params"]) < 4e8]
    large = [r for r in rows if float(r["params"]) > 4e8]
    assert (len(small), len(large)) == (24, 8)
    N, T, soft = get(small, "params", "tokens", "loss_c4_val")
    law = fit.parametric(points.Points(6 * N * T, N, T, soft))[0]
    N, T, true = get(large, "params", "tokens", "loss_c4_val")
    at = fit.parametric_at(law, N, T)
    assert np.mean(np.abs(at / true - 1)) < 0.04
    for task, floor in (("hellaswag", 0.25), ("piqa", 0.5)):
        (y,), (want,) = get(small, f"acc_{task}"), get(large, f"acc_{task}")
        out = downstream.compose(at, np.tile(at, (50, 1)), soft, y, floor)
        error = np.mean(np.abs(out["hard"] - want))
        stay = np.mean(np.abs(max(y) - want))  # as if nothing were gained
        assert error < 0.03 and error < stay / 2


def test_the_panel_is_drawn_from_json(tmp_path):
    x, y = pool_of()
    form = {"log": False, "ceiling": None}
    row = {"task": "piqa", "soft": 1.4, "soft_forecast": 1.3, "hard": 0.8, "forecast": 0.82,
           "interval": [0.7, 0.9]}  # fmt: skip
    study = {"study": "one", "tasks": {"piqa": {}}, "rows": [row], "curves": {
        "piqa": {"law": SIGMOID, "form": form, "pool": np.stack([x, y], 1).tolist()}}}  # fmt: skip
    plots.draw("downstream", json.loads(json.dumps({"studies": [study]})), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 3000
