"""The loop: exact resume, guard rails, accumulation, losses in chunks, sharded equals single."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from delve_jax import DelveError, arrays, checkpoint, data, models, parallel, parents
from delve_jax.config import NeoxConfig
from delve_jax.metrics import read_metrics
from delve_jax.models import Compute
from delve_jax.train import loop, objective, optim
from delve_jax.train.loop import MAX_IN_A_ROW, Saving, fit, init_state, make_step
from delve_jax.train.objective import Terms

V, T = 31, 16
CFG = NeoxConfig(
    vocab_size=V, vocab_rows=V, d_model=16, n_layers=2, n_heads=2, d_ffn=32,
    ranks=(("att/out", (3, 5)), ("mlp/up", (4, 2))),
)  # fmt: skip
LOSS = objective.language_model(CFG)


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


def run(params, dataset, workdir, steps=12, loss=LOSS, **kw):
    kw = {"saving": Saving(every=4)} | kw
    return fit(
        params, loss, dataset, optim.adamw(optim.wsd(3e-3, 12)), steps=steps, workdir=workdir,
        log_every=1, **kw,
    )  # fmt: skip


class Killed(Exception):
    pass


def dies_at(dataset, step):
    """The same batches, but the process is lost at one of them."""

    def one(i):
        if i == step:
            raise Killed
        return dataset[i]

    return grain.MapDataset.range(10**6).map(one)


def test_interrupted_run_equals_uninterrupted(params, windows, tmp_path):
    ds = data.batches(windows, 4, 0)
    whole = run(params, ds, tmp_path / "a")
    with pytest.raises(Exception, match="Killed|"):
        run(params, dies_at(ds, 9), tmp_path / "b")
    assert checkpoint.Steps(tmp_path / "b" / "state").numbers() == [4, 8]

    def never():
        raise AssertionError("a resumed run does not make its parameters anew")

    resumed = run((jax.eval_shape(lambda: params), never), ds, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    lines = [read_metrics(tmp_path / d / "metrics.jsonl") for d in "ab"]
    losses = [[(m["step"], m["loss"]) for m in part] for part in lines]
    assert losses[0] == losses[1] and [s for s, _ in losses[0]] == list(range(1, 13))
    assert losses[0][-1][1] < losses[0][0][1]
    assert {"step", "loss", "tokens", "tokens_per_second", "data_wait", "skipped"} <= set(
        lines[0][0]
    )


def test_deleted_and_damaged_states_are_passed_over(params, windows, tmp_path, capsys):
    ds = data.batches(windows, 4, 0)
    whole = run(params, ds, tmp_path / "a")
    work = tmp_path / "b"
    with pytest.raises(Exception, match="Killed|"):
        run(params, dies_at(ds, 11), work, saving=Saving(every=3, keep=3))
    states = checkpoint.Steps(work / "state")
    assert states.numbers() == [3, 6, 9]
    file = max(
        (p for p in states.path(9).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1  # one flipped bit, which zarr alone would read without complaint
    file.write_bytes(raw)
    for path in states.path(6).iterdir():  # a state that lost its checksums
        if path.name == arrays.SUMS:
            path.unlink()
    resumed = run(params, ds, work, saving=Saving(every=100))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    said = capsys.readouterr().err
    assert "00000009: damaged" in said and "other bytes" in said and "00000006: damaged" in said


def test_a_run_under_way_is_a_source(params, windows, tmp_path):
    """Its newest whole state, or the one named, can be evaluated, exported and healed from."""
    ds = data.batches(windows, 4, 0)
    checkpoint.describe_run(tmp_path, CFG, None)
    with pytest.raises(DelveError, match="saves them later"):
        parents.load(tmp_path)
    want = {n: run(params, ds, tmp_path / f"at{n}", n) for n in (4, 8)}
    with pytest.raises(Exception, match="Killed|"):
        run(params, dies_at(ds, 9), tmp_path)
    for src, n in ((tmp_path, 8), (tmp_path / "state" / "00000004", 4)):
        cfg, got, _ = parents.load(src)
        assert cfg == CFG
        jax.tree.map(np.testing.assert_array_equal, got, want[n])


def test_retention(params, windows, tmp_path):
    ds = data.batches(windows, 4, 0)
    run(params, ds, tmp_path / "s", saving=Saving(every=2, keep=2, keep_every=4))
    assert checkpoint.Steps(tmp_path / "s/state").numbers() == [4, 8, 10]
    run(params, ds, tmp_path / "t", saving=Saving(every=1000, minutes=0, keep=3))
    assert checkpoint.Steps(tmp_path / "t/state").numbers() == [9, 10, 11]


def test_the_clock_is_looked_at_on_every_step(params, windows, tmp_path):
    """Not only where a line is logged: here at the last step alone."""
    fit(
        params, LOSS, data.batches(windows, 4, 0), optim.adamw(optim.wsd(3e-3, 12)), steps=5,
        workdir=tmp_path, log_every=99, saving=Saving(every=1000, minutes=0, keep=9),
    )  # fmt: skip
    assert checkpoint.Steps(tmp_path / "state").numbers() == [1, 2, 3, 4]
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [5]


def test_processes_agree_on_the_step_of_the_next_state(monkeypatch):
    """Process 0 (here: of 10 s a step) names it where all log; the other's clock does not count."""
    now, said = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    due, other = loop._Due(1.0, 3), loop._Due(1.0, 3)
    for step in range(4, 17):
        now[0] += 10.0
        monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all",
                            lambda x: said.append(int(x)) or x)  # fmt: skip
        mine = due.at(step, agree=step in (5, 10))
        monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all", lambda _: said[-1])
        now[0] += 1000.0
        assert other.at(step, agree=step in (5, 10)) == mine
        now[0] -= 1000.0
        assert mine == (step in (9, 15)), step  # 60 s are over after 6 steps
        if mine:
            due.saved(step), other.saved(step)
    assert said == [4, 5]


def test_padding_of_unequal_ranks_stays_zero(params, windows, tmp_path):
    healed = run(params, data.batches(windows, 4, 0), tmp_path, 6)
    for path, ranks in ((("att", "out"), (3, 5)), (("mlp", "up"), (4, 2))):
        leaf = healed["layers"][path[0]][path[1]]
        for layer, r in enumerate(ranks):
            assert not np.asarray(leaf["v"][layer, :, r:]).any()
            assert not np.asarray(leaf["u"][layer, r:]).any()
            assert np.asarray(leaf["v"][layer, :, :r]).any()


def poisoned(bad):
    """The loss is NaN, or only its gradient is, where the first id of a batch is 1."""

    def loss(params, frozen, tokens, step):
        value, metrics = LOSS(params, frozen, tokens, step)
        scale = sum(jnp.sum(x) for x in jax.tree.leaves(params))
        term = jnp.where(tokens[0, 0] == 1, jnp.nan if bad == "loss" else 0.0, 0.0) * scale
        if bad == "gradient":  # the slope of sqrt at 0 is infinite: inf * 0 in the chain rule
            term = jnp.sqrt(jnp.where(tokens[0, 0] == 1, 0.0, 1.0) * (1 + 0 * scale))
        return value + term, metrics

    return loss


def fixed(windows, first_ids):
    """Batches whose first id is given: 1 marks a bad one."""
    rows = np.array(windows[: 4 * len(first_ids)]).reshape(len(first_ids), 4, -1)
    rows[:, 0, 0] = first_ids
    return grain.MapDataset.source(list(rows))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(params, windows, tmp_path, bad):
    loss = poisoned(bad)
    ds = fixed(windows, [0, 0, 1, 0, 0, 0])
    got = run(params, ds, tmp_path / "a", 6, loss)
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [m["skipped"] for m in lines] == [0, 0, 1, 1, 1, 1]
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(got))
    # the state after the bad step is that before it, bit for bit
    two = run(params, ds, tmp_path / "c", 2, loss)
    three = run(params, ds, tmp_path / "d", 3, loss)
    jax.tree.map(np.testing.assert_array_equal, two, three)


def test_too_many_bad_steps_stop_the_run(params, windows, tmp_path):
    ds = fixed(windows, [0] * 5 + [1] * 7)
    with pytest.raises(DelveError, match=rf"{MAX_IN_A_ROW} in a row.*last good state"):
        run(params, ds, tmp_path, 12, poisoned("loss"))
    numbers = checkpoint.Steps(tmp_path / "state").numbers()
    assert numbers and numbers[0] == 4
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] < 12


def test_sigterm_saves_and_exits_0(params, windows, tmp_path):
    ds = data.batches(windows, 4, 0)
    whole = run(params, ds, tmp_path / "a")

    class Terminates:
        """The signal arrives while the loop runs; batches then come slowly enough to see it."""

        def __len__(self):
            return 12

        def __getitem__(self, i):
            if i == 6:
                threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return ds[i]

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(params, grain.MapDataset.source(Terminates()), tmp_path / "b", saving=Saving(every=99))
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) == before
    saved = checkpoint.Steps(tmp_path / "b" / "state").numbers()
    assert len(saved) == 1 and 1 <= saved[0] < 12
    resumed = run(params, ds, tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_accumulation_equals_one_large_batch(params, windows, tmp_path):
    ds = data.batches(windows, 8, 0)
    one = run(params, ds, tmp_path / "a", 4)
    four = run(params, ds, tmp_path / "b", 4, accumulate=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, four)
    losses = [[m["loss"] for m in read_metrics(tmp_path / d / "metrics.jsonl")] for d in "ab"]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_objectives_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 3, 7)).astype(np.float32)
    y = rng.integers(0, 7, (2, 3))
    log_a = a - np.log(np.exp(a).sum(-1, keepdims=True))
    log_b = b - np.log(np.exp(b).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_a, y[..., None], -1)[..., 0]
    np.testing.assert_allclose(objective.cross_entropy(jnp.array(a), jnp.array(y)), want, rtol=1e-5)
    want = (np.exp(log_a) * (log_a - log_b)).sum(-1)
    np.testing.assert_allclose(objective.kl(jnp.array(a), jnp.array(b)), want, rtol=1e-4)
    assert float(jnp.abs(objective.kl(jnp.array(a), jnp.array(a) + 3.0)).max()) < 1e-6


@pytest.mark.parametrize("chunk", [5, 16])
def test_chunks_change_neither_value_nor_gradient(params, windows, monkeypatch, chunk):
    """Against whole logits, with a teacher, z-loss and documents in a row."""
    other = models.init_params(CFG, jax.random.key(1))
    frozen = {"weights": jnp.ones(1), "teachers": (other,)}
    tokens = jnp.asarray(windows[:4])
    seg = objective.segments(tokens[:, :-1], 3)
    assert int(seg.max()) > 0

    def whole(p):
        logits, _ = models.forward(CFG, p, tokens[:, :-1], segments_BT=seg)
        teacher, _ = models.forward(CFG, other, tokens[:, :-1], segments_BT=seg)
        nll = objective.cross_entropy(logits, tokens[:, 1:])
        z = jax.nn.logsumexp(logits, axis=-1) ** 2
        return (0.3 * nll + 0.7 * objective.kl(teacher, logits) + 0.01 * z).mean()

    monkeypatch.setattr(objective, "chunk_length", lambda *_: chunk)
    loss = objective.healing(CFG, (CFG,), Terms(ce=0.3, kl=0.7), eot=3, z_loss=0.01)
    (value, _), grad = jax.value_and_grad(loss, has_aux=True)(params, frozen, tokens)
    want, want_grad = jax.value_and_grad(whole)(params)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad, want_grad
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_step_never_holds_all_logits(compute):
    """No buffer of [B, T, V] float32, in any order of the axes, is in the compiled step."""
    big, rows, length = 601, 4, 24
    cfg = NeoxConfig(vocab_size=big, vocab_rows=big, d_model=16, n_layers=1, n_heads=2, d_ffn=32)
    opt = optim.adamw(lambda _: 1e-3)
    loss = objective.language_model(cfg, Compute(dtype=compute))
    state = jax.eval_shape(lambda p: init_state(p, opt), models.abstract_params(cfg))
    step = make_step(loss, opt, parallel.make_mesh(None), state, ())
    tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32)
    text = step.lower(state, (), tokens, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert objective.chunk_length(rows, length, big) == length // 2
    shapes = {
        tuple(sorted(map(int, found.split(","))))
        for found in re.findall(r"f32\[([\d,]+)\]", text.as_text())
    }
    sizes = {int(np.prod(s)) for s in shapes if big in s}
    assert sizes and max(sizes) < rows * length * big
    assert rows * (length // 2) * big in sizes  # the chunk's logits are there


def test_healing_gradient_pulls_towards_the_teacher(params, windows):
    """With all weight on KL, the teacher itself is the optimum: its gradient vanishes."""
    frozen = {"weights": jnp.ones(1), "teachers": (params,)}
    loss = objective.healing(CFG, (CFG,), Terms(ce=0.0, kl=1.0))
    grad = jax.grad(lambda p: loss(p, frozen, windows[:4])[0])
    at_teacher = optax.tree.norm(grad(params))
    away = jax.tree.map(lambda a: a * 1.3, params)
    assert float(at_teacher) < 1e-5 < 1e-3 < float(optax.tree.norm(grad(away)))


@pytest.mark.parametrize("family", ["neox", "delve"])
def test_sharded_steps_equal_a_single_device(family):
    """8 virtual devices in a process of its own (all meshes: experiments/sharding.py)."""
    script = Path(__file__).parents[1] / "experiments" / "sharding.py"
    meshes = ["data=1", "replica=2,data=2,model=2"]
    out = subprocess.run(
        [sys.executable, str(script), "--family", family, "--steps", "12", "--meshes", *meshes],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    result = json.loads(out.stdout.splitlines()[-1])
    single, sharded = (result["losses"][m] for m in meshes)
    assert result["sharded"][meshes[1]] > 10 and single[-1] < single[0]
    np.testing.assert_allclose(sharded, single, rtol=1e-9)
