"""The loop: exact resume, zero-padded factors stay zero, objectives, sharded equals single."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from delve_jax import DelveError, checkpoint, data, models
from delve_jax.config import NeoxConfig
from delve_jax.metrics import read_metrics
from delve_jax.train import objective, optim
from delve_jax.train.loop import fit

V, T = 31, 16
CFG = NeoxConfig(
    vocab_size=V, vocab_rows=V, d_model=16, n_layers=2, n_heads=2, d_ffn=32,
    ranks=(("att/out", (3, 5)), ("mlp/up", (4, 2))),
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    p = models.init_params(CFG, jax.random.key(0))
    out, up = p["layers"]["att"]["out"], p["layers"]["mlp"]["up"]
    for leaf, ranks in ((out, (3, 5)), (up, (4, 2))):
        for layer, r in enumerate(ranks):
            leaf["v"] = leaf["v"].at[layer, :, r:].set(0)
            leaf["u"] = leaf["u"].at[layer, r:].set(0)
    return p


@pytest.fixture(scope="module")
def windows():
    # a text with structure: each id follows from the one before it
    ids = np.cumsum(np.random.default_rng(0).integers(0, 3, 4000)) % V
    return data.windows(ids.astype(np.int32), T + 1, T)


def run(params, windows, workdir, steps, total=12, **kw):
    return fit(
        params, objective.language_model(CFG), data.batches(windows, 4, 0),
        optim.adamw(optim.wsd(3e-3, total)), steps=steps, workdir=workdir, log_every=1,
        save_every=4, **kw,
    )  # fmt: skip


def test_interrupted_run_equals_uninterrupted(params, windows, tmp_path):
    whole = run(params, windows, tmp_path / "a", 12)

    class Killed(Exception):
        pass

    class Dies:
        """The same batches, but the process is lost at step 6 (after the save at step 4)."""

        def __init__(self, ds):
            self.ds = ds

        def __getitem__(self, i):
            if i == 6:
                raise Killed
            return self.ds[i]

    kw = dict(steps=12, workdir=tmp_path / "b", log_every=1, save_every=4)
    loss, opt = objective.language_model(CFG), optim.adamw(optim.wsd(3e-3, 12))
    ds = data.batches(windows, 4, 0)
    with pytest.raises(Killed):
        fit(params, loss, Dies(ds), opt, **kw)
    assert checkpoint.latest_step(tmp_path / "b" / "state") == 4
    resumed = fit(params, loss, ds, opt, **kw)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    lines = [read_metrics(tmp_path / d / "metrics.jsonl") for d in "ab"]
    losses = [[(m["step"], m["loss"]) for m in part] for part in lines]
    assert losses[0] == losses[1] and [s for s, _ in losses[0]] == list(range(1, 13))
    assert losses[0][-1][1] < losses[0][0][1]
    assert {"step", "loss", "tokens", "tokens_per_second"} <= set(lines[0][0])


def test_padding_of_unequal_ranks_stays_zero(params, windows, tmp_path):
    healed = run(params, windows, tmp_path, 6)
    for path, ranks in ((("att", "out"), (3, 5)), (("mlp", "up"), (4, 2))):
        leaf = healed["layers"][path[0]][path[1]]
        for layer, r in enumerate(ranks):
            assert not np.asarray(leaf["v"][layer, :, r:]).any()
            assert not np.asarray(leaf["u"][layer, r:]).any()
            assert np.asarray(leaf["v"][layer, :, :r]).any()


def test_nan_loss_stops_with_a_clear_line(params, windows, tmp_path):
    bad = {**params, "norm_f": {**params["norm_f"], "scale": jnp.full((16,), jnp.nan)}}
    with pytest.raises(DelveError, match="loss is nan at step 1"):
        run(bad, windows, tmp_path, 3)


def test_objectives_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 7)).astype(np.float32)
    y = rng.integers(0, 7, (2, 3))
    log_a = a - np.log(np.exp(a).sum(-1, keepdims=True))
    log_b = b - np.log(np.exp(b).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_a, y[..., None], -1).mean()
    assert float(objective.cross_entropy(jnp.array(a), jnp.array(y))) == pytest.approx(want, 1e-5)
    want = (np.exp(log_a) * (log_a - log_b)).sum(-1).mean()
    assert float(objective.kl(jnp.array(a), jnp.array(b))) == pytest.approx(want, 1e-4)
    assert abs(float(objective.kl(jnp.array(a), jnp.array(a) + 3.0))) < 1e-6


def test_healing_gradient_pulls_towards_the_teacher(params, windows):
    """With all weight on KL, the teacher itself is the optimum: its gradient vanishes."""
    frozen = {"weights": jnp.ones(1), "teachers": (params,)}
    grad = jax.grad(lambda p: objective.healing(CFG, (CFG,), 1.0)(p, frozen, windows[:4])[0])
    at_teacher = optax.tree.norm(grad(params))
    away = jax.tree.map(lambda a: a * 1.3, params)
    assert float(at_teacher) < 1e-5 < 1e-3 < float(optax.tree.norm(grad(away)))


def test_schedule_and_decay_mask(params):
    lr = optim.wsd(1e-2, 100)
    assert float(lr(50)) == pytest.approx(1e-2) and float(lr(100)) == pytest.approx(0, abs=1e-9)
    assert 0 < float(lr(0)) < float(lr(4)) <= 1e-2 and float(lr(85)) == pytest.approx(5e-3, 0.1)
    opt = optim.adamw(lambda _: 1.0, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = opt.update(zero, opt.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.5 * params["head"]["kernel"])
    assert not np.asarray(updates["norm_f"]["scale"]).any()


def test_sharded_step_equals_single_device(tmp_path):
    """8 virtual devices, data=4 x model=2, in a process of its own."""
    script = Path(__file__).with_name("multidevice_heal.py")
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False
    )
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads(out.stdout.splitlines()[-1])
    assert result["devices"] == 8 and result["sharded_leaves"] > 10
    assert result["max_loss_diff"] < 1e-4 and result["max_param_diff"] < 1e-3
