"""Neuron pruning: the stated loss is the least-squares loss, and pruned stacks run as they say."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import forward

from delve_jax import models, plan
from delve_jax.compress import assembly, compress, curves, moments, prune
from delve_jax.compress.allocate import Plan
from delve_jax.compress.prune import ordered
from delve_jax.compress.spectra import InMemory
from delve_jax.config import (
    DelveError,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
    from_json,
    to_json,
)
from delve_jax.fuse import fuse, joints_count
from delve_jax.models import elastic
from delve_jax.parents import stock
from delve_jax.train.run import Settings

F, OUT, N = 40, 12, 300
SMALL = {"vocab_size": 40, "vocab_rows": 40, "d_model": 16, "n_layers": 2}
PARENTS = {
    "neox": NeoxConfig(**SMALL, n_heads=2, d_ffn=F),
    "rwkv": RwkvConfig(**SMALL, d_att=16, d_ffn=F),
    "qwen3": Qwen3Config(**SMALL, n_heads=2, n_kv_heads=1, head_dim=8, d_ffn=F),
}


def hidden(seed, dead=0, twins=0, low_rank=None):
    """Correlated non-negative activations [N, F] and a down map; dead and duplicated neurons."""
    rng = np.random.default_rng(seed)
    rank = low_rank or F
    h = np.maximum(rng.normal(size=(N, rank)) @ rng.normal(size=(rank, F)) + 0.5, 0) ** 2
    if low_rank:
        h = rng.normal(size=(N, rank)) @ rng.normal(size=(rank, F))
    h *= np.exp(rng.normal(size=F))
    h[:, :dead] = 0
    h[:, dead : dead + twins] = h[:, F - twins :]
    return h, rng.normal(size=(F, OUT)) * np.exp(rng.normal(size=(F, 1)))


def least_squares(h, w, kept, grad=None, centred=False):
    """The loss of the best map on the kept neurons, by lstsq on the activations themselves."""
    h = h - h.mean(0) if centred else h
    y = h @ w
    fit = np.linalg.lstsq(h[:, kept], y, rcond=1e-9)[0]
    lost = (h[:, kept] @ fit - y) / len(h) ** 0.5
    return np.sum((lost @ (np.eye(w.shape[1]) if grad is None else grad)) * lost)


@pytest.mark.parametrize("case", ["plain", "centred", "metric", "dead", "twins", "low rank"])
def test_stated_loss_is_the_explicit_least_squares_loss(case):
    more = {"dead": {"dead": 9}, "twins": {"twins": 7}, "low rank": {"low_rank": 11}}.get(case, {})
    h, w = hidden(1, **more)
    g = np.random.default_rng(2).normal(size=(50, OUT)) if case == "metric" else None
    grad = None if g is None else g.T @ g / 50
    centred = case == "centred"
    p = ordered(h.T @ h / N, w, mean_F=h.mean(0) if centred else None, grad_OO=grad, damping=0.0)
    total = least_squares(h, w, [], grad, centred)
    losses = p.errors(range(F + 1))
    assert losses[0] == pytest.approx(total) and losses[F] == 0
    assert (np.diff(losses) <= 0).all()
    for k in (1, 5, 11, 20, 31, F - 1, F):
        kept_K, down_KO, shift_O = p.repaired(k, w)
        np.testing.assert_array_equal(kept_K, p.order_F[:k])  # a smaller k is a prefix
        expected = least_squares(h, w, kept_K, grad, centred)
        assert abs(losses[k] - expected) <= 1e-9 * total
        lost = (h[:, kept_K] @ down_KO + shift_O - h @ w) / N**0.5  # the very map that is returned
        assert np.sum((lost @ (np.eye(OUT) if grad is None else grad)) * lost) == pytest.approx(
            expected, abs=1e-9 * total
        )
        if not centred:
            assert not shift_O.any()


def test_neurons_that_add_nothing_come_last():
    h, w = hidden(3, dead=6, twins=5)
    p = ordered(h.T @ h / N, w)
    assert set(range(6)) <= set(p.order_F[-11:])  # the dead, and one of each pair of twins
    assert p.errors(F - 11) <= 1e-12 * p.errors(0)
    silent = ordered(h.T @ h / N, np.zeros_like(w))
    assert (
        not silent.errors(range(F + 1)).any() and not silent.repaired(0, np.zeros_like(w))[1].size
    )


@pytest.mark.parametrize("seed", range(8))
def test_loses_less_than_pruning_by_magnitude(seed):
    h, w = hidden(seed)
    gram = h.T @ h / N
    p = ordered(gram, w)
    by_size = np.argsort(-np.diag(gram) * (w * w).sum(1))
    counts = (10, 20, 30)
    repaired = np.array([least_squares(h, w, by_size[:k]) for k in counts])
    for k, error in zip(counts, repaired, strict=True):
        dropped = np.sum((h[:, by_size[k:]] @ w[by_size[k:]]) ** 2) / N
        assert p.errors(k) <= 1.02 * error < dropped
    # seed 2 takes the very same neurons: equal but for rounding
    assert p.errors(counts).sum() <= (1 if seed == 2 else 0.9999) * repaired.sum() * (1 + 1e-9)


def test_picking_in_blocks_is_close_to_picking_one_at_a_time(monkeypatch):
    rng = np.random.default_rng(5)
    h = np.maximum(rng.normal(size=(900, 60)) @ rng.normal(size=(60, 256)) + 1, 0)
    w = rng.normal(size=(256, OUT))
    blocks = ordered(h.T @ h, w)  # 4 at once
    monkeypatch.setattr(prune, "BLOCKS", 256)
    single = ordered(h.T @ h, w)
    ratio = blocks.errors([32, 64, 128, 192]) / single.errors([32, 64, 128, 192])
    assert ratio.mean() < 1.02 and ratio.max() < 1.05


def test_order_is_the_same_every_time():
    h, w = hidden(6, twins=4)
    assert np.array_equal(ordered(h.T @ h, w).order_F, ordered(h.T @ h, w).order_F)


def repaired_by_hand(params, cfg, sizes, seed=0):
    """What `Pruning.repaired` gives, of random content: any kept set, map and shift."""
    rng = np.random.default_rng(seed)
    return [
        (np.sort(rng.permutation(F)[:k]), rng.normal(size=(k, cfg.d_model)), rng.normal(size=16))
        for k in sizes
    ]


def pruned(cfg, params, repaired):
    """The parent with its MLP cut to what `repaired` gives for each layer."""
    fits = [types.SimpleNamespace(repaired=lambda k, down_FO, fit=fit: fit) for fit in repaired]
    spectra = types.SimpleNamespace(mlp=models.FAMILY[cfg.family].MLP, pruning=fits.__getitem__)
    sizes = Plan({}, 0, 0, 0, 1.0, "dense", tuple(len(kept_K) for kept_K, _, _ in repaired))
    return assembly.assemble(InMemory(cfg, params), spectra, sizes)[:2]


@pytest.mark.parametrize("family", PARENTS)
def test_pruned_stack_is_the_smaller_model_of_each_layer(family, randomised):
    """Unequal widths in one stack: layer by layer the same as a layer of exactly that width."""
    cfg = PARENTS[family]
    params = randomised(cfg, 0)
    new_cfg, new = pruned(cfg, params, repaired_by_hand(params, cfg, (9, 25)))
    assert new_cfg.neurons == (9, 25) and new_cfg.d_ffn == 25
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, models.abstract_params(new_cfg))
    per_neuron = {"neox": 2 * 16 + 1, "rwkv": 2 * 16, "qwen3": 3 * 16}[family]
    assert models.count(new_cfg) == models.count(cfg) - (2 * F - 34) * per_neuron
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 16)), jnp.float32)
    for layer, width in enumerate(new_cfg.neurons):
        wide = jax.tree.map(lambda a, i=layer: a[i], new["layers"])
        narrow = jax.tree.map(lambda a: a, wide)
        *makers, reader = models.FAMILY[family].MLP
        for name in models.FAMILY[family].MLP:
            outer, inner = name.split("/")
            cut = (lambda a, w=width: a[..., :w]) if name in makers else (lambda a, w=width: a[:w])
            leaf = narrow[outer][inner]
            if name == reader:
                narrow[outer][inner] = {**leaf, "kernel": cut(leaf["kernel"])}
            else:
                narrow[outer][inner] = {key: cut(a) for key, a in leaf.items()}
        one = dataclasses.replace(new_cfg, d_ffn=width, neurons=())
        np.testing.assert_allclose(
            models.block_apply(new_cfg, wide, x_BTD),
            models.block_apply(one, narrow, x_BTD), rtol=0, atol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("sizes", [(0, 7), (0, 0)])
def test_a_layer_may_lose_all_its_neurons(sizes, randomised):
    cfg = PARENTS["rwkv"]
    params = randomised(cfg, 0)
    new_cfg, new = pruned(cfg, params, repaired_by_hand(params, cfg, sizes))
    assert models.count(new_cfg) == models.count(cfg) - (2 * F - sum(sizes)) * 2 * 16
    assert from_json(to_json(new_cfg)) == new_cfg
    assert np.isfinite(forward(new_cfg, new, jnp.zeros((1, 4), int))[0]).all()


@pytest.mark.parametrize("family", PARENTS)
def test_nothing_beyond_the_true_width_gets_a_gradient(family, randomised):
    cfg = PARENTS[family]
    params = randomised(cfg, 0)
    cfg, params = pruned(cfg, params, repaired_by_hand(params, cfg, (9, 25)))
    tokens_BT = jnp.arange(16).reshape(2, 8)
    grads = jax.grad(lambda p: jnp.square(forward(cfg, p, tokens_BT)[0]).sum())(params)
    *makers, reader = models.FAMILY[family].MLP
    for tree in (params, grads):
        for name in makers:
            for a in models.leaf_of(tree, name).values():
                assert not np.asarray(a)[0, ..., 9:].any()
        down = np.asarray(models.leaf_of(tree, reader)["kernel"])
        assert not down[0, 9:].any() and down[0, :9].any() and down[1].any()


def test_repair_of_a_real_mlp_keeps_its_output(randomised):
    """End to end on one block: half of the neurons, of which a third does nothing by design."""
    cfg = PARENTS["neox"]
    params = randomised(cfg, 3)
    up = params["layers"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[..., 14:].set(up["kernel"][..., 13:14])
    up["bias"] = up["bias"].at[..., 14:].set(up["bias"][..., 13:14])  # 14 different neurons
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 32)))
    fits = []
    x_BTD = models.embed_tokens(cfg, params, tokens_BT)
    for layer in range(cfg.n_layers):
        p = jax.tree.map(lambda a, i=layer: a[i], params["layers"])
        h_ND = models.layer_norm(p["ln2"], x_BTD, cfg.norm_eps).reshape(-1, 16)
        h_NF = jax.nn.gelu(models.linear(p["mlp"]["up"], h_ND), approximate=False)
        h_NF = np.asarray(h_NF, np.float64)
        gram = h_NF.T @ h_NF / len(h_NF)
        down = p["mlp"]["down"]["kernel"]
        fits.append(ordered(gram, down, mean_F=h_NF.mean(0)).repaired(14, down))
        x_BTD = models.block_apply(cfg, p, x_BTD)
    small_cfg, small = pruned(cfg, params, fits)
    assert small_cfg.neurons == (14, 14) and models.count(small_cfg) < models.count(cfg)
    np.testing.assert_allclose(
        forward(small_cfg, small, tokens_BT)[0],
        forward(cfg, params, tokens_BT)[0], atol=2e-4,
    )  # fmt: skip


def test_config_goes_through_json_both_ways_and_old_files_load():
    cfg = dataclasses.replace(PARENTS["neox"], neurons=(9, F))
    data = to_json(cfg)
    assert data["neurons"] == [9, F] and from_json(data) == cfg
    old = {k: v for k, v in to_json(PARENTS["rwkv"]).items() if k != "neurons"}
    assert from_json(old) == PARENTS["rwkv"]
    for wrong in ([9], [9, F - 1], [9, F + 1], 5):
        with pytest.raises(DelveError, match="somewhere"):
            from_json({**data, "neurons": wrong}, "somewhere")
    mamba = to_json(MambaConfig(**SMALL, d_inner=32, dt_rank=2))
    assert from_json(mamba).neurons == ()
    with pytest.raises(DelveError, match="'neurons'"):
        from_json({**mamba, "neurons": [4, 4]})


def test_count_is_true_with_ranks_beside_neurons():
    """Factored up and down maps of unequal ranks and widths: r (D + f) and r (f + D) each."""
    ranks = (("mlp/up", (4, 7)), ("mlp/down", (5, 3)))
    plain = dataclasses.replace(PARENTS["neox"], n_layers=2)
    cfg = dataclasses.replace(plain, ranks=ranks, neurons=(11, F))
    body = models.count(plain) - 2 * (2 * 16 * F + F)
    expected = sum(
        r_up * (16 + f) + f + r_down * (f + 16)
        for r_up, r_down, f in zip((4, 7), (5, 3), (11, F), strict=True)
    )
    assert models.count(cfg) == body + expected
    assert models.count(dataclasses.replace(plain, neurons=(F, F))) == models.count(plain)


def test_families_name_their_mlp():
    for family, module in models.FAMILY.items():
        assert isinstance(module, types.ModuleType)
        tree = models.abstract_params(PARENTS[family]) if family in PARENTS else None
        for name in module.MLP:
            assert name in module.FACTORABLE
            axis = -2 if name == module.MLP[-1] else -1
            assert models.leaf_of(tree, name)["kernel"].shape[axis] == F


# --- as a candidate of the allocator -------------------------------------------------------------


@pytest.fixture(scope="module")
def repetitive(randomised, tmp_path_factory):
    """(cfg, params, tokens, folder): all but 12 of its 40 neurons repeat those 12."""
    cfg = PARENTS["rwkv"]
    params = randomised(cfg, 4)
    key = params["layers"]["ffn"]["key"]["kernel"]
    params["layers"]["ffn"]["key"]["kernel"] = key[..., np.arange(F) % 12]
    tokens = np.random.default_rng(0).integers(0, 40, (24, 16)).astype(np.int32)
    return cfg, params, tokens, tmp_path_factory.mktemp("repetitive")


def spared(cfg, neurons):
    """A budget that is met by these neurons alone, everything else dense."""
    return models.count(cfg) - sum(F - k for k in neurons) * prune.per_neuron(cfg)


def test_pruning_wins_where_neurons_repeat_each_other(repetitive):
    """No rank below 16 is exact here, 12 neurons are; ranks alone would lose much more."""
    cfg, params, tokens, folder = repetitive
    budget = spared(cfg, (12, 12))
    new, small, report = compress(
        cfg, params, tokens, budget=budget, work=folder / "both", progress=False
    )
    assert new.neurons == report.plan.neurons == (12, 12) and not new.ranks
    half = elastic.shrink(new, small, models.count(elastic.config_at(new, 0.5)))[0]
    assert new.nested == (("neurons", half.neurons),) and max(half.neurons) < 12
    assert models.count(new) == report.plan.parameters == budget
    assert report.measured["kl"] < 1e-6 and report.bound <= report.expected < 1e-6
    np.testing.assert_allclose(
        forward(new, small, tokens)[0], forward(cfg, params, tokens)[0], atol=2e-3
    )
    facts = json.loads(json.dumps(report.to_json()))
    assert facts["neurons"] == [12, 12] and not facts["maps"]
    *_, alone = compress(cfg, params, tokens, budget=budget, pruning=False, progress=False)
    assert not alone.plan.neurons and alone.measured["kl"] > 100 * report.measured["kl"]


def test_one_folder_serves_every_budget_without_another_sweep(repetitive, monkeypatch):
    cfg, params, tokens, folder = repetitive
    fresh = compress(cfg, params, tokens, keep=0.5, progress=False)
    compress(cfg, params, tokens, budget=spared(cfg, (12, 12)), work=folder / "both",
             progress=False)  # fmt: skip
    for pass_ in ("boundaries", "head", "layer", "embed_grad"):
        monkeypatch.setattr(moments.Sweep, pass_, None)
    monkeypatch.setattr(curves, "measure", None)
    kept = []
    for keep in (0.8, 0.5, 0.3):
        again = compress(cfg, params, tokens, keep=keep, work=folder / "both", progress=False)
        assert models.count(again[0]) <= keep * models.count(cfg)
        kept.append(sum(again[0].neurons) if again[0].neurons else 2 * F)
        if keep == 0.5:
            assert again[0] == fresh[0]
            jax.tree.map(np.testing.assert_array_equal, again[1], fresh[1])
    assert kept == sorted(kept, reverse=True) and kept[-1] < 2 * F
    with pytest.raises(DelveError, match="another parent, text, method"):
        compress(cfg, params, tokens, keep=0.5, pruning=False, work=folder / "both", progress=False)


def test_candidates_are_the_mlps_whose_gram_is_affordable():
    wide = dataclasses.replace(PARENTS["neox"], d_ffn=prune.WIDEST + 1)
    assert prune.candidate(PARENTS["qwen3"]) == ("mlp/gate", "mlp/up", "mlp/down")
    assert prune.candidate(wide) == prune.candidate(MambaConfig(**SMALL, d_inner=32)) == ()


# --- a pruned parent everywhere else -------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adamh"])
def test_training_leaves_the_padding_zero(optimizer, randomised):
    """Where nothing acts there is no gradient (above), and no optimiser moves it either."""
    cfg, params = pruned(
        PARENTS["neox"], randomised(PARENTS["neox"], 0),
        repaired_by_hand(None, PARENTS["neox"], (9, 25)),
    )  # fmt: skip
    mlp = {"layers": {"mlp": params["layers"]["mlp"]}}
    grads = jax.tree.map(lambda a: jnp.sign(a), mlp)
    step = Settings(tokens=64, optimizer=optimizer, lr=1e-2).make_optimizer(4)
    new, state = mlp, step.init(mlp)
    for _ in range(2):
        change, state = step.update(grads, state, new)
        new = optax.apply_updates(new, change)
    for old, moved in zip(jax.tree.leaves(mlp), jax.tree.leaves(new), strict=True):
        assert not np.asarray(moved)[old == 0].any() and np.asarray(moved != old)[old != 0].all()


def test_fused_pruned_parents_are_their_pool(randomised):
    parts = []
    for seed, name in enumerate(("neox", "rwkv")):
        cfg, params = PARENTS[name], randomised(PARENTS[name], seed)
        parts.append((name, *pruned(cfg, params, repaired_by_hand(params, cfg, (0, 25)))))
    joint, params, _ = fuse(parts)
    assert models.count(joint) == joints_count(joint) + sum(models.count(c) for _, c, _ in parts)
    assert from_json(to_json(joint)) == joint
    tokens = jnp.arange(16).reshape(2, 8)
    pool = sum(0.5 * forward(c, p, tokens)[0] for _, c, p in parts)
    got = jax.nn.log_softmax(forward(joint, params, tokens)[0])
    np.testing.assert_allclose(got, jax.nn.log_softmax(pool), atol=1e-4)


@pytest.mark.parametrize("family", PARENTS)
def test_plan_counts_the_true_width(family):
    """Layers of 9 and 25 neurons cost what layers of 17 do; teachers are as wide as the source."""
    cfg = PARENTS[family]
    ranks = tuple((name, (3, 3)) for name in models.FAMILY[family].MLP[:1])
    for more in ((), ranks):
        pruned = dataclasses.replace(cfg, d_ffn=25, neurons=(9, 25), ranks=more)
        mean = dataclasses.replace(cfg, d_ffn=17, ranks=more)
        assert plan.forward_flops(pruned, 8) == plan.forward_flops(mean, 8)
    (dense,) = stock.dense_parents(pruned)
    assert dense.d_ffn == 25  # nothing says what it was
    known = dataclasses.replace(pruned, hf_config=json.dumps(stock.hf_config(cfg, "float32")))
    (dense,) = stock.dense_parents(known)
    assert dense == dataclasses.replace(cfg, hf_config=known.hf_config)
