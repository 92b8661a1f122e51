"""Terms of healing against whole logits in float64; what is left out at random; stages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import forward

from delve_jax import data, models, parallel
from delve_jax.config import DelveConfig, DelveError, MambaConfig, NeoxConfig
from delve_jax.metrics import read_metrics
from delve_jax.models import delve
from delve_jax.train import cache, objective, optim, run
from delve_jax.train.objective import Terms

V, T = 30, 12
both = {"vocab_size": V, "vocab_rows": V}
STREAMS = (
    ("m", MambaConfig(n_layers=2, d_model=16, d_inner=32, d_state=4, dt_rank=2, **both)),
    ("n", NeoxConfig(n_layers=2, d_model=24, n_heads=2, d_ffn=48, **both)),
)
CFG = DelveConfig(STREAMS, n_superblocks=2, connectors="hub", hub_rank=4)
DENSE = tuple(sub for _, sub in STREAMS)
TOKENS = np.random.default_rng(0).integers(0, V, size=(4, T + 1)).astype(np.int32)
A = np.array([0.7, 0.5], np.float32)


@pytest.fixture(scope="module")
def params(randomised):
    return randomised(CFG, 1)


@pytest.fixture(scope="module")
def frozen(randomised):
    return {"weights": jnp.asarray(A), "teachers": tuple(randomised(sub, 7) for sub in DENSE)}


def soft(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(t, s):
    return (np.exp(t) * (t - s)).sum(-1).mean()


def parts_of(params, frozen):
    """Every term from whole logits."""
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    f, _, way = delve.traced(CFG, params, inputs)
    pooled = soft(delve.head(CFG, params, f))
    own = [soft(x) for x in delve.stream_logits(CFG, params, f)]
    outs = [
        np.asarray(forward(sub, p, inputs)[0], np.float64)
        for sub, p in zip(DENSE, frozen["teachers"], strict=True)
    ]
    rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    gaps = []
    for (n, sub), p in zip(STREAMS, frozen["teachers"], strict=True):
        x = models.embed_tokens(sub, p, inputs)
        ctx, _ = models.FAMILY[sub.family].context(sub, x)
        first = jax.tree.map(lambda a: a[:1], p["layers"])  # superblock 0 holds one layer
        x = np.asarray(models.run_layers(sub, first, x, None, ctx)[0], np.float64)
        gaps.append(((rms(np.asarray(way["h"][n][0], np.float64)) - rms(x)) ** 2).mean())
    return {
        "nll": -np.take_along_axis(pooled, targets[..., None], -1).mean(),
        "kl": kl(soft(sum(a * x for a, x in zip(A, outs, strict=True))), pooled),
        "stream_kl": np.mean([kl(soft(t), s) for t, s in zip(outs, own, strict=True)]),
        "hidden": np.mean(gaps),
    }


@pytest.mark.parametrize("chunk", [5, 16])
def test_terms_against_whole_logits(params, frozen, monkeypatch, chunk):
    monkeypatch.setattr(objective, "chunk_length", lambda *_: chunk)
    terms = Terms(ce=0.2, kl=0.8, streams=0.3, hidden=0.6)
    loss = jax.jit(objective.healing(CFG, DENSE, terms))
    value, metrics = loss(params, frozen, TOKENS)
    want = parts_of(params, frozen)
    for name, number in want.items():
        assert float(metrics[name]) == pytest.approx(number, rel=2e-5), name
    total = 0.2 * want["nll"] + 0.8 * want["kl"] + 0.3 * want["stream_kl"] + 0.6 * want["hidden"]
    assert float(value) == pytest.approx(total, rel=2e-5)


def test_weights_go_in_a_straight_line_from_first_to_last_step(params, frozen):
    terms = Terms(ce=(0.0, 1.0), kl=(1.0, 0.0))
    loss = jax.jit(objective.healing(CFG, DENSE, terms, steps=5))
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        value, m = loss(params, frozen, TOKENS, step)
        want = share * float(m["nll"]) + (1 - share) * float(m["kl"])
        assert float(value) == pytest.approx(want, rel=1e-5)


def test_dropped_streams_are_a_function_of_step_seed_and_row(params, frozen):
    """Not of the order of the rows or their number: accumulation and sharding change nothing."""
    keys = objective.draws(TOKENS, 3, 0)
    turned = objective.draws(TOKENS[::-1], 3, 0)
    some = objective.draws(TOKENS[1:3], 3, 0)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(keys)[::-1], data(turned))
    np.testing.assert_array_equal(data(keys)[1:3], data(some))
    assert (data(keys) != data(objective.draws(TOKENS, 4, 0))).any()
    assert (data(keys) != data(objective.draws(TOKENS, 3, 1))).any()
    many = objective.draws(np.random.default_rng(1).integers(0, V, (4000, T + 1)), 0, 0)
    here = np.asarray(objective.drop_streams(many, 3, 0.4))
    assert here.shape == (4000, 1, 3) and here.sum(-1).min() >= 1
    # at 0.4 all three are absent in 6.4 % of the rows, which then keep all of them
    np.testing.assert_allclose(here.mean((0, 1)), 0.6 + 0.064, atol=0.03)


def test_stream_drop_is_the_loss_of_the_subsets(params, frozen):
    terms = Terms(ce=1.0, kl=0.5, streams=0.25, stream_drop=0.6)
    loss = jax.jit(objective.healing(CFG, DENSE, terms, seed=5))
    value, _ = loss(params, frozen, TOKENS, 2)
    here = np.asarray(objective.drop_streams(objective.draws(TOKENS, 2, 5), 2, 0.6))[:, 0] > 0
    assert {tuple(row) for row in here} > {(True, True)}  # some row lacks a stream
    dense = {"streams": dict(zip(("m", "n"), frozen["teachers"], strict=True))}
    pool = delve.plain_pool(("m", "n"), list(DENSE), 2)
    f, _ = delve.features(pool, dense, TOKENS[:, :-1])
    outs = delve.stream_logits(pool, dense, f)
    total = 0.0
    for b, present in enumerate(here):
        names = tuple(n for n, is_here in zip(("m", "n"), present, strict=True) if is_here)
        cfg, part = delve.subset(CFG, params, names)
        f, _ = delve.features(cfg, part, TOKENS[b : b + 1, :-1])
        log_p = soft(delve.head(cfg, part, f))
        taught = soft(sum(a * x[b : b + 1] for a, x in zip(A, outs, strict=True)))
        own = zip(names, delve.stream_logits(cfg, part, f), strict=True)
        total -= np.take_along_axis(log_p, TOKENS[b : b + 1, 1:, None], -1).mean()
        total += 0.5 * kl(taught, log_p)
        total += 0.25 * np.mean(
            [kl(soft(outs[("m", "n").index(n)][b : b + 1]), soft(x)) for n, x in own]
        )
    assert float(value) == pytest.approx(total / len(here), rel=5e-5)


def test_streams_and_ranks_are_left_out_without_teachers_too(params, frozen):
    terms = Terms(ce=1.0, kl=0.0, stream_drop=0.6)
    alone = objective.healing(CFG, (), terms, seed=5)(params, (), TOKENS, 2)[0]
    taught = objective.healing(CFG, DENSE, terms, seed=5)(params, frozen, TOKENS, 2)[0]
    whole = objective.healing(CFG, (), seed=5)(params, (), TOKENS, 2)[0]
    assert float(alone) == pytest.approx(float(taught), rel=1e-6)
    assert abs(float(alone) - float(whole)) > 1e-3


def test_hidden_match_counts_the_streams_that_are_there():
    """In the order of the streams, whatever the order of the keys."""
    rng = np.random.default_rng(0)
    way, goal = ({n: jnp.asarray(rng.normal(size=(3, 2, 4, 5)), jnp.float32) for n in "abz"}
                 for _ in range(2))  # fmt: skip
    each = {n: float(objective.hidden_match((n,), way, goal)) for n in "abz"}
    names = ("z", "a", "b")
    for k, n in enumerate(names):
        here = jnp.zeros((2, 1, 3)).at[..., k].set(1.0)
        got = float(objective.hidden_match(names, way, goal, here))
        assert got == pytest.approx(each[n], rel=1e-5)
    assert len({round(x, 4) for x in each.values()}) == 3


@pytest.mark.parametrize("trains", ["experts", "joints"])
def test_a_part_alone_is_trained(params, trains):
    """The rest has no gradient and does not move, weight decay included."""
    settings = run.Settings(tokens=100, trains=trains, weight_decay=0.5, lr=0.1, joints_lr=2.0)
    loss = objective.healing(CFG, (), trains=trains)
    (_, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, (), TOKENS)
    optimizer = settings.make_optimizer(4)
    state, moved, update = optimizer.init(params), params, jax.jit(optimizer.update)
    for _ in range(2):  # the first update has rate 0
        updates, state = update(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    for room in params:
        same = all(
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (params[room], moved[room])), strict=True)
        )
        silent = not any(np.asarray(g).any() for g in jax.tree.leaves(grads[room]))
        assert same == silent == ((room in objective.JOINTS) != (trains == "joints")), room


def test_rates_of_rooms_are_scaled():
    grads = {"hub": {"x": jnp.ones(2)}, "streams": {"y": jnp.ones(2)}}
    update = optim.scaled({"hub": 5.0}, 0.5).update(grads, optax.EmptyState())[0]
    assert float(update["hub"]["x"][0]) == 5 and float(update["streams"]["y"][0]) == 0.5


def test_terms_that_cannot_be_are_named():
    other = (DENSE[1], DENSE[0])
    with pytest.raises(DelveError, match="dense parent of every stream"):
        objective.healing(CFG, other, Terms(streams=0.1))
    objective.healing(CFG, other, Terms())  # a pool of any teachers is fine
    with pytest.raises(DelveError, match="--rank-drop: needs factored maps"):
        objective.healing(DENSE[0], (), Terms(rank_drop=0.5))
    for terms, said in (
        (Terms(ce=0.0, kl=0.0), "all its weights are 0"),
        (Terms(kl=-1.0), "not negative"),
        (Terms(kl=(1.0, 0.5, 0.2)), "one or two numbers"),
        (Terms(stream_drop=1.0), "--stream-drop"),
        (Terms(rank_drop=0.0), "--rank-drop"),
    ):
        with pytest.raises(DelveError, match=said):
            terms.checked()


def test_stages_are_read_from_a_file(tmp_path):
    file = tmp_path / "stages.json"
    rows = [{"name": "a", "share": 0.25, "trains": "joints", "kl": [0.9, 0.5], "ce": 0.1},
            {"share": 0.75, "lr": 0.5, "stream_drop": 0.1}]  # fmt: skip
    file.write_text(json.dumps(rows))
    first, second = run.read_stages(str(file))
    assert (first.name, first.terms.kl, second.name) == ("a", (0.9, 0.5), "stage-2")
    whole = run.Settings(tokens=1000, lr=2e-3)
    assert second.settings(whole).tokens == 750 and second.settings(whole).peak == 1e-3
    assert run.read_stages("hybrid")[-1].terms.stream_drop == 0.1
    assert sum(s.share for s in run.read_stages("hybrid")) == pytest.approx(1)
    for change, said in (
        ({"shar": 1}, "stage 2: unknown field 'shar'"), ({"share": 2}, "stage 2: field 'share'"),
        ({"share": 0.5}, "must sum to 1"), ({"name": "a"}, "names must differ"),
        ({"stream_drop": 3}, "stage 2: --stream-drop 3"), ({"kl": "x"}, "stage 2"),
        ({"lr": "x"}, "stage 2: field 'lr'"), ({"joints_lr": -1}, "field 'joints_lr'"),
        ({"trains": "joint"}, "stage 2: field 'trains' must be one of all, experts, joints"),
    ):  # fmt: skip
        file.write_text(json.dumps([rows[0], rows[1] | change]))
        with pytest.raises(DelveError, match=said):
            run.read_stages(str(file))
    for content in (b"{", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(DelveError, match="JSON list of stages"):
            run.read_stages(str(file))


# ---- teachers' samples on disk -------------------------------------------------------------------


def rows_of(n=40):
    return np.random.default_rng(3).integers(0, V, size=(n, T + 1)).astype(np.int32)


def test_samples_are_draws_of_the_pool():
    """Counts sum to the draws, ids are distinct, frequencies and entropy those of T."""
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32) * 2
    keys = jax.random.split(jax.random.key(0), 400)
    out = jax.tree.map(np.asarray, jax.vmap(lambda k: cache.sampled(jnp.asarray(logits), k))(keys))
    p = np.exp(soft(logits))
    for i in range(3):
        seen = np.zeros(V)
        for ids, counts in zip(out["ids"][:, i], out["counts"][:, i], strict=True):
            assert counts.sum() == cache.SAMPLES
            kept = ids[counts > 0]
            assert len(set(kept.tolist())) == len(kept)
            np.add.at(seen, ids, counts)
        np.testing.assert_allclose(seen / seen.sum(), p[i], atol=0.01)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(out["entropy"].mean(0), entropy, atol=0.03)


def test_the_sampled_loss_and_its_gradient_are_unbiased(params, frozen):
    """Mean over many caches of one batch: KL and its gradient as from whole logits."""
    pool = delve.plain_pool(("0", "1"), list(DENSE))
    tree = {"streams": dict(zip(("0", "1"), frozen["teachers"], strict=True)),
            "pool": {"a": frozen["weights"]}}  # fmt: skip
    taught = jax.jit(lambda t: models.forward(pool, tree, t)[0])(TOKENS[:, :-1])
    terms = Terms(ce=0.0, kl=1.0)
    exact = jax.jit(jax.value_and_grad(objective.healing(CFG, DENSE, terms), has_aux=True))
    (want, _), slope = exact(params, frozen, TOKENS)
    loss = objective.healing(CFG, DENSE, terms, cached=True)

    @jax.jit
    def one(params, key):
        said = cache.sampled(taught.reshape(-1, V), key)
        said = {k: a.reshape(4, T, *a.shape[1:]) for k, a in said.items()}
        (value, _), g = jax.value_and_grad(loss, has_aux=True)(
            params, (), {"tokens": TOKENS, **said}
        )
        return value, g["streams"]["n"]["head"]["kernel"], g["streams"]["m"]["norm_f"]["scale"]

    draws = [one(params, key) for key in jax.random.split(jax.random.key(1), 60)]
    values = np.array([float(d[0]) for d in draws])
    assert abs(values.mean() - float(want)) < 4 * values.std() / len(values) ** 0.5 + 1e-4
    for at, exact_g in ((1, slope["streams"]["n"]["head"]["kernel"]),
                        (2, slope["streams"]["m"]["norm_f"]["scale"])):  # fmt: skip
        mean = np.mean([np.asarray(d[at]) for d in draws], 0)
        error = np.linalg.norm(mean - exact_g) / np.linalg.norm(exact_g)
        assert error < 0.2 and error < 0.5 * np.linalg.norm(draws[0][at] - exact_g) / (
            np.linalg.norm(exact_g)
        )


def test_a_cache_is_made_once_resumes_grows_and_refuses_other_runs(frozen, tmp_path):
    data_ = data.batches(rows_of(), 4, 0)
    small = cache.make(tmp_path / "a", data_, 3, DENSE, frozen)
    before = np.array(small.array("ids"))
    grown = cache.make(tmp_path / "a", data_, 5, DENSE, frozen)
    whole = cache.make(tmp_path / "b", data_, 5, DENSE, frozen)
    np.testing.assert_array_equal(grown.array("ids")[:3], before)
    for name in ("ids", "counts", "entropy"):
        np.testing.assert_array_equal(grown.array(name), whole.array(name))
    again = cache.make(tmp_path / "a", data_, 2, DENSE, frozen)
    np.testing.assert_array_equal(again.array("counts"), whole.array("counts"))
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "a").glob("*.bin")}
    assert sum(sizes.values()) == 5 * 4 * T * (64 * 3 + 2)
    with pytest.raises(DelveError, match="answers of another run"):
        cache.make(tmp_path / "a", data_, 2, DENSE, frozen, eot=0)
    with pytest.raises(DelveError, match=r"its data differ.*another --teacher-cache"):
        cache.make(tmp_path / "a", data_, 2, DENSE, frozen, data_hash="of another text")
    for other, teachers in ((data.batches(rows_of(), 4, 1), frozen),
                            (data_, frozen | {"weights": jnp.ones(2)}),
                            (data_, frozen | {"teachers": jax.tree.map(
                                lambda a: 1.01 * a, frozen["teachers"])})):  # fmt: skip
        with pytest.raises(DelveError, match="answers of another run"):
            cache.make(tmp_path / "a", other, 2, DENSE, teachers)


def test_a_cache_that_does_not_fit_the_disk_is_refused_before_it_is_made(
    frozen, tmp_path, monkeypatch
):
    """Pages of a mapped file that find no room kill a process (SIGBUS)."""
    data_, usage = data.batches(rows_of(), 4, 0), cache.shutil.disk_usage
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda p: usage(p)._replace(free=4 * T * 194))
    with pytest.raises(DelveError, match="need 0.00 GiB, 0.00 are free; make room"):
        cache.make(tmp_path / "a", data_, 2, DENSE, frozen)
    assert not list((tmp_path / "a").iterdir())
    cache.make(tmp_path / "a", data_, 1, DENSE, frozen)


def test_a_run_keeps_the_teacher_weights_that_it_began_with(frozen, tmp_path):
    """Fitted once: a run that goes on with several processes would have taken even ones."""
    teachers = list(zip(DENSE, frozen["teachers"], strict=True))
    rows = lambda T, batch, shard, shards: data.batches(rows_of(4), batch, 0)  # noqa: E731
    first = run._teacher_weights(DENSE, teachers, rows, T, tmp_path / "run")
    assert first[0] != [0.5, 0.5] and first[1]["teacher_weights_from"] == "fit"
    assert run._teacher_weights(DENSE, teachers, None, T, tmp_path / "run") == first


def test_healing_from_a_cache_needs_no_teachers_in_its_step(params, frozen, tmp_path):
    """KL falls, and at step 0 is that of whole logits but for the samples' noise."""
    settings = run.Settings(tokens=12 * 4 * T, batch=4, window=T, lr=5e-3)
    _, facts = run.heal(
        CFG, lambda: jax.tree.map(jnp.copy, params),
        lambda T, batch, shard, shards: data.batches(rows_of(4), batch, 0, shard, shards),
        list(zip(DENSE, frozen["teachers"], strict=True)), settings,
        mesh=parallel.make_mesh(None), workdir=tmp_path, weights=A.tolist(),
        teacher_cache=tmp_path / "cache", terms=Terms(ce=0.0, kl=1.0),
    )  # fmt: skip
    assert facts["teacher_samples"] == 64
    log = read_metrics(tmp_path / "metrics.jsonl")
    first = data.batches(rows_of(4), 4, 0)[0]
    exact = jax.jit(objective.healing(CFG, DENSE, Terms(ce=0.0, kl=1.0)))(params, frozen, first)[0]
    assert log[0]["kl"] == pytest.approx(float(exact), rel=0.1)
    assert log[-1]["kl"] < 0.9 * log[0]["kl"]


def test_cross_entropy_of_an_accelerator(monkeypatch):
    """There it is a sum under a mask, here a gather: one function and one gradient."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, V)), jnp.float32)
    targets = jnp.asarray(TOKENS[:2, :5])
    both = lambda x: (objective.cross_entropy(x, targets) ** 2).sum()  # noqa: E731
    want = jax.value_and_grad(both)(logits)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = jax.value_and_grad(both)(logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_chunks_are_longer_where_one_model_has_logits(monkeypatch):
    assert objective.chunk_length(8, 4096, 50_000, alone=True) == objective.chunk_length(
        8, 4096, 50_000
    )  # a CPU's cache is what it is
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    short, long = (objective.chunk_length(8, 4096, 50_000, alone=a) for a in (False, True))
    assert 6 * short < long < 10 * short
