"""Storage forms of factored maps: the same map, exact counts and bytes, files and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from compiled import forward
from jax.sharding import PartitionSpec as P

from delve_jax import checkpoint, evaluate, models, parallel, parents
from delve_jax.compress import compress, factorize, storage
from delve_jax.config import (
    DelveError,
    Factored,
    MambaConfig,
    NeoxConfig,
    Qwen3Config,
    RwkvConfig,
    from_json,
    to_json,
)
from delve_jax.fuse import joint_config
from delve_jax.models.linear import (
    declared,
    dims,
    linear,
    lookup,
    materialise,
    parameters,
    transposed,
)
from delve_jax.parents.export import export_hf
from delve_jax.train.run import Settings, shapes_of

# unequal ranks in every stack, tables factored, square and wide and narrow maps, a tied vocabulary
MAMBA = MambaConfig(
    vocab_size=61, vocab_rows=61, d_model=24, n_layers=2, d_inner=48, d_state=4, dt_rank=2,
    tie_embeddings=True, ranks=(("embed", (9,)), ("in_proj", (7, 3)), ("out_proj", (0, 5))),
)  # fmt: skip
RWKV = RwkvConfig(
    vocab_size=61, vocab_rows=61, d_model=24, n_layers=2, d_att=24, d_ffn=96,
    ranks=(("head", (8,)), ("att/key", (6, 11)), ("ffn/key", (9, 9)), ("ffn/value", (1, 8))),
)  # fmt: skip
NEOX = NeoxConfig(
    vocab_size=61, vocab_rows=61, d_model=24, n_layers=2, n_heads=4, d_ffn=48, neurons=(48, 31),
    ranks=(("embed", (7,)), ("att/qkv", (5, 9)), ("mlp/up", (6, 8)), ("mlp/down", (8, 4))),
)  # fmt: skip
QWEN3 = Qwen3Config(
    vocab_size=61, vocab_rows=61, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
    d_ffn=48, ranks=(("att/v", (4, 6)), ("att/o", (5, 5)), ("mlp/down", (8, 3))),
)  # fmt: skip
FAMILIES = {"mamba": MAMBA, "rwkv": RWKV, "neox": NEOX, "qwen3": QWEN3}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12))


def factors(rng, n_in, n_out, rank, decay=1e-3):
    """Balanced factors with a spectrum over three decades and channels of uneven size."""
    kernel = rng.normal(size=(n_in, n_out)) * np.geomspace(1, 0.1, n_out)
    fit = factorize.svd(kernel * rng.lognormal(size=(n_in, 1)), rank)
    return factorize.balance(fit.v_IK * np.geomspace(1, decay, rank), fit.u_KO)


@pytest.fixture(scope="module")
def made(randomised):
    """Family -> parameters, zero beyond each layer's true rank and width as compression leaves."""

    def cut(cfg):
        params = randomised(cfg, 1)
        for name, ranks in cfg.ranks:
            leaf = models.leaf_of(params, name)
            ranks_L = np.array(ranks if name not in ("embed", "head") else ranks[0])
            live = np.arange(max(ranks)) < ranks_L[..., None]
            leaf["v"], leaf["u"] = leaf["v"] * live[..., None, :], leaf["u"] * live[..., None]
        for name in models.FAMILY[cfg.family].MLP if cfg.neurons else ():
            leaf, last = models.leaf_of(params, name), name.endswith("down")
            live = np.arange(cfg.d_ffn) < np.array(cfg.neurons)[:, None]
            side = "v" if last else "u"
            leaf[side] = leaf[side] * (live[..., None] if last else live[:, None])
            if not last:
                leaf["bias"] = leaf["bias"] * live
        return params

    return {name: cut(cfg) for name, cfg in FAMILIES.items()}


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)


# ---- one map -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 48, 40), (48, 24, 9), (24, 48, 9), (40, 64, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_pivots_span_the_factor_with_small_coordinates(shape, seed):
    n_in, n_out, rank = shape
    v, u = factors(np.random.default_rng(seed), n_in, n_out, rank)
    p, rest, t = storage.pivots(u)
    assert sorted([*p, *rest]) == list(range(n_out)) and t.shape == (rank, n_out - rank)
    assert np.abs(t).max(initial=0) <= storage.SWAP + 1e-9
    np.testing.assert_allclose(u[:, p] @ t, u[:, rest], atol=1e-11 * np.abs(u).max())


def test_swaps_bound_what_pivoted_qr_does_not(monkeypatch):
    """Random rows leave pivoted QR at 1.1, far below SWAP: a tighter bound makes the swaps run."""
    u = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 30)))[0].T
    order = scipy.linalg.qr(u, mode="r", pivoting=True)[1]
    plain = np.abs(np.linalg.solve(u[:, order[:30]], u[:, order[30:]])).max()
    monkeypatch.setattr(storage, "SWAP", 1.0)
    p, rest, t = storage.pivots(u)
    assert np.abs(t).max() <= 1.0 + 1e-12 < plain
    np.testing.assert_allclose(u[:, p] @ t, u[:, rest], atol=1e-12)


def test_pivots_of_singular_and_empty_factors():
    r = np.random.default_rng(0)
    u = r.normal(size=(6, 2)) @ r.normal(size=(2, 20))  # rank 2, not 6
    u[:, ::3] = 0
    p, rest, t = storage.pivots(u)
    np.testing.assert_allclose(u[:, p] @ t, u[:, rest], atol=1e-12)
    assert np.abs(t).max() <= storage.SWAP
    assert np.array_equal(storage.pivots(np.zeros((3, 5))).t, np.zeros((3, 2)))
    assert storage.pivots(np.zeros((0, 5))).t.shape == (0, 5)
    with pytest.raises(DelveError, match="rank 4 of a map with only 3 channels"):
        storage.pivots(np.ones((4, 3)))


@pytest.mark.parametrize("shape", [(48, 48, 20), (96, 24, 9), (24, 96, 9)])
def test_pivot_in_float32_is_lossless_and_smaller(shape):
    """C7: |error| < 1e-5 of the largest output, |T| < 100, exactly r (I + O - r) numbers."""
    n_in, n_out, rank = shape
    rng = np.random.default_rng(3)
    v, u = factors(rng, n_in, n_out, rank)
    leaf = {"v": jnp.asarray(v, jnp.float32), "u": jnp.asarray(u, jnp.float32)}
    made = storage._converted(leaf, "head", (rank,), "pivot")
    numbers = sum(a.size for name, a in made.items() if name != "order")
    assert numbers == rank * (n_in + n_out - rank) == parameters("pivot", rank, n_in, n_out)
    assert made["order"].dtype == jnp.int32 and made["order"].size == min(n_in, n_out)
    rest = made["u_rest" if n_out <= n_in else "v_rest"]
    assert np.abs(rest).max() < 100
    x = rng.normal(size=(7, n_in))
    want = x @ v @ u
    got = linear(made, jnp.asarray(x, jnp.float32))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    kernel = materialise(made)
    assert np.abs(kernel - v @ u).max() < 1e-5 * np.abs(v @ u).max()


def test_int8_error_is_that_of_half_a_step():
    rng = np.random.default_rng(0)
    v, u = factors(rng, 64, 96, 12)
    made = storage.quantised(v, u)
    assert np.abs(made["v_q"]).max() == np.abs(made["u_q"]).max() == 127
    assert made["q_scale"].shape == (12,)
    again = (made["v_q"] * made["q_scale"]) @ made["u_q"]
    step_v, step_u = np.abs(v).max(0) / 127, np.abs(u).max(1, keepdims=True) / 127
    bound = np.abs(v) @ np.broadcast_to(step_u, u.shape) + step_v * np.ones_like(v) @ np.abs(u)
    assert (np.abs(again - v @ u) <= bound / 2 + (step_v @ step_u) / 4 + 1e-12).all()
    # what is quantised once is not changed by quantising it again
    v2, u2 = storage.factors({k: a for k, a in made.items()}, 12)
    np.testing.assert_allclose(v2 @ u2, again, atol=1e-12)
    twice = storage.quantised(v2, u2)
    assert all(np.allclose(twice[k], made[k], rtol=1e-9) for k in made)
    dead = storage.quantised(np.zeros((5, 3)), np.zeros((3, 4)))
    assert not any(a.any() for a in dead.values())


def test_scales_fitted_to_activations_gain_nothing():
    """Why the scales are the largest entries: what is lost is the rounding, not the scales.

    On the rwkv, neox and mamba proxies at keep 0.5 (plain SVD) int8 costs -0.0002, 0.0004 and
    0.0017 nats a token (70k of the choose split), with fitted scales -0.0001, 0.0003 and 0.0012.
    """
    rng = np.random.default_rng(0)
    v, u = factors(rng, 64, 96, 24, decay=1)
    made = storage.quantised(v, u)
    x = rng.normal(size=(500, 64)) @ (rng.normal(size=(64, 64)) * np.geomspace(1, 0.05, 64))
    gram = x.T @ x
    v_q, u_q = made["v_q"], made["u_q"]
    # min over s of |x (v u - v_q diag(s) u_q)|^2, all scales at once
    fitted = np.linalg.solve(
        (v_q.T @ gram @ v_q) * (u_q @ u_q.T), ((v_q.T @ gram @ v) * (u_q @ u.T)).sum(1)
    )
    lost = lambda s: np.linalg.norm(x @ (v @ u - (v_q * s) @ u_q))  # noqa: E731
    assert 0.97 * lost(made["q_scale"]) < lost(fitted) <= lost(made["q_scale"])


@pytest.mark.parametrize("form", ["pivot", "int8"])
@pytest.mark.parametrize("shape", [(61, 24, 9), (12, 24, 9)])
def test_tables_look_up_and_transpose(form, shape):
    rows, width, rank = shape
    rng = np.random.default_rng(1)
    v, u = factors(rng, rows, width, rank)
    leaf = {"v": jnp.asarray(v, jnp.float32), "u": jnp.asarray(u, jnp.float32)}
    made = storage._converted(leaf, "embed", (rank,), form)
    kernel = np.asarray(materialise(made), np.float64)
    tokens = rng.integers(0, rows, (2, 5))
    np.testing.assert_allclose(lookup(made, tokens), kernel[tokens], atol=2e-6)
    assert lookup(made, tokens, jnp.bfloat16).dtype == jnp.bfloat16
    x = rng.normal(size=(2, 5, width))
    got = transposed(made, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, x @ kernel.T, atol=2e-5 * np.abs(x @ kernel.T).max())


@pytest.mark.parametrize("form", ["uv", "pivot", "int8"])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (20, 20)])
def test_dims_are_those_declared(form, shape):
    for least in (0, 3, 5):
        for table in (False, True):
            out = declared(*shape, Factored(5, least, form), table)
            leaf = {k: jax.ShapeDtypeStruct((2, *s), float) for k, (s, _) in out.items()}
            assert dims(leaf, least) == shape


# ---- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pivot_gives_the_same_logits(family, made):
    cfg, params = FAMILIES[family], made[family]
    want = forward(cfg, params, TOKENS)[0]
    new, small = storage.convert(cfg, params, "pivot")
    assert new.storage == "pivot" and dataclasses.replace(new, storage="uv") == cfg
    got = jax.jit(models.forward, static_argnums=0)(new, small, TOKENS)[0]
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    state = models.init_state(new, 2, 16)
    _, state = forward(new, small, TOKENS[:, :7], state)
    tail, _ = forward(new, small, TOKENS[:, 7:], state)
    assert np.abs(tail - want[:, 7:]).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_gives_nearly_the_same_logits(family, made):
    cfg, params = FAMILIES[family], made[family]
    want = forward(cfg, params, TOKENS)[0]
    got = forward(*storage.convert(cfg, params, "int8"), TOKENS)[0]
    assert 0 < np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)


@pytest.mark.parametrize("form", ["pivot", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_declare_what_convert_makes(family, form, made):
    cfg, params = storage.convert(FAMILIES[family], made[family], form)
    abstract = models.abstract_params(cfg)
    assert shapes(params) == shapes(abstract)


@pytest.mark.parametrize("form", ["pivot", "int8"])
def test_random_parameters_of_a_form_run(form):
    cfg = dataclasses.replace(MAMBA, storage=form)
    abstract = models.abstract_params(cfg)
    random = models.init_params(cfg, jax.random.key(0))
    assert shapes(random) == shapes(abstract)
    assert np.isfinite(forward(cfg, random, TOKENS)[0]).all()


def explicit(cfg, form):
    """(parameters, bytes in float32) counted one map and layer at a time from the dense shapes."""
    dense = models.abstract_params(dataclasses.replace(cfg, ranks=(), neurons=()))
    total = sum(a.size for a in jax.tree.leaves(dense))
    size = 4 * total
    mlp = models.FAMILY[cfg.family].MLP
    for name, ranks in cfg.ranks:
        n_in, n_out = models.leaf_of(dense, name)["kernel"].shape[-2:]
        for i, r in enumerate(ranks):
            a, b = n_in, n_out
            if cfg.neurons and name in mlp:
                a, b = (cfg.neurons[i], b) if name == mlp[-1] else (a, cfg.neurons[i])
            bias = n_out - b if "bias" in models.leaf_of(dense, name) else 0
            one = {"uv": r * (a + b), "pivot": r * (a + b - r), "int8": r * (a + b) + r}[form]
            total += one - n_in * n_out - bias
            narrow = b if n_out <= n_in or name == "embed" else a
            extra = {"uv": 0, "pivot": 4 * narrow, "int8": -3 * r * (a + b)}[form]
            size += 4 * (one - n_in * n_out - bias) + extra
    return total, size


@pytest.mark.parametrize("form", ["uv", "pivot", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_bytes_are_exact(family, form):
    cfg = dataclasses.replace(FAMILIES[family], storage=form)
    assert (models.count(cfg), evaluate.parameter_bytes(cfg)) == explicit(cfg, form)
    equal = dataclasses.replace(
        cfg, neurons=(), ranks=tuple((n, (5,) * len(r)) for n, r in cfg.ranks)
    )
    stored = jax.tree.leaves(models.abstract_params(equal))  # no padding: as it lies on the disk
    assert sum(a.size * a.dtype.itemsize for a in stored) == evaluate.parameter_bytes(equal)


@pytest.mark.parametrize("form", ["pivot", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back(family, form, made):
    cfg, params = FAMILIES[family], made[family]
    back, again = storage.convert(*storage.convert(cfg, params, form), "uv")
    assert back == cfg and shapes(again) == shapes(params)
    for name, ranks in cfg.ranks:
        old, new = models.leaf_of(params, name), models.leaf_of(again, name)
        for side, axis in (("v", -1), ("u", -2)):  # still zero beyond the true rank: can be healed
            live = np.moveaxis(np.asarray(new[side]), axis, -1)
            for i, rank in enumerate(ranks if name not in ("embed", "head") else ()):
                assert not live[i, ..., rank:].any()
        want = np.asarray(materialise(old))
        bar = 1e-5 if form == "pivot" else 0.03
        assert np.abs(materialise(new) - want).max() <= bar * np.abs(want).max()
    third = storage.convert(back, again, "pivot" if form == "int8" else "int8")
    direct = storage.convert(*storage.convert(cfg, params, form), third[0].storage)
    assert shapes(third[1]) == shapes(direct[1])


def test_a_delve_converts_stream_by_stream(made, randomised):
    cfg = joint_config([("mamba", MAMBA), ("rwkv", RWKV)])
    params = randomised(cfg, 2) | {"streams": {n: made[n] for n in cfg.names}}
    want = forward(cfg, params, TOKENS)[0]
    new, small = storage.convert(cfg, params, "pivot")
    assert {sub.storage for _, sub in new.streams} == {"pivot"}
    assert np.abs(forward(new, small, TOKENS)[0] - want).max() < 1e-5 * np.abs(want).max()
    assert models.count(new) < models.count(cfg)
    joints = models.count(cfg) - sum(models.count(sub) for _, sub in cfg.streams)
    each = sum(evaluate.parameter_bytes(sub) for _, sub in new.streams)
    assert evaluate.parameter_bytes(new) == 4 * joints + each
    assert from_json(to_json(new)) == new


@pytest.mark.parametrize("form", ["pivot", "int8"])
def test_through_a_compressed_parent(form):
    """compress -> convert: as `delve compress --storage` does; ranks and report are unchanged."""
    cfg = dataclasses.replace(MAMBA, ranks=())
    params = models.init_params(cfg, jax.random.key(0))
    small, factored, _ = compress(cfg, params, None, keep=0.6, method="svd", progress=False)
    new, stored = storage.convert(small, factored, form)
    assert new.ranks == small.ranks and small.ranks
    want = np.asarray(forward(small, factored, TOKENS)[0])
    bar = 1e-5 if form == "pivot" else 0.05
    assert np.abs(forward(new, stored, TOKENS)[0] - want).max() < bar * np.abs(want).max()


# ---- files, placement, training ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pivot", "int8"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_checkpoint_keeps_the_form(form, dtype, made, tmp_path):
    """Integers, their scales and RWKV's decays are never cast."""
    cfg, params = storage.convert(RWKV, made["rwkv"], form)
    checkpoint.save(tmp_path / "ckpt", cfg, params)
    again, restored = checkpoint.restore(tmp_path / "ckpt", dtype=dtype)
    assert again == cfg
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        kept = jnp.issubdtype(leaf.dtype, jnp.integer) or path[-1].key in (
            "q_scale", "time_decay", "time_first"
        )  # fmt: skip
        assert leaf.dtype == (jnp.float32 if dtype is None else dtype) or kept
    if dtype != "bfloat16":
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), restored, params))
    assert shapes(restored["head"])[{"pivot": "order", "int8": "u_q"}[form]][1].startswith("int")


def test_an_export_is_multiplied_out(made, tmp_path):
    cfg, params = storage.convert(RWKV, made["rwkv"], "pivot")
    checkpoint.save(tmp_path / "ckpt", cfg, params)
    export_hf(tmp_path / "ckpt", tmp_path / "hf", verify=False)
    again, dense, _ = parents.load(tmp_path / "hf")
    want = np.asarray(forward(RWKV, made["rwkv"], TOKENS)[0])
    assert np.abs(forward(again, dense, TOKENS)[0] - want).max() < 1e-5 * np.abs(want).max()


def test_old_configs_load_and_unknown_forms_do_not():
    data = to_json(NEOX)
    assert from_json(data) == NEOX and data.pop("storage") == "uv"
    assert from_json(data) == NEOX
    with pytest.raises(DelveError, match="config.json: field 'storage' must be one of uv, pivot"):
        from_json({**data, "storage": "int4"})
    with pytest.raises(DelveError, match="--storage int4: unknown; available are uv, pivot, int8"):
        storage.convert(NEOX, {}, "int4")


@pytest.mark.parametrize("form", ["pivot", "int8"])
def test_training_is_refused(form):
    for cfg in (
        dataclasses.replace(RWKV, storage=form),
        joint_config([("a", MAMBA), ("b", dataclasses.replace(RWKV, storage=form))]),
    ):
        with pytest.raises(DelveError, match=f"storage {form}.*--storage uv") as caught:
            shapes_of(cfg, Settings(tokens=1))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "shape", "want"),
    [
        ("layers/in_proj/v_q", (3, 16, 8), P(None, "data", None)),
        ("layers/in_proj/v_rest", (3, 16, 8), P(None, "data", None)),
        ("layers/att/key/u_rest", (3, 8, 64), P(None, "data", "model")),
        ("layers/out_proj/u_q", (3, 8, 16), P(None, None, "data")),
        ("layers/mlp/down/v", (3, 16, 8), P(None, "model", "data")),
        ("layers/att/o/u_rest", (3, 8, 12), P(None, None, "data")),
        ("embed/v_q", (64, 8), P("model", "data")),
        ("embed/u_rest", (8, 16), P("data", "model")),
        ("layers/in_proj/order", (3, 64), P()),
        ("layers/in_proj/q_scale", (3, 8), P()),
    ],
)
def test_placement(path, shape, want):
    mesh = jax.sharding.AbstractMesh((1, 4, 2), parallel.AXES)
    assert parallel.spec_for(path, shape, mesh) == want
